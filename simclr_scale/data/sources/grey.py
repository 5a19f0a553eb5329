"""From an encoded file to one channel of 8 or 16 bits."""

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image

from simclr_scale.data.sources.decoding import UNREADABLE, decode_rgb, one_line, to_rgb, upright
from simclr_scale.errors import InputError

PICTURE_CHANNELS = (1, 3)


def decode(file: str | BinaryIO, where: str, channels: int) -> Image.Image:
    """A picture as RGB (`decode_rgb`) or grey (`decode_grey`), by the number of channels."""
    return decode_grey(file, where) if channels == 1 else decode_rgb(file, where)


def decode_grey(file: str | BinaryIO, where: str) -> Image.Image:
    """Decode a path or an open binary file by `to_grey`.

    Args:
        file: the encoded image.
        where: its name in the error message.

    Raises:
        InputError: the image is missing, damaged or of a kind that has no grey form.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(file) as image:
                return to_grey(image)
    except UNREADABLE as error:
        raise InputError(f"{where}: not a readable image ({one_line(error)})") from error


def to_grey(image: Image.Image) -> Image.Image:
    """The image upright, in one channel: mode I;16 where it has more than 8 bits, else mode L.

    16-bit grey keeps its values, those of Pillow's 32-bit mode `I` are clipped to 16 bits. Everything else is the luma
    (ITU-R 601) of what `to_rgb` makes of it.

    Raises:
        ValueError: floating-point pixels, which have no fixed range, or a colour space that Pillow cannot convert.
    """
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(upright(image)).astype(np.int64).clip(0, 65535)
        return Image.fromarray(values.astype(np.uint16))
    if image.mode == "L" and not image.has_transparency_data:
        return upright(image)
    return to_rgb(image).convert("L")
