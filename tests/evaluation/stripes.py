"""Generated images whose class no colour tells, so that an encoder has to learn; and encoders that are quick at it."""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.models import ProjectionHead, create_encoder

CLASSES = ("across", "along", "checker")
TRANSFORM = ImageTransform((3, 12, 12), crop_pct=1.0)


class StripeSource:
    """12 px patterns of two random colours with noise; image i is of class i modulo 3."""

    name = "stripes"

    def __init__(self, count: int, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> None:
        self.classes = classes
        self.labels = np.array([classes.index(CLASSES[i % 3]) for i in range(count)], dtype=np.int64)
        self.seed = seed
        self.split_description = f"seed {seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        rng = np.random.default_rng([self.seed, index])
        y, x = np.mgrid[:12, :12] // 2 + rng.integers(0, 2, 2)[:, None, None]
        on = {"across": y, "along": x, "checker": x + y}[CLASSES[index % 3]][..., None] % 2
        one, other = rng.uniform(0, 255, (2, 3))
        pixels = one * on + other * (1 - on) + rng.normal(0, 20, (12, 12, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.labels.tobytes() + bytes([self.seed])).hexdigest()

    def describe(self, index: int) -> str:
        return f"image {index}"


def tiny_encoder(channels: tuple[int, ...] = (4, 6, 8), seed: int = 0) -> nn.Module:
    """A residual network with batch norm; its running statistics are not those it starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = create_encoder("simclr_resnet_tiny", channels=channels, stem_stride=1)
        encoder.train()(torch.rand(16, 3, 12, 12))
    return encoder.eval()


def tiny_head(num_layers: int = 2, in_features: int = 8) -> ProjectionHead:
    """A head whose batch norms are not the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = ProjectionHead(in_features, hidden_features=5, out_features=4, num_layers=num_layers)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            head.train()(torch.rand(16, in_features))
    return head.eval()
