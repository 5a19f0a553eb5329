"""Features of a source of images: shared out among ranks, kept on disk, the same bits however it is done."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from simclr_scale.data.sources import Source
from simclr_scale.distributed import all_gather, world
from simclr_scale.errors import InputError
from simclr_scale.evaluation.cache import CachedFeatures, MemoryFeatures, features_facts, open_cache
from simclr_scale.evaluation.features import (
    ImageDataset,
    Transform,
    by_index,
    checked_features,
    evaluating,
    image_loader,
)

# Images whose features tell one encoder, transform or data set from another in the cache.
_PROBED_IMAGES = 4


def source_features(
    encoder: nn.Module,
    source: Source,
    transform: Transform,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    unreadable: dict[int, str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the images of a source, shared out among the ranks, and kept on disk where there is a cache.

    The images are cut into batches of `batch_size` in the order of `indices`, whatever the number of ranks, and each
    batch is computed whole by one rank: every image once, and the same bits on any number of ranks. Every rank of
    `group` must call this, and every one is given the whole.

    Args:
        encoder: as for `extract_features`, equal on every rank.
        source: the images.
        transform: from picture or array to (C, H, W).
        indices: the images wanted; None: all.
        batch_size: images the encoder takes at once.
        num_workers: processes that read images, on each rank.
        device: see `extract_features`.
        progress: is told how many images are done, on all ranks together.
        unreadable: see `extract_features`; equal on every rank afterwards. What the cache says cannot be read is tried
            again.
        cache: folder of features computed before, see `simclr_scale.evaluation.cache`; only rank 0 reads and writes
            it. None: there is none. The result is the same.
        group: the ranks; None: all.

    Returns:
        Features (N, D) float32, labels (N,) int64 and indices (N,) int64, on the CPU, in the order of the index.
        From a cache, the features are a memory map on rank 0.

    Raises:
        InputError: on every rank, as `extract_features` does, and where the cache cannot be written.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(chosen):
        raise InputError(f"{source.name}: no images to compute features of")
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}, wanted at least 1")
    with evaluating(encoder, device) as there, torch.inference_mode(), ExitStack() as opened:
        store: MemoryFeatures | CachedFeatures = MemoryFeatures(len(chosen), batch_size)
        failure: str | None = None
        if cache is not None and world(group).rank == 0:
            try:
                response = _response(encoder, source, transform, chosen, there)
                facts = features_facts(
                    encoder, transform, source, chosen, batch_size=batch_size, device=there, response=response
                )
                store = opened.enter_context(open_cache(cache, facts, len(chosen), batch_size))
                _try_again(store, source, transform)
            except InputError as error:
                failure = str(error)
        _require_success(failure, group)
        grid = _Grid(source, transform, chosen, batch_size, num_workers, unreadable is None)
        _complete(store, encoder, grid, there, progress or (lambda _done: None), group)
        matrix = store.matrix()
    left_out = {index: reason for batch in store.finished.values() for index, reason in batch.unreadable.items()}
    if len(left_out) == len(chosen):
        reason = left_out[int(chosen[0])]
        raise InputError(f"none of the {len(left_out):,} images can be read; the first: {reason}")
    if unreadable is not None:
        unreadable.update(left_out)
    elif left_out:
        raise InputError(next(iter(left_out.values())))
    if left_out:
        matrix = np.concatenate(
            [matrix[start : start + store.finished[start // batch_size].rows] for start in grid.starts]
        )
        chosen = chosen[~np.isin(chosen, list(left_out))]
    labels = np.asarray(source.labels)[chosen].astype(np.int64)
    return by_index(torch.from_numpy(matrix), torch.from_numpy(labels), torch.from_numpy(chosen))


@dataclass(frozen=True)
class _Grid:
    """The images of a source, cut into batches that do not depend on who computes them."""

    source: Source
    transform: Transform
    chosen: np.ndarray
    batch_size: int
    num_workers: int
    strict: bool
    """An image that cannot be read is an error."""

    @property
    def starts(self) -> range:
        return range(0, len(self.chosen), self.batch_size)

    def images(self, batch: int) -> np.ndarray:
        return self.chosen[batch * self.batch_size : (batch + 1) * self.batch_size]

    def loader(self, batches: Sequence[int]) -> Iterable[dict[str, Any]]:
        """Those batches, ascending: as only the last of all is short, they are still the batches of the grid."""
        if not batches:
            return ()
        indices = np.concatenate([self.images(batch) for batch in batches]).tolist()
        return image_loader(
            self.source, self.transform, batch_size=self.batch_size, num_workers=self.num_workers, indices=indices
        )


@dataclass(frozen=True)
class _Part:
    """What one rank has to tell the others in one round."""

    batch: int | None = None
    """None: it has no batch left."""
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    unreadable: Mapping[int, str] = field(default_factory=dict)
    failure: str | None = None


def _complete(
    store: MemoryFeatures | CachedFeatures,
    encoder: nn.Module,
    grid: _Grid,
    device: torch.device,
    progress: Callable[[int], object],
    group: dist.ProcessGroup | None,
) -> None:
    """Fills the store of every rank: with the batches that rank 0 has, then, a round at a time, with the others."""
    rank, size = world(group)
    finished = _hand_out(store, group)
    done = sum(len(grid.images(batch)) for batch in finished)
    if done:
        progress(done)
    missing = [batch for batch in range(len(grid.starts)) if batch not in finished]
    mine = missing[rank::size]
    images = iter(grid.loader(mine))
    failure: str | None = None
    for first in range(0, len(missing), size):
        turn = first // size
        part = _Part(failure=failure)
        if failure is None and turn < len(mine):
            try:
                part = _compute(encoder, next(images), mine[turn], device, grid.strict)
            except InputError as error:
                part = _Part(failure=str(error))
        # One after the other, so that a disk or an encoder at fault is told to all before any waits in vain.
        for told in _exchange(part, group):
            if told.batch is None:
                continue
            try:
                store.write(told.batch, told.rows.numpy(), told.unreadable)
            except InputError as error:
                failure = failure or str(error)
            done += len(grid.images(told.batch))
        progress(done)
    _require_success(failure, group)


def _compute(encoder: nn.Module, batch: Mapping[str, Any], number: int, device: torch.device, strict: bool) -> _Part:
    unreadable = dict(batch.get("unreadable", ()))
    if unreadable and strict:
        raise InputError(next(iter(unreadable.values())))
    if not len(batch["image"]):
        return _Part(number, unreadable=unreadable)
    rows = checked_features(encoder(batch["image"].to(device, non_blocking=True)), batch["index"])
    return _Part(number, rows, unreadable)


def _hand_out(store: MemoryFeatures | CachedFeatures, group: dist.ProcessGroup | None) -> list[int]:
    """Numbers of the batches that rank 0 has on record; every other rank is given them."""
    rank, size = world(group)
    if size == 1:
        return sorted(store.finished)
    told = [(sorted(store.finished.items()), store.matrix().shape[1])]
    dist.broadcast_object_list(told, group=group, group_src=0)
    finished, width = told[0]
    device = _device_of(group)
    for batch, record in finished:
        rows = torch.empty(record.rows, width, device=device)
        if isinstance(store, CachedFeatures):
            rows.copy_(torch.from_numpy(store.rows(batch)))
        if record.rows:
            dist.broadcast(rows, group=group, group_src=0)
        if rank:
            store.write(batch, rows.cpu().numpy(), record.unreadable)
    return [batch for batch, _ in finished]


def _exchange(part: _Part, group: dist.ProcessGroup | None) -> list[_Part]:
    """The parts of all ranks. Raises InputError on every rank where one has failed."""
    size = world(group).size
    if size == 1:
        if part.failure is not None:
            raise InputError(part.failure)
        return [part]
    headers: list[Any] = [None] * size
    dist.all_gather_object(
        headers, (part.batch, tuple(part.rows.shape), dict(part.unreadable), part.failure), group=group
    )
    for *_, failure in headers:
        if failure is not None:
            raise InputError(failure)
    tallest, widest = (max(shape[axis] for _, shape, _, _ in headers) for axis in (0, 1))
    padded = torch.zeros(tallest, widest)
    padded[: part.rows.shape[0], : part.rows.shape[1]] = part.rows
    gathered = all_gather(padded.to(_device_of(group)), group).cpu().view(size, tallest, widest)
    return [
        _Part(batch, rows[: shape[0], : shape[1]], unreadable)
        for rows, (batch, shape, unreadable, _) in zip(gathered, headers, strict=True)
    ]


def _require_success(failure: str | None, group: dist.ProcessGroup | None) -> None:
    """Raises InputError on every rank when one of them has failed, so that none is left waiting."""
    failures: list[str | None] = [failure]
    if world(group).size > 1:
        failures = [None] * world(group).size
        dist.all_gather_object(failures, failure, group=group)
    for message in failures:
        if message is not None:
            raise InputError(message)


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    nccl = "nccl" in str(dist.get_backend(group))
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _response(
    encoder: nn.Module, source: Source, transform: Transform, chosen: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Features of a few images from first to last; of none where none of these can be read."""
    few = np.unique(chosen[np.linspace(0, len(chosen) - 1, _PROBED_IMAGES).astype(int)]).tolist()
    batch = next(iter(image_loader(source, transform, batch_size=len(few), indices=few)))
    return _compute(encoder, batch, 0, device, strict=False).rows.clone()


def _try_again(store: CachedFeatures, source: Source, transform: Transform) -> None:
    """Forgets the batches with an image that can be read by now: a disk may have been away for a moment."""
    images = ImageDataset(source, transform)
    for batch, record in list(store.finished.items()):
        if any("unreadable" not in images[index] for index in record.unreadable):
            del store.finished[batch]
