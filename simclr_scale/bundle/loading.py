"""``load_encoder``: one way to open every kind of encoder, strictly."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from simclr_scale.bundle.elsewhere import points_elsewhere
from simclr_scale.bundle.saving import BUNDLE_KEY, CONFIG, WEIGHTS, transform_of
from simclr_scale.bundle.transform import ImageTransform
from simclr_scale.errors import InputError
from simclr_scale.models import BandHistogramEncoder, ColorHistogramEncoder, PixelEncoder, create_encoder

LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
_RANDOM_SEED = 0

# What torch.load raises on damaged files, found by corrupting bytes at random.
_UNREADABLE = (
    AssertionError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def describe_specs() -> str:
    """The forms of a spec, for messages."""
    return "a run, a bundle or a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS"


def load_encoder(spec: str | os.PathLike[str]) -> tuple[nn.Module, ImageTransform]:
    """Opens an encoder and the transform that belongs to it; ``encoder(transform(image)[None])`` gives (1, D).

    Args:
        spec: a run directory, a bundle directory, a checkpoint (``.ckpt``), or one of

            - ``timm:NAME``: timm's architecture with timm's pretrained weights, downloaded where they are not cached;
            - ``hf-hub:ID``: a model in timm's format on the Hugging Face hub;
            - ``random:NAME``: seeded random weights; ``random:PATH`` of a run, bundle or checkpoint: the same
              architecture and transform without its training;
            - ``pixels:SIZE``: raw pixels at SIZE px, ``histogram:BINS``: a joint colour histogram; the baselines.

    Returns:
        The encoder in evaluation mode, and its transform.

    Raises:
        InputError: an unknown form, a missing, damaged or foreign file, or weights that do not fit the architecture.
    """
    text = os.fspath(spec)
    form, colon, rest = text.partition(":")
    if colon and form in _FORMS and not Path(text).exists():
        encoder, transform = _FORMS[form](rest)
    else:
        encoder, transform = _from_path(Path(text).expanduser())
    return encoder.eval(), transform


def _from_path(path: Path) -> tuple[nn.Module, ImageTransform]:
    found = locate(path)
    return _from_checkpoint(found) if is_checkpoint(found) else _from_bundle(found)


def locate(path: Path) -> Path:
    """The checkpoint or the bundle (a folder) that a path stands for. Raises InputError for neither."""
    if is_checkpoint(path) or (path / CONFIG).is_file():
        return path
    if (path / "encoder" / CONFIG).is_file():
        return path / "encoder"
    if is_checkpoint(last := path / LAST_CHECKPOINT):
        return last
    if path.is_dir():
        raise InputError(f"{path} holds no encoder: neither {CONFIG} nor encoder/{CONFIG} nor checkpoints/last.ckpt")
    raise InputError(f"there is no encoder {str(path)!r}; give {describe_specs()}")


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether a path is a folder of shards, as torch.distributed.checkpoint writes them."""
    return (path / ".metadata").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a file, or a folder of shards."""
    return path.is_file() or is_sharded_checkpoint(path)


def _from_bundle(folder: Path) -> tuple[nn.Module, ImageTransform]:
    config, weights = read_bundle(folder, WEIGHTS)
    return _build(config, weights, f"bundle {folder}")


def read_bundle(folder: Path, file: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The configuration of a bundle, and one of its files of weights. Raises InputError for what cannot be read."""
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / file)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"bundle {folder} cannot be read: {_first_line(error)}") from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A training checkpoint of ours, as it was saved; of one in shards the weights, whole, without optimizers.

    Raises:
        InputError: the file is damaged, or another program's.
    """
    if is_sharded_checkpoint(path):
        from simclr_scale.bundle.sharded import read_whole  # torch.distributed.checkpoint, for those who have one

        return _ours(read_whole(path), path)
    try:
        # Torch's former format is a plain pickle; ours is a zip file, as torch.save has written for years.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if zipfile.is_zipfile(path) else None
    except _UNREADABLE as error:
        raise InputError(f"{path} is truncated, or holds more than tensors and plain values") from error
    if checkpoint is None:
        raise InputError(f"{path} is truncated, or no checkpoint")
    return _ours(checkpoint, path)


def require_checkpoint(path: Path) -> None:
    """Raises InputError where `read_checkpoint` would, but reads no weights of one in shards."""
    if not is_sharded_checkpoint(path):
        read_checkpoint(path)
        return
    from simclr_scale.bundle.sharded import read_facts, read_metadata

    read_metadata(path)
    _ours(read_facts(path) | {"state_dict": {}}, path)


def _ours(checkpoint: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(checkpoint, Mapping) or BUNDLE_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise InputError(f"{path} was not written by simclr_scale: it has no entry {BUNDLE_KEY!r}")
    return checkpoint


def _from_checkpoint(path: Path) -> tuple[nn.Module, ImageTransform]:
    checkpoint = read_checkpoint(path)
    try:
        config = checkpoint[BUNDLE_KEY]["encoder"]
        weights = weights_below(checkpoint["state_dict"], "encoder.")
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no encoder") from error
    return _build(config, weights, str(path))


def weights_below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict whose keys start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _build(config: Any, weights: Mapping[str, Any], where: str) -> tuple[nn.Module, ImageTransform]:
    """The encoder and transform that ``config`` (see ``encoder_config``) describes, with these weights."""
    if isinstance(config, Mapping) and (entry := points_elsewhere(config)):
        raise InputError(f"{where} points elsewhere, and is not opened: {entry}")
    try:
        name, arguments = config["architecture"], {**config["model_args"], "pretrained": False}
        del arguments["num_classes"]
        transform = transform_of(config)
        with torch.random.fork_rng(devices=[]):
            encoder = create_encoder(name, **arguments)
        taken = arguments.get("in_chans", 3)
        if taken != transform.channels:
            raise ValueError(f"the transform gives {transform.channels} channels, the architecture takes {taken}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else _first_line(error)
        raise InputError(f"{where} does not describe an encoder: {reason}") from error
    if problem := misfit(encoder, weights):
        raise InputError(f"{where}: the weights do not fit the architecture {name!r}: {problem}")
    encoder.load_state_dict(weights)
    return encoder, transform


def misfit(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """The first key that does not fit, in words; empty where all fit."""
    expected = module.state_dict()
    if missing := [key for key in expected if key not in weights]:
        return f"{missing[0]!r} is missing ({len(missing)} keys in all)"
    if extra := [key for key in weights if key not in expected]:
        return f"{extra[0]!r} is not part of it ({len(extra)} keys in all)"
    for key, tensor in expected.items():
        shape = getattr(weights[key], "shape", ())
        if tensor.shape != shape:
            return f"{key!r} is {tuple(shape)}, not {tuple(tensor.shape)}"
    return ""


def _pretrained(name: str) -> tuple[nn.Module, ImageTransform]:
    encoder = _downloaded(lambda: create_encoder(name, pretrained=True), f"timm:{name}")
    return encoder, _timm_transform(encoder)


def _from_hub(identifier: str) -> tuple[nn.Module, ImageTransform]:
    spec = f"hf-hub:{identifier}"
    encoder: Any = _downloaded(lambda: timm.create_model(spec, pretrained=True, num_classes=0), spec)
    return encoder, _timm_transform(encoder)


def _downloaded(make: Callable[[], nn.Module], spec: str) -> nn.Module:
    try:
        return make()
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{spec} could not be loaded: {_first_line(error)}") from error


def _timm_transform(encoder: nn.Module) -> ImageTransform:
    return ImageTransform.from_config(resolve_model_data_config(encoder))


def _random(name: str) -> tuple[nn.Module, ImageTransform]:
    path = Path(name).expanduser()
    if path.exists():
        trained, transform = _from_path(path)
        architecture: Any = trained.architecture
        return _seeded(architecture.name, in_chans=architecture.in_chans, **architecture.kwargs), transform
    encoder = _seeded(name)
    return encoder, _timm_transform(encoder)


def _seeded(name: str, **arguments: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_RANDOM_SEED)  # torch.manual_seed would seed the GPUs' too
        return create_encoder(name, **arguments)


def _pixels(size: str) -> tuple[nn.Module, ImageTransform]:
    side = _positive(size, "pixels:SIZE")
    return PixelEncoder(side), ImageTransform((3, side, side), crop_pct=1.0)


def _histogram(bins: str) -> tuple[nn.Module, ImageTransform]:
    return ColorHistogramEncoder(_positive(bins, "histogram:BINS")), ImageTransform((3, 64, 64), crop_pct=1.0)


def baseline(spec: str, channels: int, side: int = 64) -> tuple[nn.Module, ImageTransform]:
    """``pixels:SIZE`` or ``histogram:BINS`` for images of any number of channels.

    Of other than 3 the histogram is one for each channel: a joint one of many channels has more cells than pixels.

    Args:
        side: of the images whose histogram is counted, where they have other than 3 channels.

    Raises:
        InputError: another spec.
    """
    form, _, rest = spec.partition(":")
    if form not in BASELINES:
        raise InputError(f"{spec!r} is no baseline; they are {' and '.join(BASELINES)}")
    if channels == 3:
        return load_encoder(spec)
    if form == "pixels":
        side = _positive(rest, "pixels:SIZE")
        return PixelEncoder(side, channels).eval(), ImageTransform((channels, side, side), crop_pct=1.0)
    encoder = BandHistogramEncoder(_positive(rest, "histogram:BINS"), channels)
    return encoder.eval(), ImageTransform((channels, side, side), crop_pct=1.0)


def _positive(text: str, form: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{form} takes a whole number above 0, got {text!r}")
    return int(text)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


BASELINES = ("pixels", "histogram")
_FORMS: dict[str, Callable[[str], tuple[nn.Module, ImageTransform]]] = {
    "timm": _pretrained,
    "hf-hub": _from_hub,
    "random": _random,
    "pixels": _pixels,
    "histogram": _histogram,
}
