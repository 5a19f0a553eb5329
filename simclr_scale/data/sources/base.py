"""What every data set is to the rest of the package, and its parts."""

import hashlib
import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_scale.data.sources.named_splits import NoSuchPart
from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError

HELD_OUT_TRAIN_FRACTION = 0.8


class NotOnDisk(InputError):
    """A data set, or a part of it, is not where it was looked for."""


class Source(Protocol):
    """Images by index, with labels where they exist. Sources pickle, so that any worker can read them.

    Sources of image files have two more methods, which `encoded_image` and `file_name` call: `encoded(index)`, the file
    as it is stored, and `file_name(index)`, its path within the data set.
    """

    name: str
    """The specification as the user typed it."""
    classes: tuple[str, ...]
    """Names of the classes, those of all splits of the data set; empty without labels."""
    labels: np.ndarray
    """(N,) int64, index into `classes`, -1 where an image has no label."""
    split_description: str
    """Which part of the data set this is, for the manifest."""
    # Sources may also say `channels`, those of their images; without it they are RGB (`simclr_scale.data.pixels`).
    # Those with several labels an image have `targets` (`targets_of`), and every one of `labels` is -1.

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image | Tensor:
        """The image, upright. Raises InputError naming it when it cannot be read.

        A picture is of mode RGB, or of L (8 bits) or I;16 where the source was opened for one channel; an array comes
        as the raw values (C, H, W), uint8 or float32.
        """

    def fingerprint(self) -> str:
        """sha256 in hex over what identifies images and labels; the same on every machine, computed at each call."""

    def describe(self, index: int) -> str:
        """Where the image is, for messages: a path or a row."""


def encoded_image(source: Source, index: int) -> bytes | None:
    """The file as `source` stores it; None where it stores none. Raises InputError naming what cannot be read."""
    read = getattr(source, "encoded", None)
    return None if read is None else read(index)


def file_name(source: Source, index: int) -> str:
    """The image's path within its data set, with slashes, the same on every machine; empty where it has none."""
    find = getattr(source, "file_name", None)
    return "" if find is None else find(index)


def targets_of(source: Source) -> np.ndarray | None:
    """(N, C) int8 of several labels an image, C the number of classes; None where an image has one label or none.

    1 where the image has the class, 0 where not, -1 where that is unsaid: in Pascal VOC the objects are all difficult.
    """
    return getattr(source, "targets", None)


class SubsetSource:
    """The images of `source` at `indices` (in that order, each in 0..N-1), as a source of its own."""

    def __init__(self, source: Source, indices: np.ndarray, split_description: str | None = None) -> None:
        self._source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = source.name
        self.classes = source.classes
        self.channels: int = getattr(source, "channels", 3)
        self.labels = source.labels[self.indices]
        targets = targets_of(source)
        self.targets = None if targets is None else targets[self.indices]
        self.split_description = split_description or f"{self.indices.size} images of {source.split_description}"

    def __len__(self) -> int:
        return self.indices.size

    def image(self, index: int) -> Image.Image | Tensor:
        return self._source.image(int(self.indices[index]))

    def fingerprint(self) -> str:
        return digest([self._source.fingerprint().encode(), self.indices.astype("<i8").tobytes()])

    def describe(self, index: int) -> str:
        return self._source.describe(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        return encoded_image(self._source, int(self.indices[index]))

    def file_name(self, index: int) -> str:
        return file_name(self._source, int(self.indices[index]))


def held_out_part(source: Source, split: str, seed: int) -> Source:
    """The train or test part of a data set that has no test split of its own.

    The labelled images are cut 80/20, class by class, by `seed`. Images without label belong to the train part.

    Raises:
        InputError: there are no labels to hold out by, or a validation part is asked for.
    """
    indices = held_out_indices(source.labels, source.name, split, seed)
    return source if indices is None else SubsetSource(source, indices, held_out_description(source, split, seed))


def held_out_description(source: Source, split: str, seed: int) -> str:
    return f"seeded 80/20 class-balanced split, seed {seed}, {split} part of {source.split_description}"


def held_out_indices(labels: np.ndarray, name: str, split: str, seed: int) -> np.ndarray | None:
    """Which of the images labelled so `held_out_part` takes; None for all of them."""
    labelled = np.flatnonzero(labels >= 0)
    if split == "train" and not labelled.size:
        return None
    if not labelled.size:
        raise InputError(
            f"{name}: has no labels, so there is no {split} part to evaluate on; "
            "labels come from at least two class folders or from a label column"
        )
    if split == "val":
        raise NoSuchPart(f"{name}: has no validation split of its own; train and test can be had")
    train, test = (labelled[part] for part in stratified_split(labels[labelled], HELD_OUT_TRAIN_FRACTION, seed))
    if split == "train":
        return np.union1d(train, np.flatnonzero(labels < 0))
    if not test.size:
        raise InputError(f"{name}: no class has two images, so none can be held out for a test")
    return test


def digest(parts: Iterable[bytes]) -> str:
    """sha256 in hex of the parts, each preceded by its length so that their borders count too."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def label_bytes(labels: np.ndarray, classes: tuple[str, ...]) -> bytes:
    """Labels and class names in one form for all machines, for a fingerprint."""
    return labels.astype("<i8").tobytes() + "\0".join(classes).encode()


def file_size(path: str) -> int:
    """Bytes. Raises InputError if the file has gone."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_file(path: str) -> bytes:
    """The whole file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def sampled_rows(length: int, limit: int = 1024) -> np.ndarray:
    """Row numbers whose content stands for all in a fingerprint: every one, or `limit` evenly spaced."""
    return np.linspace(0, length - 1, min(length, limit)).astype(np.int64)
