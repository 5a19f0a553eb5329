"""The packed format that ``simclr-scale prepare`` writes: shards of small images, their index and their checksums.

A folder in this format holds

- ``SPLIT-NNNNNN.tar``: WebDataset shards; a sample is ``POSITION.jpg`` (or ``.png``, ``.webp``) and, where the image
  has a label, ``POSITION.cls``, its class as a number. POSITION is the image's number in its split of the source.
- ``index.json``: ``format`` and ``version``; ``source``, as typed; ``settings``; ``classes``, their names; ``splits``:
  of each its ``images`` in the source, the ``description`` and ``fingerprint`` of what was packed, and ``unreadable``,
  the images that are missing (position, label, name, place, reason); ``shards``: of each its ``name``, ``split``,
  number of ``images``, ``bytes`` and ``sha256``, in order; ``images_sha256``, the checksum of the next file.
- ``images.npz``: NumPy arrays with an entry for each image, in the order of the shards: ``offsets`` and ``sizes``
  (int64, the image's bytes within its shard), ``labels`` (int64, -1 for none), ``positions`` (int64), and the names in
  the source: ``names`` (uint8, UTF-8, one after another) and ``name_ends`` (int64).
- ``bad_files.txt``, where images were unreadable: a line each, its place and the reason.

The only split of a data set that has none is called ``all``, and is divided when it is opened, as the source would be.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from simclr_scale.data.sources.array_files import ArrayFileError, read_arrays
from simclr_scale.data.sources.base import Source, SubsetSource, digest, held_out_description, held_out_indices
from simclr_scale.data.sources.named_splits import SplitRequest
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.data.sources.shards import ShardSource
from simclr_scale.data.sources.tar_index import images_fit
from simclr_scale.errors import InputError

FORMAT = "simclr_scale packed images"
VERSION = 1
INDEX = "index.json"
IMAGES = "images.npz"
BAD_FILES = "bad_files.txt"
UNFINISHED = ".unfinished"
ALL = "all"


@dataclass
class Index:
    """What the two index files of a packed folder hold."""

    folder: str
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.facts["shards"]

    def rows(self, shard: int) -> slice:
        """Which entries of the arrays are those of a shard."""
        counts = [entry["images"] for entry in self.shards[: shard + 1]]
        return slice(sum(counts[:-1]), sum(counts))

    def path(self, shard: int) -> str:
        return os.path.join(self.folder, self.shards[shard]["name"])


def is_packed(folder: str) -> bool:
    """Whether the folder is in the packed format. Raises InputError where it is not finished."""
    if os.path.isfile(os.path.join(folder, INDEX)):
        try:
            with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
                return FORMAT in file.read(4096)
        except (OSError, ValueError):
            return False
    if os.path.isfile(os.path.join(folder, UNFINISHED, "plan.json")):
        raise InputError(f"{folder}: simclr-scale prepare has not finished it; the same command goes on with it")
    return False


def read_index(folder: str, *, whole: bool = True) -> Index:
    """The index, checked against itself and, by `whole`, the sizes of the shards; their content is not read.

    Raises:
        InputError: it is damaged or of another version, or a shard is missing or of another size.
    """
    path = os.path.join(folder, INDEX)
    try:
        with open(path, encoding="utf-8") as file:
            facts = json.load(file)
        if facts["format"] != FORMAT or facts["version"] != VERSION:
            raise InputError(f"{path}: version {facts['version']} of the packed format; this package reads {VERSION}")
        images = os.path.join(folder, IMAGES)
        if file_sha256(images) != facts["images_sha256"]:
            raise InputError(f"{images}: damaged; its checksum is not that of {INDEX}")
        index = Index(folder, facts, read_arrays(images))
        _check(index, whole)
    except (OSError, ArrayFileError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged, or not an index of simclr-scale prepare ({error})") from error
    return index


def _check(index: Index, whole: bool) -> None:
    """Raises InputError or KeyError, TypeError, ValueError where the parts of the index do not fit together."""
    arrays, classes = index.arrays, index.facts["classes"]
    counts = [entry["images"] for entry in index.shards]
    if min(counts, default=0) < 0 or not isinstance(index.facts["settings"]["size"], int):
        raise ValueError("a negative number of images, or no size")
    for name, split in index.facts["splits"].items():
        missing = [(int(entry["position"]), int(entry["label"])) for entry in split["unreadable"]]
        if not name.isalpha() or not isinstance(split["description"], str) or min(missing, default=(0, 0))[0] < 0:
            raise ValueError(f"split {name!r} is not described")
    count = sum(counts)
    names = PackedNames.from_arrays(arrays["names"], arrays["name_ends"])
    for key in ("offsets", "sizes", "labels", "positions"):
        if arrays[key].shape != (count,) or arrays[key].dtype != np.int64:
            raise ValueError(f"{key} is not one number for each of {count} images")
    labels = arrays["labels"]
    if len(names) != count or labels.max(initial=-1) >= len(classes) or labels.min(initial=-1) < -1:
        raise ValueError("names or labels do not fit the images")
    start = 0
    for number, entry in enumerate(index.shards):
        path = index.path(number)
        if os.path.basename(entry["name"]) != entry["name"] or entry["split"] not in index.facts["splits"]:
            raise ValueError(f"shard {entry['name']!r} has no place in it")
        if whole and not os.path.isfile(path):
            raise InputError(f"{path}: missing, although {INDEX} lists it")
        if whole and os.path.getsize(path) != entry["bytes"]:
            raise InputError(f"{path}: damaged; {os.path.getsize(path)} bytes, {INDEX} says {entry['bytes']}")
        rows = slice(start, start + entry["images"])
        offsets, sizes = arrays["offsets"][rows], arrays["sizes"][rows]
        if not images_fit(offsets, sizes, entry["bytes"]):
            raise ValueError(f"images lie beyond the end of shard {entry['name']!r}")
        start = rows.stop


def damaged_shards(index: Index) -> list[str]:
    """Paths of the shards whose content has another checksum. Reads all of them."""
    entries = enumerate(index.shards)
    return [index.path(number) for number, entry in entries if file_sha256(index.path(number)) != entry["sha256"]]


class PackedSource(ShardSource):
    """Images of a packed folder. `open_packed` makes them."""

    checksums: tuple[str, ...]

    def fingerprint(self) -> str:
        """Over the checksums of the shards, and names and classes of the images."""
        return digest([super().fingerprint().encode(), *(checksum.encode() for checksum in self.checksums)])

    def describe(self, index: int) -> str:
        return f"{self._reader.paths[self._shards[index]]}, image {self.file_name(index) or index}"


def open_packed(name: str, folder: str, request: SplitRequest, seed: int, channels: int = 3) -> Source:
    """One part of a packed folder, its images decoded to RGB, or for one channel to grey.

    A data set without splits of its own is cut as its source would be with this seed, although unreadable images are
    missing.

    Raises:
        InputError: the folder is damaged, or has not the split asked for.
    """
    index = read_index(folder)
    splits = list(index.facts["splits"])
    if splits == [ALL]:
        if request.named:
            raise InputError(f"{name}: its source had no splits: leave out train_split and test_split")
        return _divided(_source(name, index, ALL, channels), index, request.part, seed)
    return _source(name, index, request.choose(splits, name).name, channels)


def _source(name: str, index: Index, split: str, channels: int) -> PackedSource:
    numbers = [number for number, entry in enumerate(index.shards) if entry["split"] == split]
    counts = [index.shards[number]["images"] for number in numbers]
    of_image = np.repeat([entry["split"] == split for entry in index.shards], [e["images"] for e in index.shards])
    rows = np.flatnonzero(of_image)
    names = PackedNames.from_arrays(index.arrays["names"], index.arrays["name_ends"])
    side = index.facts["settings"]["size"]
    source = PackedSource(
        name,
        [index.path(number) for number in numbers],
        np.repeat(np.arange(len(numbers)), counts),
        index.arrays["offsets"][rows],
        index.arrays["sizes"][rows],
        names if rows.size == len(names) else PackedNames(names[int(row)] for row in rows),
        index.arrays["labels"][rows],
        tuple(index.facts["classes"]),
        f"{index.facts['splits'][split]['description']}, packed at {side} px",
        1 if channels == 1 else 3,
    )
    source.checksums = tuple(index.shards[number]["sha256"] for number in numbers)
    return source


def _divided(source: PackedSource, index: Index, part: str, seed: int) -> Source:
    unreadable = index.facts["splits"][ALL]["unreadable"]
    positions = index.arrays["positions"]
    every = np.concatenate([positions, np.array([entry["position"] for entry in unreadable], dtype=np.int64)])
    if not np.array_equal(np.sort(every), np.arange(every.size)):
        raise InputError(f"{os.path.join(index.folder, INDEX)}: damaged; positions are not 0 to {every.size - 1}")
    labels = np.full(positions.size + len(unreadable), -1, dtype=np.int64)
    labels[positions] = source.labels
    for entry in unreadable:
        labels[entry["position"]] = entry["label"]
    kept = held_out_indices(labels, source.name, part, seed)
    if kept is None:
        return source
    return SubsetSource(source, np.flatnonzero(np.isin(positions, kept)), held_out_description(source, part, seed))


def file_sha256(path: str) -> str:
    """In hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
