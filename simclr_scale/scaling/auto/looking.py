"""What the images of a source are like, from a fixed sample of them."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_scale.data.pixels import channels_of, is_deep, size_of
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.subsets import take_subset
from simclr_scale.errors import InputError

_LOOKED_AT = 64


@dataclass(frozen=True)
class Look:
    """Of the training images.

    Attributes:
        images: how many there are.
        looked_at: how many of them were read.
        channels: 1 where every one is grey, though the files may hold three equal channels.
        arrays: whether they are arrays rather than pictures.
        median_side, smallest_side: of the shorter side, in pixels.
    """

    images: int
    looked_at: int
    channels: int
    arrays: bool
    median_side: int
    smallest_side: int

    def __str__(self) -> str:
        kind = {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} channels")
        return (
            f"{self.images:,} training images, {kind}, shorter side {self.median_side} px "
            f"(median of {self.looked_at} looked at, the smallest {self.smallest_side})"
        )


def look_at(spec: str, *, subset: Any = None, seed: int = 0, arrays: bool = False, **options: Any) -> Look:
    """Reads up to 64 images, evenly spaced.

    Args:
        spec: as ``data.source``.
        subset: as ``data.subset``.
        arrays: whether arrays come before pictures.
        options: further arguments of ``open_source``.

    Raises:
        InputError: the source cannot be opened, or none of these images can be read.
    """
    source = take_subset(open_source(spec, seed=seed, arrays=arrays, **options), subset, seed)
    images = list(_readable(source))
    sides = [min(size_of(image)) for image in images]
    pictures = isinstance(images[0], Image.Image)
    channels = channels_of(source)
    if pictures and channels == 3 and _all_grey(images):
        channels = 1
    return Look(
        images=len(source),
        looked_at=len(images),
        channels=channels,
        arrays=not pictures,
        median_side=round(statistics.median(sides)),
        smallest_side=min(sides),
    )


def _readable(source: Source) -> Iterator[Image.Image | Tensor]:
    problem = None
    count = 0
    for index in np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).round().astype(int):
        try:
            image = source.image(int(index))
        except InputError as error:
            problem = problem or error
            continue
        count += 1
        yield image
    if not count:
        raise problem or InputError(f"{source.name}: holds no image")


def _all_grey(images: list[Any]) -> bool:
    return all(is_deep(image) or _is_grey(np.asarray(image)) for image in images)


def _is_grey(pixels: np.ndarray) -> bool:
    return pixels.ndim == 2 or bool((pixels[..., :1] == pixels).all())
