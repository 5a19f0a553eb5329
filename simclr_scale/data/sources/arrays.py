"""Arrays as images: .npy, MATLAB's .mat, and .tif of any number of bands. They are data: nothing in them is run."""

import os
from collections.abc import Sequence
from tokenize import TokenError
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from simclr_scale.data.sources.decoding import MAX_PIXELS, reason_of
from simclr_scale.data.sources.matlab import choose_image, read_variables
from simclr_scale.errors import InputError

ChannelAxis = Literal[0, -1]

ARRAY_EXTENSIONS = (".npy", ".mat")
TIFF_EXTENSIONS = (".tif", ".tiff")
_DTYPES = ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]
_MAX_VALUES = 4 * MAX_PIXELS
# Shapes of this many files, evenly spaced, tell which axis is that of the channels.
_SAMPLED_FILES = 32
# A picture's usual channels, and a side that no picture in this package is smaller than, where sizes alone must tell.
_FEW, _SIDE = 4, 16


class ArrayReader:
    """Reads the files of one data set, all laid out alike and with the same channels.

    Args:
        channels: of every image.
        channel_axis: of arrays with three axes, 0 or -1; None where there are none.
        key: the variable of a .mat file; None finds it.
    """

    def __init__(self, channels: int, channel_axis: ChannelAxis | None = None, key: str | None = None) -> None:
        self.channels, self.channel_axis, self.key = channels, channel_axis, key

    def image(self, path: str) -> Tensor:
        """Raw values (C, H, W): uint8 as they are, any other type as float32.

        Raises:
            InputError: the file cannot be read, is not an image of this data set, or holds NaN or infinity.
        """
        values = read_array(path, self.key)
        if values.ndim == 2:
            values = values[None]
        elif self.channel_axis == -1 and not _is_tiff(path):
            values = np.moveaxis(values, -1, 0)
        if len(values) != self.channels:
            raise InputError(f"{path}: has {len(values)} channels, the other images have {self.channels}")
        _require_pixels(path, values.shape[1:])
        return as_tensor(values, path)


def as_tensor(values: np.ndarray, where: str) -> Tensor:
    """A copy as uint8 or float32. Raises InputError at NaN, infinity and what becomes infinite in float32."""
    if values.dtype == np.uint8:
        return torch.from_numpy(np.array(values, order="C"))
    with np.errstate(over="ignore"):
        copy = np.array(values, dtype=np.float32, order="C")
    if values.dtype.kind == "f" and not np.isfinite(copy).all():
        raise InputError(f"{where}: holds NaN or infinity")
    return torch.from_numpy(copy)


def read_array(path: str, key: str | None = None) -> np.ndarray:
    """The values of one file, numbers with 2 or 3 axes; a .tif with its channels first, a .npy mapped, not read.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    if path.lower().endswith(".mat"):
        variable = choose_image(path, key)
        _require_moderate(path, variable.shape)
        values = read_variables(path, [variable.name])[variable.name]
    elif _is_tiff(path):
        from simclr_scale.data.sources.tiff import read_tiff

        values = read_tiff(path)
    else:
        values = map_npy(path)
    _require_moderate(path, values.shape)
    if values.dtype.str[1:] not in _DTYPES:
        raise InputError(
            f"{path}: values of type {values.dtype}; an image is of uint8, uint16, int16, float32 or alike"
        )
    return values


def map_npy(path: str) -> np.ndarray:
    """A .npy file, mapped into memory. A pickle in it, or in its place, is refused without being looked into."""
    try:
        # Not np.load, which by content would also open an archive under this name.
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, TokenError) as error:
        raise InputError(f"{path}: not a readable .npy array ({reason_of(error)})") from error


def find_reader(
    name: str, paths: Sequence[str], channel_axis: ChannelAxis | None = None, key: str | None = None
) -> ArrayReader:
    """The reader of a data set, by the shapes of some of its files.

    Args:
        name: the data set, for messages.
        paths: all its files.
        channel_axis: what the user says of arrays with three axes; None finds it (`find_channel_axis`).
        key: the variable of .mat files; None finds it.

    Raises:
        InputError: none of the files can be read, they differ in channels, or the axis must be told.
    """
    sampled = [paths[row] for row in np.unique(np.linspace(0, len(paths) - 1, _SAMPLED_FILES).astype(int))]
    shapes: dict[str, tuple[int, ...]] = {}
    problem: InputError | None = None
    for path in sampled:
        try:
            shapes[path] = read_array(path, key).shape
        except InputError as error:
            problem = problem or error
    if not shapes and problem is not None:
        raise problem
    to_find = [shape for path, shape in shapes.items() if len(shape) == 3 and not _is_tiff(path)]
    if to_find and channel_axis is None:
        channel_axis = find_channel_axis(name, to_find)

    def channels(path: str) -> int:
        shape = shapes[path]
        return 1 if len(shape) == 2 else shape[0] if _is_tiff(path) else shape[channel_axis or 0]

    first = next(iter(shapes))
    for path in shapes:
        if channels(path) != channels(first):
            raise InputError(
                f"{name}: {os.path.basename(first)} has {channels(first)} channels and {os.path.basename(path)} "
                f"has {channels(path)}; all images need the same"
            )
    return ArrayReader(channels(first), channel_axis, key)


def find_channel_axis(name: str, shapes: Sequence[tuple[int, ...]]) -> ChannelAxis:
    """Whether arrays of these shapes are (C, H, W) or (H, W, C).

    What speaks for an axis: the other two are equal, as in a square image; it is at most 4 long where the others are
    more than 16; or, should no file say so, it is of one length in all files where the axis at the other end is not.
    Never that it is the shortest: in a patch of 9 x 9 pixels and 198 bands it is not.

    Raises:
        InputError: nothing speaks for either, or something for both.
    """
    votes: set[ChannelAxis] = set()
    for first, middle, last in shapes:
        if (first == middle) != (middle == last):
            votes.add(-1 if first == middle else 0)
        if last <= _FEW and min(first, middle) > _SIDE:
            votes.add(-1)
        if first <= _FEW and min(middle, last) > _SIDE:
            votes.add(0)
    constant = [len({shape[axis] for shape in shapes}) == 1 for axis in (0, -1)]
    if not votes and constant[0] != constant[1]:
        votes.add(0 if constant[0] else -1)
    if len(votes) != 1:
        raise InputError(
            f"{name}: arrays of shape {shapes[0]} may have their channels first or last; "
            "say which by data.channel_axis, 0 or -1"
        )
    return votes.pop()


def _is_tiff(path: str) -> bool:
    return path.lower().endswith(TIFF_EXTENSIONS)


def _require_moderate(path: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(f"{path}: an array of shape {shape}; an image is (H, W), (H, W, C) or (C, H, W)")
    if int(np.prod(shape, dtype=np.int64)) > _MAX_VALUES:
        raise InputError(f"{path}: an array of shape {shape} is larger than any image may be ({_MAX_VALUES:,} values)")


def _require_pixels(path: str, size: tuple[int, ...]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"{path}: {size[0]} x {size[1]} pixels are more than an image may have ({MAX_PIXELS:,})")
