"""Encoders by name: every one a timm model without classifier that remembers how it was made."""

import difflib
import inspect
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import timm
import torch
from torch import nn

import simclr_scale.models.resnet  # noqa: F401  registers simclr_resnet* with timm
from simclr_scale.errors import InputError

_NOT_OF_THE_ARCHITECTURE = {*inspect.signature(timm.create_model).parameters, "num_classes", "features_only"}
# What the constructors in timm raise for an argument of the wrong value or type.
_BUILD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Architecture:
    """What `create_encoder` needs to build an encoder again; all of it can be written as JSON."""

    name: str
    in_chans: int = 3
    kwargs: dict[str, Any] = field(default_factory=dict)


class EncoderOptions(TypedDict, total=False):
    """Arguments of architectures that a configuration file may give as `init_args`; any other is a `dict_kwargs`."""

    width: float
    sk_ratio: float
    small_images: bool
    channels: tuple[int, ...]
    stem_stride: int
    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    drop_rate: float
    drop_path_rate: float
    global_pool: str


def create_encoder(
    name: str, in_chans: int = 3, *, pretrained: bool = False, **kwargs: Unpack[EncoderOptions]
) -> nn.Module:
    """A timm model without classifier: images (B, in_chans, H, W) -> features (B, D).

    The encoder has `num_features`, the D of a forward pass, and `architecture`, the `Architecture` to build it again.

    Args:
        name: an architecture that timm knows, with or without the tag of its weights, or one of `simclr_resnet*`.
        in_chans: channels of the images.
        pretrained: load the weights that timm has for this name (not part of `architecture`).
        kwargs: arguments of the architecture, such as `width`, `img_size` or `drop_path_rate`; plain JSON values.

    Raises:
        InputError: an unknown name, an argument that the architecture does not take or that is not a JSON value,
            `pretrained` where there are no weights, or an output that is not one vector per image.
    """
    _check_name(name, in_chans, pretrained)
    architecture = Architecture(name, in_chans, _as_json(dict(kwargs)))
    encoder = _build(architecture, pretrained)
    encoder.architecture = architecture
    return encoder


def _check_name(name: str, in_chans: int, pretrained: bool) -> None:
    if ":" in name:
        raise InputError(
            f"encoder {name!r} names saved weights, not an architecture: open it with simclr_scale.load_encoder"
        )
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise InputError(f"unknown encoder {name!r}{_suggest(base, timm.list_models())}")
    tags = [tagged.partition(".")[2] for tagged in timm.list_models(f"{base}.*", include_tags=True)]
    if tag and tag not in tags:
        raise InputError(f"encoder {base!r} has no weights tagged {tag!r}{_suggest(tag, tags)}")
    if pretrained and not timm.is_model_pretrained(name):
        raise InputError(f"encoder {name!r} has no pretrained weights in timm: leave out pretrained=True")
    if in_chans < 1:
        raise InputError(f"encoder {name!r}: in_chans={in_chans} must be at least 1")


def _suggest(wrong: str, right: list[str]) -> str:
    close = difflib.get_close_matches(wrong, right, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _as_json(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a bundle's config.json will give them back: tuples become lists."""
    refused = _NOT_OF_THE_ARCHITECTURE.intersection(kwargs)
    if refused:
        raise InputError(
            f"create_encoder takes no argument {min(refused)!r}: an encoder has no classifier, "
            "and weights come by pretrained=True or load_encoder"
        )
    for key, value in kwargs.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise InputError(f"encoder argument {key}={value!r} must be a plain JSON value, to be saved") from error
    return json.loads(json.dumps(kwargs))


def _build(architecture: Architecture, pretrained: bool) -> Any:
    """The timm model; `Any` because nn.Module's type knows nothing of timm's attributes."""
    name, in_chans, kwargs = architecture.name, architecture.in_chans, architecture.kwargs
    try:
        encoder: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **kwargs)
        # timm's own num_features is not always the width of the output (MobileNetV3, VGG).
        encoder.num_features = _output_width(encoder, architecture)
    except InputError:
        raise
    except _BUILD_ERRORS as error:
        if not kwargs:
            raise
        refused = re.search(r"(\w+)(?:\.\w+)?\(\) got .* keyword argument '(\w+)'", str(error))
        if refused and refused[2] in kwargs:
            callee, key = refused.groups()
            reason = f"encoder {name!r} takes no argument {key!r}{_suggest(key, _parameters(name, callee))}"
        else:
            first_line = str(error).partition("\n")[0]
            arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            reason = f"encoder {name!r} cannot be built with {arguments}: {first_line}"
        raise InputError(reason) from error
    return encoder


def _parameters(name: str, callee: str) -> list[str]:
    """Parameters of the class or function `callee` in the module that defines the architecture."""
    definition = getattr(sys.modules[timm.model_entrypoint(name).__module__], callee, None)
    return list(inspect.signature(definition).parameters) if definition else []


def _output_width(encoder: Any, architecture: Architecture) -> int:
    """D, from one black image in evaluation mode; the encoder is left as it was."""
    height, width = _input_size(encoder, architecture)
    image = torch.zeros(1, architecture.in_chans, height, width, device=next(encoder.parameters()).device)
    training = encoder.training
    with torch.no_grad():
        features = encoder.eval()(image)
    encoder.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise InputError(f"encoder {architecture.name!r} must give features (1, D) for one image, not {shape}")
    return features.shape[1]


def _input_size(encoder: Any, architecture: Architecture) -> tuple[int, int]:
    size = architecture.kwargs.get("img_size", encoder.pretrained_cfg["input_size"][-2:])
    return (size, size) if isinstance(size, int) else tuple(size)
