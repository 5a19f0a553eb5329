"""TIFF files as arrays: several bands in a picture, or several pages."""

import logging
import warnings
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from simclr_scale.data.sources.decoding import MAX_PIXELS, UNREADABLE, reason_of
from simclr_scale.errors import InputError

_VALUES = {"L", "I", "I;16", "I;16B", "I;16L", "F", "RGB", "RGBA", "RGBX", "CMYK"}
_TOO_MANY_VALUES = 4 * MAX_PIXELS
# Beside what Pillow raises on damaged files of other kinds, found by corrupting bytes at random.
_UNREADABLE = (*UNREADABLE, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError)


def read_tiff(path: str) -> np.ndarray:
    """All values, (C, H, W): the bands of the only page, or pages of one band each.

    Pillow reads them where it can; more than one band of 16 or more bits is beyond it and read by tifffile.

    Raises:
        InputError: the file is missing or damaged, its pages differ or have colours by palette, or tifffile is needed
            and not installed.
    """
    try:
        with warnings.catch_warnings():
            # Damaged or unusual tags cost no pixels.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(path, formats=["TIFF"]) as image:
                return _frames(image)
    except UnidentifiedImageError:
        return _by_tifffile(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable image ({reason_of(error)})") from error


def _frames(image: Image.Image) -> np.ndarray:
    pages = getattr(image, "n_frames", 1)
    if pages * image.width * image.height > _TOO_MANY_VALUES:
        raise ValueError(f"{pages} pages of {image.width} x {image.height} pixels are too many")
    frames: list[np.ndarray] = []
    for page in range(pages):
        image.seek(page)
        if image.mode not in _VALUES:
            raise ValueError(f"pixels of mode {image.mode} are not plain values")
        frame = np.array(image)
        if frames and frame.shape != frames[0].shape:
            raise ValueError(f"page {page} is of shape {frame.shape}, the first of {frames[0].shape}")
        frames.append(frame)
    if frames[0].ndim == 2:
        return np.stack(frames)
    if pages > 1:
        raise ValueError(f"{pages} pages of several bands each; an image has either")
    return frames[0].transpose(2, 0, 1)


def _by_tifffile(path: str) -> np.ndarray:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: not a TIFF that Pillow reads; if it is one of several bands: "
            'pip install "simclr_scale[tif]" reads those'
        ) from error
    logger = logging.getLogger("tifffile")
    level = logger.level
    # It logs what is odd about a file; what ends in an error is said by that.
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with tifffile.TiffFile(path) as file:
            return _series(file.series[0])
    except (tifffile.TiffFileError, *_UNREADABLE) as error:
        raise InputError(f"{path}: not a readable image ({reason_of(error)})") from error
    finally:
        logger.setLevel(level)


def _series(series: Any) -> np.ndarray:
    axes = [(name, size) for name, size in zip(series.axes, series.shape, strict=True) if size > 1 or name in "YX"]
    names = [name for name, _ in axes]
    if names.count("Y") != 1 or names.count("X") != 1 or len(names) > 3:
        raise ValueError(f"its axes are {series.axes} of sizes {series.shape}; an image has height, width and channels")
    if int(np.prod([size for _, size in axes], dtype=np.int64)) > _TOO_MANY_VALUES:
        raise ValueError(f"{series.shape} values are too many")
    values = series.asarray().reshape([size for _, size in axes])
    rest = [place for place, name in enumerate(names) if name not in "YX"]
    ordered = values.transpose([*rest, names.index("Y"), names.index("X")])
    return ordered if rest else ordered[None]
