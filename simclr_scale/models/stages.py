"""Where an encoder can be cut into stages, and which parameters each stage has."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr_scale.errors import InputError

Partition = Literal["stages"] | int | list[str]

_OF_A_STEM = 3  # parameters: a convolution's weight, a norm's weight and bias

# (number of the stage from 0, its output) -> what the next stage is given
AtCut = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Stages:
    """An encoder's stages; the last one ends with the encoder and has no entry in the lists of cuts.

    Attributes:
        cuts: name of the module after which each stage but the last ends.
        channels: of the map or tokens there.
        strides: how many times finer than the encoder's last map each of these is, along a side; of that at the last
            cut, where ``feature_info`` does not tell of the encoder's last.
        channels_last: whether channels are the last dimension there: tokens (B, N, C) or maps (B, H, W, C).
        parameters: names of the parameters of each stage, the last included.
    """

    cuts: list[str]
    channels: list[int]
    strides: list[int]
    channels_last: list[bool]
    parameters: list[list[str]]

    def __len__(self) -> int:
        return len(self.parameters)


def find_stages(encoder: nn.Module, partition: Partition = "stages") -> Stages:
    """Cuts an encoder into stages, by a forward pass of one black image.

    Args:
        encoder: a timm model, ours included, or any module where ``partition`` is a list.
        partition: "stages": a stage for each resolution of timm's ``feature_info``; a first one that is but a
            convolution and its norm is a stem, and belongs to the next. A number: as many parts, of as many entries of
            ``feature_info`` each as can be (a vision transformer's are its blocks). A list: names of the modules after
            which to cut.

    Raises:
        InputError: no stages to be found, unknown names, too many parts, or stages that share parameters or are
            joined by other ways than through their cuts.
    """
    cuts = _cuts(encoder, partition)
    owned, shapes = _trace(encoder, cuts)
    if partition == "stages" and len(cuts) > 1 and len(owned[0]) <= _OF_A_STEM:
        cuts, shapes, owned = cuts[1:], shapes[1:], [[*owned[0], *owned[1]], *owned[2:]]
    stages = [*cuts, "the end"]
    for name, names in zip(stages, owned, strict=True):
        if not names:
            raise InputError(f"partition: the stage up to {name} has no parameters to train; cut elsewhere")
    for number, names in enumerate(owned):
        earlier = {name: k for k, other in enumerate(owned[:number]) for name in other}
        if shared := [name for name in names if name in earlier]:
            raise InputError(
                f"partition: {shared[0]} is part of the stages up to {stages[earlier[shared[0]]]} and "
                f"{stages[number]}: an encoder in which a later stage sees more than the output of the one before it "
                "cannot be trained by local losses"
            )
    last = [_is_channels_last(encoder, shape) for shape in shapes]
    channels = [shape[-1] if after else shape[1] for shape, after in zip(shapes, last, strict=True)]
    return Stages(cuts, channels, _strides(encoder, cuts, shapes, last), last, owned)


def _strides(encoder: nn.Module, cuts: list[str], shapes: list[tuple[int, ...]], last: list[bool]) -> list[int]:
    reductions = dict(_entries(encoder)) if _rows(encoder) else {}
    if set(cuts) <= reductions.keys():
        coarsest = max(reductions.values())
        return [max(1, coarsest // reductions[name]) for name in cuts]
    sides = [1 if len(shape) == 3 else shape[1 if after else 2] for shape, after in zip(shapes, last, strict=True)]
    return [max(1, side // min(sides)) for side in sides]


@contextmanager
def cut_at(encoder: nn.Module, cuts: Sequence[str], at_cut: AtCut) -> Iterator[None]:
    """Within: the encoder's forward passes the output of each stage but the last through ``at_cut``."""
    handles = [
        encoder.get_submodule(name).register_forward_hook(
            lambda module, given, output, number=number: at_cut(number, output)
        )
        for number, name in enumerate(cuts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cuts(encoder: nn.Module, partition: Partition) -> list[str]:
    if isinstance(partition, list):
        modules = dict(encoder.named_modules())
        for name in partition:
            if name not in modules or not name:
                outer = ", ".join(name for name, _ in encoder.named_children())
                raise InputError(f"partition: {type(encoder).__name__} has no module {name!r}; it has {outer}")
        if not partition or len(set(partition)) < len(partition):
            raise InputError(f"partition must name each module after which to cut once, got {partition}")
        return partition
    if partition != "stages" and (isinstance(partition, bool) or not isinstance(partition, int) or partition < 2):
        raise InputError(f"partition must be stages, a number of parts from 2, or names of modules, got {partition!r}")
    entries = _entries(encoder)
    if partition == "stages":
        ends = [name for (name, reduction), (_, following) in pairwise(entries) if reduction != following]
        if not ends:
            advice = (
                f"give a number of parts from 2 to {len(entries)}" if len(entries) > 1 else "name modules to cut at"
            )
            raise InputError(f"partition: {type(encoder).__name__} has no stages of several resolutions; {advice}")
        return ends
    if partition > len(entries):
        raise InputError(f"partition: {type(encoder).__name__} can be cut into {len(entries)} parts, not {partition}")
    return [entries[round((part + 1) * len(entries) / partition) - 1][0] for part in range(partition - 1)]


def _entries(encoder: nn.Module) -> list[tuple[str, int]]:
    """Modules and reductions of timm's feature_info, without what has no parameters, such as a stem's ReLU."""
    modules = dict(encoder.named_modules())
    found = [(row["module"], row["reduction"]) for row in _rows(encoder) if row.get("module") in modules]
    entries = [entry for entry in found if any(True for _ in modules[entry[0]].parameters())]
    if not entries:
        raise InputError(
            f"partition: {type(encoder).__name__} does not tell its stages (timm's feature_info); name the modules "
            "after which to cut, as in [layer1, layer2]"
        )
    return entries


def _rows(encoder: nn.Module) -> list[dict[str, Any]]:
    info: Any = getattr(encoder, "feature_info", None) or []
    return info if isinstance(info, list) else list(info.info)


def _trace(encoder: nn.Module, cuts: Sequence[str]) -> tuple[list[list[str]], list[tuple[int, ...]]]:
    """Names of the parameters that each stage's output depends on, and the shape of all but the last one."""
    named = [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]
    owned: list[list[str]] = []
    shapes: list[tuple[int, ...]] = []

    def own(output: Tensor) -> None:
        gradients: Sequence[Tensor | None] = [None] * len(named)
        if output.requires_grad:
            gradients = torch.autograd.grad(
                output.float().sum(), [p for _, p in named], retain_graph=True, allow_unused=True
            )
        owned.append([name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None])

    def at_cut(number: int, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or number != len(shapes):
            raise InputError(f"partition: {cuts[number]} is no place to cut: its output is no map or tokens")
        own(output)
        shapes.append(tuple(output.shape))
        return output.detach()

    weight = next(encoder.parameters())
    image = torch.zeros(1, *_input_size(encoder), device=weight.device, dtype=weight.dtype)
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        with torch.enable_grad(), cut_at(encoder, cuts, at_cut):
            own(encoder.eval()(image))
    finally:
        for module, training in modes:
            module.training = training
    if len(shapes) < len(cuts):
        raise InputError(f"partition: {cuts[len(shapes)]} takes no part in a forward pass")
    return owned, shapes


def _input_size(encoder: nn.Module) -> tuple[int, int, int]:
    channels, height, width = getattr(encoder, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    architecture = getattr(encoder, "architecture", None)
    if architecture is not None:
        size = architecture.kwargs.get("img_size", (height, width))
        height, width = (size, size) if isinstance(size, int) else size
        channels = architecture.in_chans
    return channels, height, width


def _is_channels_last(encoder: nn.Module, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC")
