"""From an encoded file to 8-bit RGB pixels."""

import re
import struct
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image

from simclr_scale.errors import InputError

# What Pillow raises on damaged files of the common formats, found by corrupting bytes at random.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_ORIENTATION = 0x0112
# How to turn an image upright, by EXIF orientation (CIPA DC-008, tag 274).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_rgb(file: str | BinaryIO, where: str) -> Image.Image:
    """Decode a path or an open binary file by `to_rgb`.

    Args:
        file: the encoded image.
        where: its name in the error message.

    Raises:
        InputError: the image is missing, damaged or of a kind that has no 8-bit RGB form.
    """
    try:
        with warnings.catch_warnings():
            # Photos with damaged metadata are common (ImageNet has them) and their pixels are sound.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(file) as image:
                return to_rgb(image)
    except UNREADABLE as error:
        raise InputError(f"{where}: not a readable image ({reason_of(error)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and as 8-bit RGB.

    Grey is repeated over the channels. 16-bit grey (also in Pillow's 32-bit mode `I`, where values beyond 16 bits are
    clipped) is scaled by 1/257. Transparent pixels are laid on white, the page such images are drawn for. CMYK and
    other colour spaces go by Pillow's conversion without colour profile. Of an animation this is the first frame.

    Raises:
        ValueError: floating-point pixels, which have no fixed range, or a colour space that Pillow cannot convert.
    """
    image = upright(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The image, loaded, turned as its EXIF orientation says."""
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    # ImageOps.exif_transpose also rewrites the other tags and fails when one of them is damaged.
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except UNREADABLE:
        return 1


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line that is the same each time: without the address of a file in memory."""
    return re.sub(r" <\S+ object at 0x\w+>", "", " ".join(str(error).split())) or type(error).__name__
