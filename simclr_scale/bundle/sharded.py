"""Checkpoints in torch's distributed format, a folder of shards, read without running code that may be in them.

Torch's own reader unpickles the folder's ``.metadata`` and all values that are no tensors as they come. Here the first
goes through an unpickler that knows the classes of that format and nothing else, the others through
``weights_only=True``.
"""

import io
import math
import pathlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from simclr_scale.errors import InputError

SHARDS_METADATA = ".metadata"
FACTS = "meta.pt"  # Lightning's name for all but weights and optimizer states
_SHARD = ".distcp"

_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where the checkpoint was written, by the names of several versions of Python; nothing is opened by it.
    **{
        (module, kind): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "PurePosixPath")
    },
    **{("torch", str(kind).partition(".")[2]): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
}
_DAMAGED = (ArithmeticError, AttributeError, EOFError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


class ShardReader(dcp.FileSystemReader):
    """Reads the shards of a folder, once its metadata is found to be of this format and about these files.

    Raises:
        InputError: when the metadata is read and is damaged, holds anything else, or points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        read = read_metadata(self.folder)
        if read.storage_meta is None:
            read.storage_meta = metadata.StorageMeta()
        read.storage_meta.load_id = self.load_id
        return read


class ValuesPlanner(DefaultLoadPlanner):
    """Torch's planner, for which what is no tensor is a plain value."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for more than plain values, which the next line would run
        value.seek(0)
        super().load_bytes(read_item, value)


def read_metadata(folder: Path) -> metadata.Metadata:
    """What the shards of a folder hold.

    Raises:
        InputError: it is damaged, holds more than that, or points to anything but the shards of this folder.
    """
    file = folder / SHARDS_METADATA
    try:
        with open(file, "rb") as stream:
            read = _MetadataUnpickler(stream).load()
        problem = _problem(read, folder)
    except (OSError, pickle.UnpicklingError, *_DAMAGED) as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise InputError(f"{file} is damaged, or holds more than the layout of tensors: {problem.splitlines()[0]}")
    return read


def _problem(read: Any, folder: Path) -> str:
    """What is wrong with unpickled metadata, in words."""
    if not isinstance(read, metadata.Metadata):
        return f"it is a {type(read).__name__}"
    wanted = 0
    for key, entry in read.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            wanted += math.prod(entry.size) * entry.properties.dtype.itemsize
        elif not isinstance(entry, metadata.BytesStorageMetadata):
            return f"{key!r} is neither tensor nor value"
    there = 0
    for name in {info.relative_path for info in read.storage_data.values()}:
        file = folder / name
        if pathlib.PurePath(name).name != name or not name.endswith(_SHARD) or file.is_symlink():
            return f"it points to {name!r}"
        there += file.stat().st_size
    if any(info.transform_descriptors for info in read.storage_data.values()):
        return "its shards are transformed"
    # Each tensor is allocated before it is read.
    return f"its tensors have {wanted:,} bytes, its files {there:,}" if wanted > there else ""


def read_facts(folder: Path) -> dict[str, Any]:
    """All of a checkpoint but weights and optimizer states. Raises InputError for a damaged or foreign file."""
    file = folder / FACTS
    try:
        facts = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, *_DAMAGED) as error:
        raise InputError(f"{file} is missing or truncated, or holds more than tensors and plain values") from error
    if not isinstance(facts, dict):
        raise InputError(f"{file} holds no entries")
    return facts


def load_shards(state: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fills the tensors of a nested state dict, sharded ones with this rank's part, and replaces its plain values.

    Args:
        state: of any layout: the ranks and the mesh need not be those that wrote it.
        alone: this process reads by itself; else all ranks call this together.

    Raises:
        InputError: a file is missing or damaged, or a key of the state is not among those that were written.
    """
    try:
        with warnings.catch_warnings():
            # That one process reads by itself, which was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(state, storage_reader=ShardReader(folder), planner=ValuesPlanner(), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(f"the shards in {folder} cannot be read: {str(cause).splitlines()[0]}") from error


def read_whole(folder: Path) -> Mapping[str, Any]:
    """A sharded checkpoint with whole weights, as one of one file would be, but for the states of optimizers."""
    prefix = "state_dict."
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in read_metadata(folder).state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
    }
    load_shards(tensors, folder, alone=True)
    return read_facts(folder) | {"state_dict": {key.removeprefix(prefix): value for key, value in tensors.items()}}
