"""One image of a source as a tensor, and another in its place where it cannot be read."""

from collections.abc import Collection, Iterator

import numpy as np
from torch import Tensor

from simclr_scale.data.pixels import ValueRange, channels_of, to_pixels
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources.base import Source, encoded_image
from simclr_scale.data.sources.decoding import decode_tensor
from simclr_scale.errors import InputError

_JPEG = b"\xff\xd8"
_RGB = 3
# So many images at random, none of which can be read: there is no data set here.
_MOST_REPLACEMENTS = 100

Unreadable = tuple[int, str]
"""The index of an image, and the error message about it."""


def read_tensor(source: Source, index: int, value_range: ValueRange | None = None) -> Tensor:
    """The image as (C, H, W): what ``to_pixels`` makes of ``source.image``, but JPEGs decoded sooner.

    Raises:
        InputError: the image cannot be read.
    """
    encoded = encoded_image(source, index) if channels_of(source) == _RGB else None
    if encoded is not None and encoded.startswith(_JPEG):
        return decode_tensor(encoded, source.describe(index))
    return to_pixels(source.image(index), value_range)


def read_or_replace(
    source: Source, seed: int, epoch: int, index: int, value_range: ValueRange | None = None
) -> tuple[Tensor, int, list[Unreadable]]:
    """The image as :func:`read_tensor` gives it, or the first readable one of :func:`replacements`.

    Returns:
        The image (C, H, W), its own index, and those that could not be read.

    Raises:
        InputError: none of very many can be read.
    """
    unreadable: list[Unreadable] = []
    try:
        return read_tensor(source, index, value_range), index, unreadable
    except InputError as error:
        unreadable.append((index, str(error)))
    for other in replacements(seed, epoch, index, len(source)):
        try:
            return read_tensor(source, other, value_range), other, unreadable
        except InputError as error:
            unreadable.append((other, str(error)))
    raise InputError(f"{source.name}: none of {len(unreadable)} images can be read; the first: {unreadable[0][1]}")


def replacements(seed: int, epoch: int, index: int, num_images: int) -> Iterator[int]:
    """Which images take the place of one that cannot be read, in this order: a function of the arguments alone.

    They are drawn uniformly from all others, so that every rank, worker and restart sees the same one.
    """
    if num_images < 2:
        return
    raw = generator(Purpose.REPLACEMENT, seed, epoch, index).bit_generator.random_raw(_MOST_REPLACEMENTS)
    for steps in raw % np.uint64(num_images - 1):
        yield (index + 1 + int(steps)) % num_images


def readable_instead(unreadable: Collection[int], seed: int, epoch: int, index: int, num_images: int) -> int:
    """``index``, or the image that :func:`read_or_replace` shows in its place, where it is known which are readable."""
    others = replacements(seed, epoch, index, num_images)
    shown = next((other for other in (index, *others) if other not in unreadable), None)
    if shown is None:
        raise InputError(f"hardly any of the {num_images:,} images can be read: {len(unreadable):,} cannot")
    return shown


def first_readable(source: Source, value_range: ValueRange | None = None) -> Tensor:
    """The first image that can be read, for what all images are taken to have in common.

    Raises:
        InputError: none of the first very many can.
    """
    first_error: InputError | None = None
    for index in range(min(len(source), _MOST_REPLACEMENTS)):
        try:
            return read_tensor(source, index, value_range)
        except InputError as error:
            first_error = first_error or error
    raise InputError(f"{source.name}: none of the first images can be read; the first: {first_error}")
