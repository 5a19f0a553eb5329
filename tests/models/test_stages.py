"""Where encoders are cut."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from simclr_scale.models.stages import cut_at, find_stages

ENCODERS: list[tuple[str, dict[str, Any], Any, list[str]]] = [
    ("simclr_resnet_tiny", {"channels": (4, 6, 8)}, "stages", ["layer1", "layer2"]),
    ("simclr_resnet50", {"width": 0.0625, "sk_ratio": 0.0625}, "stages", ["layer1", "layer2", "layer3"]),
    ("test_resnet", {}, "stages", ["layer1", "layer2", "layer3"]),
    ("test_convnext", {}, "stages", ["stages.0", "stages.1", "stages.2"]),
    ("test_efficientnet", {}, "stages", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    ("regnety_002", {}, "stages", ["s1", "s2", "s3"]),
    ("test_vit", {}, 2, ["blocks.2"]),
    ("test_vit", {}, 4, ["blocks.1", "blocks.2", "blocks.3"]),
    ("test_resnet", {}, ["layer2"], ["layer2"]),
]


@pytest.mark.parametrize(("name", "options", "partition", "cuts"), ENCODERS)
def test_every_parameter_belongs_to_one_stage(name: str, options: dict[str, Any], partition: Any, cuts: Any) -> None:
    encoder = create_encoder(name, **options)
    stages = find_stages(encoder, partition)
    assert stages.cuts == cuts
    assert len(stages) == len(cuts) + 1
    owned = list(chain.from_iterable(stages.parameters))
    assert sorted(owned) == sorted(name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize(("name", "options", "partition", "cuts"), ENCODERS)
def test_shapes_at_the_cuts(name: str, options: dict[str, Any], partition: Any, cuts: Any) -> None:
    encoder = create_encoder(name, **options).eval()
    stages = find_stages(encoder, partition)
    sides = []

    def look(number: int, y: torch.Tensor) -> torch.Tensor:
        assert y.shape[-1 if stages.channels_last[number] else 1] == stages.channels[number]
        sides.append(y.shape[1 if stages.channels_last[number] else 2] if y.ndim == 4 else 1)
        return y

    with torch.no_grad(), cut_at(encoder, stages.cuts, look):
        end = encoder.forward_features(torch.zeros(1, *encoder.pretrained_cfg["input_size"]))
    coarsest = end.shape[2] if end.ndim == 4 else 1
    assert stages.strides == [max(1, side // coarsest) for side in sides]


def test_cuts_are_gone_afterwards_and_modes_are_kept() -> None:
    encoder = create_encoder("simclr_resnet_tiny").train()
    encoder.layer1.eval()
    modes = [module.training for module in encoder.modules()]
    buffers = [buffer.clone() for buffer in encoder.buffers()]
    find_stages(encoder)
    assert modes == [module.training for module in encoder.modules()]
    assert all(map(torch.equal, buffers, encoder.buffers()))
    assert all(p.grad is None for p in encoder.parameters())
    assert not any(module._forward_hooks for module in encoder.modules())


class Bypass(nn.Module):
    """The second part sees what the first one's first layer made, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.second(self.first(x) + x).mean((2, 3))


REFUSED = [
    (
        "test_vit",
        "stages",
        "VisionTransformer has no stages of several resolutions; give a number of parts",
    ),
    ("test_vit", 7, "VisionTransformer can be cut into 6 parts, not 7"),
    ("test_resnet", 1, "partition must be stages, a number of parts from 2, or names of modules, got 1"),
    ("test_resnet", True, "partition must be stages, a number of parts from 2, or names of modules, got True"),
    ("test_resnet", "blocks", "partition must be stages, a number of parts from 2, or names of modules, got 'blocks'"),
    ("test_resnet", ["layer5"], "ResNet has no module 'layer5'; it has conv1, bn1, act1, maxpool, layer1"),
    ("test_resnet", [], "partition must name each module after which to cut once"),
    ("test_resnet", ["layer2", "layer1"], "layer1 is no place to cut"),
    ("test_resnet", ["layer4"], "the stage up to the end has no parameters to train"),
    ("vgg11", "stages", "VGG does not tell its stages (timm's feature_info); name the modules after which to cut"),
]


@pytest.mark.parametrize(("name", "partition", "line"), REFUSED)
def test_what_cannot_be_cut(name: str, partition: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        find_stages(create_encoder(name), partition)
    assert line in str(error.value)


def test_a_bypass_is_found() -> None:
    with pytest.raises(InputError, match=r"stem.weight is part of the stages up to first and the end"):
        find_stages(Bypass(), ["first"])
    with pytest.raises(InputError, match=r"unused takes no part in a forward pass"):
        find_stages(Bypass(), ["stem", "unused"])
