"""Encoders by name: what they give, what they remember, and what a user is told who asks for the impossible."""

import json
from typing import Any

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.models import Architecture, create_encoder, encoders


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "features"),
    [
        ("resnet18", {}, 64, 512),
        ("convnext_atto", {}, 64, 320),
        ("efficientnet_b0", {}, 64, 1280),
        ("mobilenetv3_small_100", {}, 64, 1024),  # timm's num_features is 576
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 32, 192),
        ("vit_tiny_patch16_224", {"img_size": (48, 32)}, (48, 32), 192),
        ("simclr_resnet_tiny", {}, 32, 96),
        ("simclr_resnet50", {"width": 0.5, "sk_ratio": 0.0625}, 64, 1024),
    ],
)
def test_features_have_the_announced_width(name: str, kwargs: dict, size: Any, features: int) -> None:
    encoder = create_encoder(name, **kwargs)
    height, width = (size, size) if isinstance(size, int) else size
    assert encoder.eval()(torch.rand(2, 3, height, width)).shape == (2, features)
    assert encoder.num_features == features


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", ["simclr_resnet_tiny", "simclr_resnet18", "vit_tiny_patch16_224"])
def test_other_numbers_of_channels(name: str, in_chans: int) -> None:
    encoder = create_encoder(name, in_chans)
    assert encoder.architecture == Architecture(name, in_chans, {})
    size = encoder.pretrained_cfg["input_size"][-1]
    assert encoder(torch.rand(2, in_chans, size, size)).shape == (2, encoder.num_features)


def test_the_probe_leaves_no_trace() -> None:
    torch.manual_seed(0)
    peer = timm.create_model("resnet18", num_classes=0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    encoder = create_encoder("resnet18")
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    assert all(module.training for module in encoder.modules())
    assert encoder.state_dict().keys() == peer.state_dict().keys()
    for key, tensor in peer.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[key], tensor, rtol=0, atol=0)


def test_works_without_memory_for_weights() -> None:
    with torch.device("meta"):
        assert create_encoder("simclr_resnet152", width=3, sk_ratio=0.0625).num_features == 6144


def test_architecture_builds_the_encoder_again() -> None:
    encoder = create_encoder("simclr_resnet_tiny", 1, channels=(8, 16, 32), stem_stride=1)
    record = encoder.architecture
    assert record == Architecture("simclr_resnet_tiny", 1, {"channels": [8, 16, 32], "stem_stride": 1})
    assert json.loads(json.dumps(record.kwargs)) == record.kwargs
    again = create_encoder(record.name, record.in_chans, **record.kwargs)
    again.load_state_dict(encoder.state_dict())
    assert again.architecture == record


def test_pretrained_goes_to_timm_and_not_into_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    create_model = timm.create_model

    def offline(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
        asked.append((name, pretrained))
        return create_model(name, **kwargs)

    monkeypatch.setattr(encoders.timm, "create_model", offline)
    encoder = create_encoder("resnet18.a1_in1k", pretrained=True)
    assert asked == [("resnet18.a1_in1k", True)]
    assert encoder.architecture == Architecture("resnet18.a1_in1k", 3, {})


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("simclr_resnet5", {}, r"unknown encoder 'simclr_resnet5'; did you mean 'simclr_resnet50'"),
        ("", {}, r"unknown encoder ''"),
        ("resnet18.a1_in1", {}, r"'resnet18' has no weights tagged 'a1_in1'; did you mean 'a1_in1k'"),
        ("local-dir:runs/first/encoder", {}, r"'local-dir:runs/first/encoder' names saved weights.*load_encoder"),
        ("hf-hub:timm/resnet18", {}, r"load_encoder"),
        ("resnet18", {"in_chans": 0}, r"in_chans=0 must be at least 1"),
        ("simclr_resnet18", {"pretrained": True}, r"'simclr_resnet18' has no pretrained weights"),
        ("simclr_resnet18", {"wdith": 2}, r"'simclr_resnet18' takes no argument 'wdith'; did you mean 'width'"),
        ("simclr_resnet_tiny", {"chanels": [8, 16, 32]}, r"no argument 'chanels'; did you mean 'channels'"),
        ("simclr_resnet_tiny", {"small_images": False}, r"'simclr_resnet_tiny' takes no argument 'small_images'"),
        ("vit_tiny_patch16_224", {"image_size": 32}, r"takes no argument 'image_size'; did you mean 'img_size'"),
        ("efficientnet_b0", {"width": 2}, r"'efficientnet_b0' takes no argument 'width'"),
        ("resnet18", {"num_classes": 10}, r"no argument 'num_classes': an encoder has no classifier"),
        ("resnet18", {"checkpoint_path": "x.pt"}, r"no argument 'checkpoint_path'"),
        ("resnet18", {"norm_layer": nn.BatchNorm2d}, r"norm_layer=.* must be a plain JSON value"),
        ("resnet18", {"global_pool": ""}, r"must give features \(1, D\) for one image, not \(1, 512, 7, 7\)"),
        ("simclr_resnet18", {"width": -1}, r"width=-1: must be positive"),
        ("vit_tiny_patch16_224", {"patch_size": "a"}, r"cannot be built with patch_size='a': "),
    ],
)
def test_what_the_user_is_told(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        create_encoder(name, **kwargs)
    assert "\n" not in str(caught.value)


class Holder:
    """Any class with an encoder as parameter, as the command line sees it."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        {"init_args": {"name": "simclr_resnet_tiny", "in_chans": 3}, "dict_kwargs": {"channels": [8, 16, 32]}},
        {"init_args": {"name": "simclr_resnet_tiny", "channels": [8, 16, 32]}},
    ],
)
def test_configuration_files_name_encoders(parser: ArgumentParser, arguments: dict) -> None:
    config = {"model": {"encoder": {"class_path": "simclr_scale.models.create_encoder", **arguments}}}
    parsed = parser.parse_object(config)
    encoder = parser.instantiate(parsed).model.encoder
    assert encoder.architecture == Architecture("simclr_resnet_tiny", 3, {"channels": [8, 16, 32]})
    again = parser.instantiate(parser.parse_string(parser.dump(parsed))).model.encoder
    assert again.architecture == encoder.architecture


def test_command_line_names_encoders(parser: ArgumentParser) -> None:
    parsed = parser.parse_args(
        [
            "--model.encoder=simclr_scale.models.create_encoder",
            "--model.encoder.name=vit_tiny_patch16_224",
            "--model.encoder.img_size=32",
            "--model.encoder.patch_size=[8, 8]",
            "--model.encoder.dict_kwargs.no_embed_class=true",
        ]
    )
    architecture = parser.instantiate(parsed).model.encoder.architecture
    assert architecture.kwargs == {"img_size": 32, "patch_size": [8, 8], "no_embed_class": True}
