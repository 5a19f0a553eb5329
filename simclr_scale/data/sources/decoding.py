"""From an encoded file to 8-bit RGB pixels."""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from simclr_scale.errors import InputError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow decodes the same pixels in twice the time
    simplejpeg = None

if TYPE_CHECKING:
    from torch import Tensor

# An image is refused by its header, before its pixels take any memory: at three bytes a pixel, half a gigabyte. It is
# where Pillow's own protection against decompression bombs stands, unless another library has turned that off.
MAX_PIXELS = 178_956_970

# What data sets are made of. Pillow would also hand PostScript to an interpreter, whatever the name of the file.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")

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
        InputError: the image is missing, damaged, larger than `MAX_PIXELS` or of a kind that has no 8-bit RGB form.
    """
    with opened(file, where) as image:
        return to_rgb(image)


def decode_tensor(encoded: bytes, where: str) -> "Tensor":
    """Decode the content of a file to the pixels of `decode_rgb`, faster.

    Pillow reads the header of every file and decodes all but grey and RGB JPEGs, which go to libjpeg-turbo without a
    detour. Pillow uses the same library; should the two be built of different versions, pixels may differ by a step or
    two in 255. What libjpeg-turbo complains of goes to Pillow too, which has the last word on damaged files.

    Args:
        encoded: the content of the file.
        where: its name in the error message.

    Returns:
        (3, H, W) uint8, the channels of a pixel side by side in memory.

    Raises:
        InputError: as `decode_rgb`.
    """
    import torch

    with opened(io.BytesIO(encoded), where) as image:
        is_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(encoded) if is_jpeg else None
        if pixels is None:
            pixels = np.array(to_rgb(image))
        elif "exif" in image.info and (turn := _UPRIGHT.get(_orientation(image))) is not None:
            pixels = np.array(Image.fromarray(pixels).transpose(turn))
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(encoded: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8, or None where it cannot be had without a complaint."""
    if simplejpeg is None:
        return None
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB")
    except ValueError:
        return None


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can read; older ones do not know AVIF."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def opened(file: str | BinaryIO, where: str) -> Iterator[Image.Image]:
    """The image of a file, only its header read. What goes wrong then and in the block is an InputError."""
    try:
        with warnings.catch_warnings():
            # Photos with damaged metadata are common (ImageNet has them) and their pixels are sound.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            # MAX_PIXELS decides.
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats()) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
                yield image
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
    """The image, loaded, turned as its EXIF orientation says, in its own mode."""
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
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return re.sub(r" <\S+ object at 0x\w+>", "", " ".join(str(error).split())) or type(error).__name__
