"""One image of the packed format: made small once, so that an epoch has little to read and to decode."""

import io
import warnings

import numpy as np
from PIL import Image

from simclr_scale.data.sources.decoding import UNREADABLE, decode_rgb, reason_of, to_rgb, upright
from simclr_scale.errors import InputError

# Formats that are kept as they are where the image is small enough, and their extensions.
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_GREY = ("1", "L")


def pack_image(encoded: bytes, where: str, size: int, quality: int, lossless: bool) -> tuple[bytes, str]:
    """The image of a file, its shorter side at most `size` pixels, and the extension that tells its format.

    A JPEG, PNG or WebP file that is small enough stays as it is, byte for byte. Anything else goes through
    :func:`encode`.

    Raises:
        InputError: naming `where`: the image cannot be decoded, or not to its end.
    """
    try:
        with warnings.catch_warnings():
            # As in decode_rgb: damaged metadata.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(io.BytesIO(encoded)) as image:
                kept = _KEPT.get(image.format or "")
                if not kept or min(image.size) > size or getattr(image, "n_frames", 1) > 1:
                    return encode(image, size, quality, lossless)
    except UNREADABLE as error:
        raise InputError(f"{where}: not a readable image ({reason_of(error)})") from error
    # Kept as it is, but decoded to its end, so that no run meets an image that cannot be.
    decode_rgb(io.BytesIO(encoded), where)
    return encoded, kept


def encode(image: Image.Image, size: int, quality: int, lossless: bool) -> tuple[bytes, str]:
    """A file of the image, upright, its shorter side at most `size` pixels, and its extension.

    The resize is bicubic and antialiased. An image made smaller becomes a JPEG with halved chroma resolution; one that
    was small enough, one of grey with 16 bits, and by `lossless` every one, becomes a PNG. 8-bit grey stays grey;
    anything else becomes RGB by the rules of `to_rgb`.

    Raises:
        One of UNREADABLE.
    """
    image.load()
    if image.mode.startswith("I"):
        return _save(_resized_16_bit(upright(image), size), "PNG")
    grey = image.mode in _GREY and not image.has_transparency_data
    image = upright(image) if grey else to_rgb(image)
    target = _target(image, size)
    if image.mode == "1":
        image = image.convert("L")
    if target == image.size:
        return _save(image, "PNG")
    image = image.resize(target, Image.Resampling.BICUBIC)
    return _save(image, "PNG") if lossless else _save(image, "JPEG", quality=quality, subsampling="4:2:0")


def _target(image: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side `size`; the image's own where that is no larger."""
    shorter = min(image.size)
    if shorter <= size:
        return image.size
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    return width, height


def _resized_16_bit(image: Image.Image, size: int) -> Image.Image:
    """Grey of 16 bits; values beyond them, which Pillow's 32-bit mode can hold, are clipped."""
    values = np.asarray(image).astype(np.float32).clip(0, 65535)
    grey = Image.fromarray(values)
    grey = grey.resize(_target(grey, size), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(grey).round().clip(0, 65535).astype(np.uint16))


def _save(image: Image.Image, kind: str, **options: int | str) -> tuple[bytes, str]:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue(), _KEPT[kind]
