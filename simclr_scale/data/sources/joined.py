"""Several parts of one data set as one source."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_scale.data.pixels import channels_of
from simclr_scale.data.sources.base import Source, digest, encoded_image, file_name, targets_of
from simclr_scale.errors import InputError


class JoinedSource:
    """The images of `parts`, one part after the other, as a source of its own.

    Raises:
        InputError: there is no part, or they differ in classes or channels.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        if not parts:
            raise InputError("there are no parts to join")
        first = parts[0]
        if any(part.classes != first.classes or channels_of(part) != channels_of(first) for part in parts):
            raise InputError(f"{first.name}: its parts differ in classes or channels, so they are no one data set")
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.name = first.name
        self.classes = first.classes
        self.channels = channels_of(first)
        self.labels = np.concatenate([part.labels for part in parts])
        targets = [part_targets for part in parts if (part_targets := targets_of(part)) is not None]
        if targets and len(targets) < len(parts):
            raise InputError(f"{first.name}: some of its parts have several labels an image and some have not")
        self.targets = np.concatenate(targets) if targets else None
        self.split_description = " and ".join(part.split_description for part in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def image(self, index: int) -> Image.Image | Tensor:
        part, place = self._find(index)
        return part.image(place)

    def fingerprint(self) -> str:
        return digest([part.fingerprint().encode() for part in self._parts])

    def describe(self, index: int) -> str:
        part, place = self._find(index)
        return part.describe(place)

    def encoded(self, index: int) -> bytes | None:
        return encoded_image(*self._find(index))

    def file_name(self, index: int) -> str:
        return file_name(*self._find(index))

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], int(index) - (int(self._ends[number - 1]) if number else 0)
