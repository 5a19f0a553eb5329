"""Features on disk: computed once for an encoder, a transform and a set of images, found again by what they are of.

A cache is a folder with one sub-folder for each set of features, named by the sha256 of all that its numbers depend on:

- ``facts.json``: what that is, to read;
- ``features.f32``: little-endian float32, (images, D) by rows, memory-mapped when whole. The grid of batches is fixed:
  batch b begins at row b * batch_size, and where images of it cannot be read its last rows are unused;
- ``batches.jsonl``: a line for each finished batch, written after its rows, with a checksum over both;
- ``lock``: held by the process that fills the folder; another that wants the same features waits for it.

So a process can be killed at any moment, and what it had not put on record is computed again: the batch it was at. So
is a batch whose checksum does not fit. Any sub-folder, or all, may be deleted while no evaluation runs.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_scale import __version__
from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.manifest import encoder_fingerprint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
_DECIDE_BITS = ("torch", "torchvision", "timm", "pillow", "numpy")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class FinishedBatch:
    """One batch on record."""

    rows: int
    """Images with features: those that could be read."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """The others, by index in the source, with the reason."""


class MemoryFeatures:
    """Features by batch, in memory: what `CachedFeatures` is on disk."""

    def __init__(self, images: int, batch_size: int) -> None:
        self.finished: dict[int, FinishedBatch] = {}
        self._images = images
        self._batch_size = batch_size
        self._matrix: np.ndarray | None = None

    def write(self, batch: int, features: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Keeps the rows (n, D) of a batch. Raises InputError where D is not that of the batches before."""
        if len(features):
            if self._matrix is None:
                self._matrix = np.empty((self._images, features.shape[1]), np.float32)
            _require_width(features.shape[1], self._matrix.shape[1])
            start = batch * self._batch_size
            self._matrix[start : start + len(features)] = features
        self.finished[batch] = FinishedBatch(len(features), dict(unreadable))

    def matrix(self) -> np.ndarray:
        """(images, D) float32, rows without an image undefined; (images, 0) where no image could be read."""
        return np.empty((self._images, 0), np.float32) if self._matrix is None else self._matrix


class CachedFeatures:
    """Features by batch, in a folder that this process holds the lock of. `open_cache` makes it.

    Attributes:
        finished: the batches on record whose checksum fits.
    """

    def __init__(self, folder: Path, images: int, batch_size: int) -> None:
        self.finished: dict[int, FinishedBatch] = {}
        self._images = images
        self._batch_size = batch_size
        self._width: int | None = None
        self._features = folder / "features.f32"
        self._journal = folder / "batches.jsonl"
        if not self._features.exists():
            self._features.touch()
        self._read_journal()

    def write(self, batch: int, features: np.ndarray, unreadable: Mapping[int, str]) -> None:
        """Puts a batch (n, D) on record. Raises InputError when the disk refuses, or for another D than before."""
        width = features.shape[1] if len(features) else self._width or 0
        rows = np.ascontiguousarray(features, "<f4").tobytes()
        record = {
            "batch": batch,
            "rows": len(features),
            "width": width,
            "unreadable": [[index, unreadable[index]] for index in sorted(unreadable)],
        }
        if len(features):
            _require_width(width, self._width or width)
            self._width = width
        line = json.dumps(record | {"sha256": _checksum(record, rows)}) + "\n"
        try:
            # Not by way of the memory map: a full disk would end the process without a word.
            with open(self._features, "r+b") as file:
                file.seek(4 * width * batch * self._batch_size)
                file.write(rows)
            with open(self._journal, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise _no_writing(self._features.parent, error) from error
        self.finished[batch] = FinishedBatch(len(features), dict(unreadable))

    def rows(self, batch: int) -> np.ndarray:
        """(n, D) float32 of a finished batch."""
        start = batch * self._batch_size
        return self.matrix()[start : start + self.finished[batch].rows]

    def matrix(self) -> np.ndarray:
        """(images, D) float32, rows without an image undefined. A memory map; what is written to it stays in memory."""
        if not self._width:
            return np.empty((self._images, 0), np.float32)
        size = 4 * self._images * self._width
        if os.path.getsize(self._features) < size:
            os.truncate(self._features, size)
        return np.memmap(self._features, "<f4", mode="c", shape=(self._images, self._width))

    def _read_journal(self) -> None:
        lines = self._journal.read_bytes().split(b"\n") if self._journal.exists() else [b""]
        fitting: dict[int, bytes] = {}
        with open(self._features, "rb") as file:
            for line in lines:
                record = _fitting(line, file, self._batch_size, -(-self._images // self._batch_size))
                if record is None or (record["rows"] and record["width"] != (self._width or record["width"])):
                    continue
                if record["rows"]:
                    self._width = record["width"]
                unreadable = {int(index): str(reason) for index, reason in record["unreadable"]}
                self.finished[record["batch"]] = FinishedBatch(record["rows"], unreadable)
                fitting[record["batch"]] = line
        kept = b"".join(line + b"\n" for line in fitting.values())
        if kept != b"\n".join(lines):  # a line cut off, or one whose rows are not what they were
            draft = self._journal.with_suffix(".draft")
            draft.write_bytes(kept)
            os.replace(draft, self._journal)


@contextmanager
def open_cache(
    folder: str | os.PathLike[str], facts: Mapping[str, Any], images: int, batch_size: int
) -> Iterator[CachedFeatures]:
    """The features with these facts, as far as they are in the cache, for this process alone to complete.

    Waits while another process has them open, and says so on standard error.

    Args:
        folder: of the cache; made where it does not exist.
        facts: see `features_facts`.
        images: rows of the matrix.
        batch_size: rows of a batch.

    Raises:
        InputError: the folder cannot be made or written.
    """
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    place = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = open(place / "lock", "ab")  # noqa: SIM115  open as long as it is held
    except OSError as error:
        raise _no_writing(place, error) from error
    with lock:
        _lock(lock.fileno(), place)
        try:
            draft = place / "facts.draft"
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, place / "facts.json")
            cached = CachedFeatures(place, images, batch_size)
        except OSError as error:
            raise _no_writing(place, error) from error
        yield cached


def features_facts(
    encoder: nn.Module,
    transform: object,
    source: Source,
    indices: np.ndarray,
    *,
    batch_size: int,
    device: torch.device,
    response: torch.Tensor,
) -> dict[str, Any]:
    """All that the features of the images at `indices` depend on, to the last bit, as far as it can be known.

    Weights and the printed form do not tell every encoder and transform from every other, nor sizes every file; so
    `response`, the features of a few of the images themselves, counts as well.
    """
    kind = device.type
    return {
        "format": _FORMAT,
        "encoder": encoder_fingerprint(encoder),
        "architecture": _digest(_ADDRESS.sub("", repr(encoder)).encode()),
        "transform": _ADDRESS.sub("", repr(transform)),
        "response": _digest(response.numpy().astype("<f4").tobytes()),
        "data": source.fingerprint(),
        "split": source.split_description,
        "images": len(indices),
        "indices": _digest(indices.astype("<i8").tobytes()),
        "batch_size": batch_size,
        "device": f"cuda, {torch.cuda.get_device_name(device)}" if kind == "cuda" else kind,
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {"simclr-scale": __version__} | {library: _version(library) for library in _DECIDE_BITS},
    }


def _fitting(line: bytes, features: Any, batch_size: int, batches: int) -> dict[str, Any] | None:
    """The record in a line of the journal, where its checksum is that of the rows on disk."""
    try:
        record = json.loads(line)
        checksum = record.pop("sha256")
        batch, rows, width = (int(record[name]) for name in ("batch", "rows", "width"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (0 <= batch < batches and 0 <= rows <= batch_size and width >= 0):
        return None
    features.seek(4 * width * batch * batch_size)
    return record if _checksum(record, features.read(4 * width * rows)) == checksum else None


def _checksum(record: Mapping[str, Any], rows: bytes) -> str:
    digest = hashlib.sha256(json.dumps(record).encode())
    digest.update(rows)
    return digest.hexdigest()


def _lock(descriptor: int, place: Path) -> None:
    """It ends with the process, however that ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        from rich.console import Console

        Console(stderr=True).print(f"waiting for another process that computes these features: {place}", soft_wrap=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _require_width(width: int, before: int) -> None:
    if width != before:
        raise InputError(f"the encoder gives {width} features for one batch and {before} for another")


def _no_writing(place: Path, error: OSError) -> InputError:
    return InputError(f"the cache {place} cannot be written ({error.strerror or error}); name a folder that can")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
