"""Encoders to save, with weights and statistics that no initialisation gives."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_scale.bundle import ImageTransform, save_encoder
from simclr_scale.models import create_encoder

# name: architecture, channels, side of the images, arguments
ENCODERS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "ours_tiny": ("simclr_resnet_tiny", 3, 24, {"channels": (6, 10, 14), "stem_stride": 1}),
    "ours_18_grey": ("simclr_resnet18", 1, 32, {"small_images": True, "width": 0.25}),
    "resnet18": ("resnet18", 3, 33, {}),
    "resnet18_grey": ("resnet18.a1_in1k", 1, 32, {}),
    "vit": ("vit_tiny_patch16_224", 3, 48, {"img_size": 48, "drop_path_rate": 0.1}),
    "convnext": ("convnext_atto", 3, 32, {}),
}


def make_encoder(name: str) -> nn.Module:
    """In evaluation mode, its batch norms and their statistics moved from where they start."""
    architecture, channels, _, arguments = ENCODERS[name]
    torch.manual_seed(0)
    encoder = create_encoder(architecture, in_chans=channels, **arguments)
    with torch.no_grad():
        encoder.train()(images(name))
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return encoder.eval()


def images(name: str) -> Tensor:
    _, channels, side, _ = ENCODERS[name]
    return torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(1))


def make_transform(name: str) -> ImageTransform:
    _, channels, side, _ = ENCODERS[name]
    return ImageTransform((channels, side, side), crop_pct=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def save(name: str, folder: Path, **facts: Any) -> nn.Module:
    encoder = make_encoder(name)
    save_encoder(encoder, make_transform(name), folder, **facts)
    return encoder
