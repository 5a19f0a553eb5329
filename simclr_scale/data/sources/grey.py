"""From an encoded file to one channel of 8 or 16 bits."""

from typing import BinaryIO

import numpy as np
from PIL import Image

from simclr_scale.data.sources.decoding import decode_rgb, opened, to_rgb, upright

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
        InputError: the image is missing, damaged, larger than `MAX_PIXELS` or of a kind that has no grey form.
    """
    with opened(file, where) as image:
        return to_grey(image)


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
