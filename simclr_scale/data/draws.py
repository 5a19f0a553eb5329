"""Every random choice of both views of an image, drawn before any pixel is touched.

The draws of an image are a pure function of (seed, epoch, index): they do not depend on the worker, the rank, the
batch or a restart. They travel with the image as one row of numbers; the operations that use them are deterministic.
"""

from collections.abc import Sequence
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.crops import MAX_TRIES, sample_boxes
from simclr_scale.data.randomness import Purpose, generator

VIEWS = 2


class Draw(IntEnum):
    """Columns of the draws (B, 2, P). Flags are 0 or 1; crops are in pixels of the decoded image."""

    TOP = 0
    LEFT = auto()
    HEIGHT = auto()
    WIDTH = auto()
    FLIP = auto()
    JITTER = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    HUE = auto()
    ORDER = auto()  # which of the 24 orders of the four jitters, as an index into color.ORDERS
    GREY = auto()
    BLUR = auto()
    SIGMA = auto()


BOX = slice(Draw.TOP, Draw.WIDTH + 1)
_COLOR = range(Draw.FLIP, Draw.SIGMA + 1)
_UNIFORMS_FOR_CROP = 2 * MAX_TRIES + 2


def draw_views(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    indices: Sequence[int] | NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Draws both views of some images.

    Args:
        indices: (B,) positions of the images in the data set.
        sizes: (B, 2) height and width of each image in pixels, or (2,) where all are alike.

    Returns:
        (B, 2, P) float32, columns as in :class:`Draw`.
    """
    count = _UNIFORMS_FOR_CROP + len(_COLOR)
    uniforms = np.empty((len(indices), VIEWS, count))
    for row, index in enumerate(indices):
        generator(Purpose.AUGMENTATION, seed, epoch, int(index)).random(out=uniforms[row])
    draws = np.empty((len(indices), VIEWS, len(Draw)), dtype=np.float32)
    sizes = np.broadcast_to(sizes, (len(indices), 2))[:, None]
    draws[..., BOX] = sample_boxes(uniforms[..., :_UNIFORMS_FOR_CROP], sizes, augmentation)

    u = dict(zip(map(Draw, _COLOR), np.moveaxis(uniforms[..., _UNIFORMS_FOR_CROP:], -1, 0), strict=True))
    a, s = augmentation, augmentation.strength
    for flag, probability in {Draw.FLIP: a.flip, Draw.JITTER: a.jitter, Draw.GREY: a.grey, Draw.BLUR: a.blur}.items():
        draws[..., flag] = u[flag] < probability
    for factor, amount in {
        Draw.BRIGHTNESS: s * a.brightness,
        Draw.CONTRAST: s * a.contrast,
        Draw.SATURATION: s * a.saturation,
    }.items():
        additive = factor == Draw.BRIGHTNESS and a.color_ops == "google" and a.brightness_mode == "additive"
        low, high = (-amount, amount) if additive else (max(0.0, 1 - amount), 1 + amount)
        draws[..., factor] = low + (high - low) * u[factor]
    draws[..., Draw.HUE] = s * a.hue * (2 * u[Draw.HUE] - 1)
    draws[..., Draw.ORDER] = np.floor(24 * u[Draw.ORDER])
    draws[..., Draw.SIGMA] = a.blur_sigma[0] + (a.blur_sigma[1] - a.blur_sigma[0]) * u[Draw.SIGMA]
    return draws
