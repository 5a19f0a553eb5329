"""What ranks send each other in one step of SimCLR, counted from shapes.

W ranks, n images on each, so 2n rows of width d to a rank. The collectives of one step, and what one rank puts into
each (e: bytes of one number, 4, or 2 under bfloat16):

- loss: all-gather of the number of rows (8), of the rows (2n d e) and of one number a row (2n * 4); nothing in
  backward. Without ``gather``: an all-reduce of the value (4) after that of the number of rows.
- gradients: DistributedDataParallel's all-reduce of every trainable parameter; half of it under a hook that compresses.
- buffers: its broadcast of the running statistics from the first rank, before every forward.
- batch norm over all ranks, for each norm of C channels: all-gather of 2C + 1 numbers forward, all-reduce of 2C
  backward; with k chunks the encoder's k times, and k - 1 times more forward, where chunks are encoded again.
- probe: all-reduce of its gradient.

By a ring, an all-gather of s bytes a rank sends (W - 1) s from each rank, an all-reduce of s sends 2 (W - 1) / W s and
a broadcast s. What is logged now and then is left out. Under local SGD the
all-reduces of averages stand in for gradients and buffers, and with negatives of one rank batch norm sends nothing.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from simclr_scale.distributed import GlobalBatchNorm
from simclr_scale.losses.contrast import ContrastiveLoss
from simclr_scale.pretraining.local_losses import StageLosses

Operation = Literal["all_gather", "all_reduce", "broadcast"]
_NUMBER = 4  # bytes of float32, in which batch norm and the loss send their sums
_COUNT = 8  # of int64


class Collective(NamedTuple):
    """One kind of collective of a step."""

    part: str
    operation: Operation
    put_in: int
    """Bytes that one rank puts into one of them."""
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that leave one rank in all of them, by a ring of so many ranks."""
        share = {"all_gather": ranks - 1, "all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1}[self.operation]
        return self.times * share * self.put_in if ranks > 1 else 0.0


def collectives_of_a_step(
    encoder: nn.Module,
    head: nn.Module,
    loss: nn.Module,
    *,
    rows: int,
    width: int,
    element_size: int = 4,
    chunk_size: int | None = None,
    ddp: bool = True,
    gradient_size: int = _NUMBER,
    probe: nn.Module | None = None,
    alone: bool = False,
    stage_losses: StageLosses | None = None,
) -> list[Collective] | None:
    """The collectives of one training step; None for a loss whose traffic is not known here.

    Args:
        encoder, head: with or without batch norm that is converted already; on several ranks it will be.
        rows: 2n, of one rank.
        width: d, of what the loss is given.
        element_size: bytes of one number that the loss is given.
        chunk_size: views encoded at a time; None: all.
        ddp: whether DistributedDataParallel wraps the model.
        gradient_size: bytes in which it sends a gradient of float32: 2 where a hook compresses it.
        probe: online probe.
        alone: whether negatives and batch norm are those of one rank.
        stage_losses: local losses, each of which sends what the loss does.
    """
    if not isinstance(loss, ContrastiveLoss):
        return None
    chunks = 1 if chunk_size is None else math.ceil(rows / chunk_size)
    losses = 1 if stage_losses is None else 1 + len(stage_losses.losses)
    found = [Collective("loss", "all_gather", _COUNT, losses)]
    if loss.gather and not alone:
        found += [
            Collective("loss", "all_gather", rows * width * element_size, losses),
            Collective("loss", "all_gather", rows * _NUMBER, losses),
        ]
    else:
        found.append(Collective("loss", "all_reduce", _NUMBER, losses))
    if chunk_size is not None and not alone and any(True for _ in _norms(encoder)):
        found.append(Collective("batch_norm", "all_gather", _COUNT))
    parts = [encoder, head, loss] if stage_losses is None else [encoder, head, loss, stage_losses]
    for module in () if alone else parts:
        for name, norm in _norms(module):
            forwards, backwards = (2 * chunks - 1, chunks) if module is encoder else (1, 1)
            if stage_losses is not None and module is encoder:
                backwards = stage_losses.backward_passes(norm, name)
            found.append(Collective("batch_norm", "all_gather", (2 * norm.num_features + 1) * _NUMBER, forwards))
            found.append(Collective("batch_norm", "all_reduce", 2 * norm.num_features * _NUMBER, backwards))
    if ddp:
        found.append(Collective("gradients", "all_reduce", gradient_bytes(parts) * gradient_size // _NUMBER))
        found.append(Collective("buffers", "broadcast", _buffer_bytes(parts)))
    if probe is not None:
        found.append(Collective("probe", "all_reduce", sum(p.nbytes for p in probe.parameters()) + _NUMBER))
    return found


def sent_by_part(collectives: Iterable[Collective], ranks: int) -> dict[str, int]:
    """Bytes that leave one rank in a step, by part; empty on one rank."""
    parts: dict[str, float] = {}
    for collective in collectives:
        parts[collective.part] = parts.get(collective.part, 0.0) + collective.sent(ranks)
    return {part: round(sent) for part, sent in parts.items()} if ranks > 1 else {}


def mean_by_part(sent: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, int]:
    """Bytes of a step by part, over steps of several kinds: pairs of the number of steps and what one of them sends."""
    sent = list(sent)
    steps = max(1, sum(count for count, _ in sent))
    parts = dict.fromkeys(part for _, one in sent for part in one)
    return {part: round(sum(count * one.get(part, 0) for count, one in sent) / steps) for part in parts}


def gradient_bytes(modules: Iterable[nn.Module]) -> int:
    """Of all that is trained."""
    return sum(p.nbytes for module in modules for p in module.parameters() if p.requires_grad)


def _buffer_bytes(modules: Iterable[nn.Module]) -> int:
    return sum(buffer.nbytes for module in modules for buffer in module.buffers())


def _norms(module: nn.Module) -> Iterable[tuple[str, Any]]:
    kinds = (GlobalBatchNorm, nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
    return ((name, norm) for name, norm in module.named_modules() if isinstance(norm, kinds))


class LossInput:
    """Remembers the shape and type of what a loss was given, from its last call.

    Attributes:
        rows: 2n of this rank; 0 before the first call.
        width: d.
        element_size: bytes of one number.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.rows = self.width = self.element_size = 0
        self._handle = loss.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        z = given[0]
        if isinstance(z, torch.Tensor) and z.dim() == 2:
            self.rows, self.width, self.element_size = z.shape[0], z.shape[1], z.element_size()

    def remove(self) -> None:
        """Looks no longer."""
        self._handle.remove()
