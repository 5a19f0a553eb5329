"""Small data sets in memory: decoded once, cropped in batches on the device."""

from typing import Protocol

import torch
from torch import Tensor

from simclr_scale.data.pixels import ValueRange
from simclr_scale.data.reading import first_readable, read_tensor
from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError

_LARGEST_SIDE = 96
_LARGEST_BYTES = 2 << 30


class PixelTable(Protocol):
    """All images of a source: a tensor (N, C, H, W), uint8 or float32 in [0, 255], or what is indexed like one."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """(B, C, H, W) of the images at (B,) indices."""


def load_pixels(
    source: Source,
    wanted: bool | None = None,
    unreadable: dict[int, str] | None = None,
    value_range: ValueRange | None = None,
) -> PixelTable | None:
    """All images as (N, C, H, W), or None where they are too large or not of one size.

    Args:
        wanted: True loads images of any one size, False none, None only small ones.
        unreadable: is told of images that cannot be read, by index and with the reason; they are black in the result.
            None: the first of them is an error.
        value_range: of images deeper than 8 bits, see ``to_pixels``.

    Raises:
        InputError: ``wanted`` is True and the images are of several sizes; or an image cannot be read.
    """
    if wanted is False:
        return None
    if hasattr(source, "windows"):
        return source.windows(value_range)
    pixels = getattr(source, "pixels", None)
    if pixels is not None:
        return pixels
    first = first_readable(source, value_range)
    if not wanted and (max(first.shape[-2:]) > _LARGEST_SIDE or first.nbytes * len(source) > _LARGEST_BYTES):
        return None
    pixels = torch.empty((len(source), *first.shape), dtype=first.dtype)
    found: dict[int, str] = {}
    for index in range(len(source)):
        try:
            image = read_tensor(source, index, value_range)
        except InputError as error:
            if unreadable is None:
                raise
            found[index] = str(error)
            pixels[index] = 0
            continue
        if image.shape != first.shape or image.dtype != first.dtype:
            if wanted:
                raise InputError(
                    f"data.in_memory needs images of one size: {source.describe(0)} is {_size(first)} and "
                    f"{source.describe(index)} is {_size(image)}; leave it out"
                )
            return None
        pixels[index] = image
    if unreadable is not None:
        unreadable.update(found)
    return pixels


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}" + (" of 16 bits" if image.is_floating_point() else "")
