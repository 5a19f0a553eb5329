"""What a reader of an archive finds in its lists, and how it reads them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simclr_scale.data.sources.base import NotOnDisk, digest
from simclr_scale.data.sources.folders import FolderSource
from simclr_scale.errors import InputError


@dataclass(frozen=True)
class Listing:
    """One split of a data set, as its lists have it: (file, class) each."""

    images: Sequence[tuple[str, int]]
    """The path below the data set's folder, with slashes, and the index of the class; -1 of several labels an image."""
    classes: Sequence[str]
    targets: np.ndarray | None = None
    """(N, C) int8 of several labels an image: 1 where it has the class, 0 where not, -1 where that is unsaid."""
    whole: bool = False
    """The archive has no test split: this is the whole data set, still to be divided."""
    may_lack_images: bool = False
    """The archive is of addresses, some of which have died since; images that are not there are left out."""


class MultiLabelSource(FolderSource):
    """Image files with several labels each: `targets` as `Listing` has them, and every one of `labels` -1."""

    targets: np.ndarray

    def fingerprint(self) -> str:
        """Over the files, as of any folder, and their targets."""
        names = "\0".join(self.classes).encode()
        return digest([super().fingerprint().encode(), self.targets.astype("<i1").tobytes(), names])


def to_source(name: str, folder: str, listing: Listing, split: str, channels: int) -> FolderSource:
    """The images of a listing that lie on disk, each once, in the order of their paths.

    Raises:
        InputError: the listing is empty, gives an image two classes, or names a class that there is not.
        NotOnDisk: images are missing, and the archive should hold them all.
    """
    order = sorted(range(len(listing.images)), key=lambda index: listing.images[index][0])
    files = [listing.images[index][0] for index in order]
    labels = np.array([listing.images[index][1] for index in order], dtype=np.int64)
    if not files:
        raise InputError(f"{name}: the list of its {split} images in {folder} is empty")
    description = f"{split} split"
    again = [index for index in range(1, len(files)) if files[index] == files[index - 1]]
    for index in again:
        if labels[index] != labels[index - 1]:
            raise InputError(f"{name}: {files[index]} is in the list of its {split} images with two classes")
    if again:
        repeated = set(again)
        description += f", {len(again):,} of its entries being repetitions of an image"
        files = [file for index, file in enumerate(files) if index not in repeated]
        labels = np.delete(labels, again)
        order = [place for index, place in enumerate(order) if index not in repeated]
    if labels.min() < -1 or labels.max() >= len(listing.classes):
        bad = int(np.flatnonzero((labels < -1) | (labels >= len(listing.classes)))[0])
        raise InputError(f"{name}: {files[bad]} is of class {labels[bad] + 1}, and there are {len(listing.classes)}")
    there = np.array([os.path.isfile(os.path.join(folder, file)) for file in files])
    if not there.all():
        missing = f"{int((~there).sum()):,} of the {len(files):,} {split} images"
        if not listing.may_lack_images or not there.any():
            raise NotOnDisk(f"{name}: {missing} are not in {folder}, the first is {files[int(there.argmin())]}")
        description += f", without {missing} that are not on disk"
    kept = np.flatnonzero(there)
    files, labels = [files[index] for index in kept], labels[kept]
    if listing.targets is None:
        return FolderSource(name, folder, files, labels, tuple(listing.classes), description, channels)
    source = MultiLabelSource(name, folder, files, labels, tuple(listing.classes), description, channels)
    source.targets = listing.targets[order][kept].astype(np.int8)
    return source


def lines_of(folder: str, file: str) -> list[str]:
    """The lines of a list that are not empty, stripped.

    Raises:
        NotOnDisk: there is no such file.
        InputError: it cannot be read as text.
    """
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8") as text:
            return [line.strip() for line in text if line.strip()]
    except FileNotFoundError as error:
        raise NotOnDisk(f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a list ({error})") from error


def fields_of(folder: str, file: str, count: int, separator: str | None = None) -> list[list[str]]:
    """The lines of a list, each cut at `separator` (white space) into `count` fields; the last takes what remains.

    Raises:
        InputError: as `lines_of`, and a line has fewer fields.
    """
    rows = [line.split(separator, count - 1) for line in lines_of(folder, file)]
    for number, row in enumerate(rows, 1):
        if len(row) < count:
            raise InputError(f"{os.path.join(folder, file)}: entry {number} has {len(row)} fields, wanted {count}")
    return rows


def number_of(text: str, folder: str, file: str) -> int:
    """A whole number of a list. Raises InputError where it is none."""
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{os.path.join(folder, file)}: {text!r}, wanted a whole number") from error


def index_of(name: str, classes: Sequence[str], folder: str, file: str) -> int:
    """Where a list's class is among `classes`. Raises InputError where it is not."""
    try:
        return classes.index(name)
    except ValueError as error:
        raise InputError(f"{os.path.join(folder, file)}: there is no class {name!r}") from error
