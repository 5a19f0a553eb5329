"""An encoder in the formats of other libraries, each file checked by reading it back before it gets its name."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torchvision
from torch import Tensor, nn

from simclr_scale.bundle.saving import BUNDLE_KEY, save_encoder
from simclr_scale.bundle.transform import ImageTransform
from simclr_scale.errors import InputError

ExportFormat = Literal["timm", "torchvision", "onnx", "torch-export"]

TOLERANCE = 1e-4
INPUT, OUTPUT = "images", "features"

# A protobuf message, which an ONNX file is, ends there.
_MOST_ONNX_BYTES = 2**31 - 1
_ONNX_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
_PT2 = ".pt2"
_SEED = 0
# None of them is the size that is traced, which is 2.
_BATCHES = (1, 3)
# Arguments of timm's ResNets that change nothing in evaluation.
_WITHOUT_EFFECT = {"drop_rate", "drop_path_rate", "zero_init_last"}
_OURS = "simclr_resnet"


class Exported(NamedTuple):
    """What was written, how near its features are, and how the other library opens it."""

    path: Path
    difference: float
    """Largest difference of a feature, as a share of the largest feature (or of 1, where that is smaller)."""
    usage: str
    """Python that gives `features` (B, D) for `images` (B, C, H, W)."""


def export_encoder(
    encoder: nn.Module,
    transform: ImageTransform,
    format: ExportFormat,
    path: str | os.PathLike[str],
) -> Exported:
    """Writes an encoder for another library, and compares its features there with ours before the file gets its name.

    - ``timm``: a folder that ``timm.create_model("local-dir:PATH", pretrained=True)`` opens (after
      ``import simclr_scale.models`` where the architecture is one of ours).
    - ``torchvision``: the state dict of torchvision's ResNet, wide ResNet or ResNeXt of the same name, less its ``fc``.
    - ``onnx``: one file. The settings of the transform are JSON in its metadata, under ``simclr_scale``.
    - ``torch-export``: a ``.pt2`` file for ``torch.export.load``; the transform is its extra file ``transform.json``.

    The last two take batches of any size; height and width are those of the transform. All compute in evaluation mode.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out, on the CPU, in float32. Left as it is.
        transform: the evaluation transform that belongs to it.
        format: see above.
        path: folder for timm, else file; must not exist.

    Raises:
        InputError: the path exists or its folder does not, the format cannot hold the architecture, ONNX's libraries
            are not installed, the name of a file for torch.export does not end in .pt2, or features differ by more than
            1e-4 of the largest.
    """
    if format not in get_args(ExportFormat):
        raise InputError(f"unknown format {format!r}; there are {', '.join(get_args(ExportFormat))}")
    path = _new(path)
    write = _WRITERS[format]
    training = {module: module.training for module in encoder.modules()}
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        with torch.no_grad():
            encoder.eval()
            features_of, usage = write(encoder, transform, beside / path.name)
            difference = _difference(encoder, features_of, transform, format)
        # Made meanwhile by another process, it is left alone too.
        os.replace(beside / path.name, _new(path))
    finally:
        for module, flag in training.items():
            module.training = flag
        shutil.rmtree(beside, ignore_errors=True)
    return Exported(path, difference, usage.format(path=path))


def _new(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists already; nothing is ever overwritten, so name another place")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    return path


# Images (B, C, H, W) -> features (B, D), by the other library from the file.
Peer = Callable[[Tensor], Tensor]


def _difference(encoder: nn.Module, features_of: Peer, transform: ImageTransform, format: str) -> float:
    largest = 0.0
    for batch in _BATCHES:
        images = _images(transform, batch)
        ours, theirs = encoder(images), features_of(images)
        if ours.shape != theirs.shape:
            raise InputError(f"{format}: it gives features {tuple(theirs.shape)}, the encoder {tuple(ours.shape)}")
        largest = max(largest, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    # Not "above", so that NaN does not pass.
    if not largest <= TOLERANCE:
        raise InputError(
            f"{format} cannot hold this encoder: its features differ by {largest:.1g} of the largest; "
            "timm, onnx and torch-export may"
        )
    return largest


def _images(transform: ImageTransform, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.rand(batch, *transform.config["input_size"], generator=generator)


def _write_timm(encoder: nn.Module, transform: ImageTransform, path: Path) -> tuple[Peer, str]:
    import timm

    save_encoder(encoder, transform, path)
    ours = "import simclr_scale.models\n" if _name(encoder).startswith(_OURS) else ""
    usage = (
        f"import timm\n{ours}"
        'encoder = timm.create_model("local-dir:{path}", pretrained=True).eval()\nfeatures = encoder(images)'
    )
    peer: Any = timm.create_model(f"local-dir:{path}", pretrained=True)
    return peer.eval(), usage


def _write_torchvision(encoder: nn.Module, transform: ImageTransform, path: Path) -> tuple[Peer, str]:
    name = _name(encoder)
    if name.startswith(_OURS):
        raise InputError(
            f"torchvision cannot hold {name!r}: its networks have another stem or another padding of the max-pool, "
            "so the same weights give other features; timm, onnx and torch-export can"
        )
    models = [model for model in torchvision.models.list_models(torchvision.models) if "resne" in model]
    if name not in models:
        raise InputError(
            f"torchvision has no network like {name or type(encoder).__name__!r}; it has {', '.join(models)}; "
            "onnx and torch-export take any"
        )
    arguments = set(encoder.architecture.kwargs) - _WITHOUT_EFFECT  # type: ignore[union-attr, arg-type]
    if arguments or transform.channels != 3:
        what = f"the argument {min(arguments)!r}" if arguments else f"{transform.channels} channels"
        raise InputError(f"torchvision's {name} has no place for {what}; timm, onnx and torch-export have")
    weights = {key: value.detach().cpu().clone() for key, value in encoder.state_dict().items()}
    with torch.device("meta"):
        peer = torchvision.models.get_model(name)
    peer.fc = nn.Identity()
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    if expected != {key: value.shape for key, value in weights.items()}:
        raise InputError(f"torchvision's {name} has other weights than this encoder; timm, onnx and torch-export fit")
    torch.save(weights, path)
    peer.load_state_dict(torch.load(path, weights_only=True), assign=True)
    usage = (
        "import torch, torchvision\n"
        f'encoder = torchvision.models.get_model("{name}")\nencoder.fc = torch.nn.Identity()\n'
        'encoder.load_state_dict(torch.load("{path}", weights_only=True))\nfeatures = encoder.eval()(images)'
    )
    return peer.eval(), usage


def _write_torch_export(encoder: nn.Module, transform: ImageTransform, path: Path) -> tuple[Peer, str]:
    if path.suffix != _PT2:
        raise InputError(
            f"{path.name}: torch.export opens files that end in {_PT2} alone, so name it {path.name}{_PT2}"
        )
    torch.export.save(_traced(encoder, transform), path, extra_files={"transform.json": _transform_json(transform)})
    usage = 'import torch\nfeatures = torch.export.load("{path}").module()(images)'
    return torch.export.load(path).module(), usage


def _write_onnx(encoder: nn.Module, transform: ImageTransform, path: Path) -> tuple[Peer, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx.export translates with
    except ImportError as error:
        raise InputError(
            f"ONNX files need {', '.join(_ONNX_LIBRARIES)} ({error}): pip install 'simclr_scale[export]'"
        ) from error
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    if size > _MOST_ONNX_BYTES:
        raise InputError(f"an ONNX file holds at most 2 GiB, and the weights are {size / 2**30:.1f}; take torch-export")
    try:
        program = torch.onnx.export(
            _traced(encoder, transform), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"ONNX cannot hold {_name(encoder)!r}: {_first_line(error)}; take torch-export") from error
    assert program is not None, "by dynamo there is a program"
    program.model.metadata_props[BUNDLE_KEY] = _transform_json(transform)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features_of(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    usage = (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("{path}")\n'
        f'[features] = session.run(["{OUTPUT}"], {{{{"{INPUT}": images}}}})  # a NumPy array of float32'
    )
    return features_of, usage


def _traced(encoder: nn.Module, transform: ImageTransform) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    try:
        return torch.export.export(encoder, (_images(transform, 2),), dynamic_shapes=({0: batch},))
    # Its own errors are of many kinds, most of them no public names.
    except Exception as error:
        name = _name(encoder) or type(encoder).__name__
        raise InputError(f"{name!r} cannot be traced for batches of any size: {_first_line(error)}") from error


def _transform_json(transform: ImageTransform) -> str:
    return json.dumps({**transform.config, "value_range": transform.value_range})


def _name(encoder: nn.Module) -> str:
    """The architecture without the tag of its weights; empty where it is not known."""
    architecture: Any = getattr(encoder, "architecture", None)
    return "" if architecture is None else architecture.name.partition(".")[0]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_WRITERS: dict[str, Callable[[nn.Module, ImageTransform, Path], tuple[Peer, str]]] = {
    "timm": _write_timm,
    "torchvision": _write_torchvision,
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
}
