"""Every random choice of both views of an image, drawn before any pixel is touched.

The draws of an image are a pure function of (seed, epoch, index), and what a whole batch draws together one of (seed,
epoch, number of the global batch): nothing depends on the worker, the rank or a restart. The draws travel with the
image as one row of numbers; the operations that use them are deterministic.
"""

import math
from collections.abc import Sequence
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.crops import MAX_TRIES, sample_boxes
from simclr_scale.data.randomness import Purpose, generator

VIEWS = 2


class Draw(IntEnum):
    """Columns of the draws (B, 2, P). Flags are 0 or 1; crops are in pixels of the decoded image.

    Where the augmentation draws for each channel, C columns of each :class:`ChannelDraw` follow these.
    """

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


class ChannelDraw(IntEnum):
    """What is drawn for each channel, in the order of its columns."""

    BRIGHTNESS = 0
    CONTRAST = auto()
    DROP = auto()  # a flag

    def columns(self, channels: int) -> slice:
        """Where the draws (B, 2, P) have it."""
        start = len(Draw) + self * channels
        return slice(start, start + channels)


BOX = slice(Draw.TOP, Draw.WIDTH + 1)
_COLOR = range(Draw.FLIP, Draw.SIGMA + 1)
_UNIFORMS_FOR_CROP = 2 * MAX_TRIES + 2


def draw_views(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    indices: Sequence[int] | NDArray[np.int64],
    sizes: NDArray[np.int64],
    channels: int = 3,
    batch: int | None = None,
) -> NDArray[np.float32]:
    """Draws both views of some images.

    Args:
        indices: (B,) positions of the images in the data set.
        sizes: (B, 2) height and width of each image in pixels, or (2,) where all are alike.
        channels: C of the images; it matters where the augmentation draws for each channel.
        batch: number within the epoch of the global batch that the images are in; only ``blur_per="batch"`` needs it.

    Returns:
        (B, 2, P) float32, columns as in :class:`Draw`, with 3 * C more where the augmentation draws for each channel.
    """
    a, count = augmentation, _UNIFORMS_FOR_CROP + len(_COLOR)
    by_channel = a.per_channel or a.channel_drop > 0
    uniforms = np.empty((len(indices), VIEWS, count))
    of_channels = np.empty((len(indices), VIEWS, len(ChannelDraw), channels if by_channel else 0))
    for row, index in enumerate(indices):
        stream = generator(Purpose.AUGMENTATION, seed, epoch, int(index))
        stream.random(out=uniforms[row])
        # After all others, which so do not depend on the number of channels.
        stream.random(out=of_channels[row])
    draws = np.empty((len(indices), VIEWS, len(Draw) + math.prod(of_channels.shape[2:])), dtype=np.float32)
    sizes = np.broadcast_to(sizes, (len(indices), 2))[:, None]
    draws[..., BOX] = sample_boxes(uniforms[..., :_UNIFORMS_FOR_CROP], sizes, augmentation)

    u = dict(zip(map(Draw, _COLOR), np.moveaxis(uniforms[..., _UNIFORMS_FOR_CROP:], -1, 0), strict=True))
    for flag, probability in {Draw.FLIP: a.flip, Draw.JITTER: a.jitter, Draw.GREY: a.grey, Draw.BLUR: a.blur}.items():
        draws[..., flag] = u[flag] < probability
    brightness, contrast, saturation = _factor_ranges(a)
    for factor, bounds in {Draw.BRIGHTNESS: brightness, Draw.CONTRAST: contrast, Draw.SATURATION: saturation}.items():
        draws[..., factor] = _between(bounds, u[factor])
    draws[..., Draw.HUE] = a.strength * a.hue * (2 * u[Draw.HUE] - 1)
    draws[..., Draw.ORDER] = np.floor(24 * u[Draw.ORDER])
    sigma = u[Draw.SIGMA] if a.blur_per == "image" else _shared_by_batch(seed, epoch, batch)
    draws[..., Draw.SIGMA] = _between(a.blur_sigma, sigma)
    if by_channel:
        for_brightness, for_contrast, for_drop = np.moveaxis(of_channels, 2, 0)
        draws[..., ChannelDraw.BRIGHTNESS.columns(channels)] = _between(brightness, for_brightness)
        draws[..., ChannelDraw.CONTRAST.columns(channels)] = _between(contrast, for_contrast)
        spared = for_drop == for_drop.max(-1, keepdims=True)
        draws[..., ChannelDraw.DROP.columns(channels)] = (for_drop < a.channel_drop) & ~spared
    return draws


def _between(bounds: tuple[float, float], uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = bounds
    return low + (high - low) * uniform


def _factor_ranges(a: Augmentation) -> list[tuple[float, float]]:
    """Of brightness, contrast and saturation."""
    amounts = [a.strength * amount for amount in (a.brightness, a.contrast, a.saturation)]
    ranges = [(max(0.0, 1 - amount), 1 + amount) for amount in amounts]
    if a.color_ops == "google" and a.brightness_mode == "additive":
        ranges[0] = (-amounts[0], amounts[0])
    return ranges


def _shared_by_batch(seed: int, epoch: int, batch: int | None) -> NDArray[np.float64]:
    """(2,): a number for each view, the same on every rank."""
    if batch is None:
        raise ValueError("blur_per='batch' draws for a whole global batch: say which, by batch")
    return generator(Purpose.BLUR_OF_BATCH, seed, epoch, batch).random(VIEWS)
