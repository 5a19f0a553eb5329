"""``textures``: a generated data set of ten kinds of pattern, for trying everything without a download.

The kind of pattern is the label. Nothing else tells it: rotation, scale, phase, position, both colours and noise are
drawn anew for each image, so neither mean colour nor raw pixels separate the classes, while an encoder that is
invariant to crops and colours can.
"""

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from simclr_scale.data.randomness import Purpose, generator

Array = NDArray[np.float32]

_SIZES = {"train": 4096, "val": 1024, "test": 1024}
# Each split draws from indices of its own.
_FIRST_INDEX = {"train": 0, "val": 1 << 32, "test": 2 << 32}
_PERIOD = 8.0  # pixels of one repeat at scale 1
_NOISE = 0.04
_LIGHT, _DARK = (0.75, 1.0), (0.15, 0.45)
_SATURATION = (0.4, 1.0)
_WAVE = 2 * np.pi / _PERIOD


def _triangle(x: Array) -> Array:
    """Triangle wave of period _PERIOD between -1 and 1."""
    return 4 * np.abs(x / _PERIOD - np.floor(x / _PERIOD + 0.5)) - 1


def _stripes(u: Array, _: Array) -> Array:
    return np.sin(_WAVE * u)


def _checker(u: Array, v: Array) -> Array:
    return 2 * np.sin(_WAVE / 2 * u) * np.sin(_WAVE / 2 * v)


def _dots(u: Array, v: Array) -> Array:
    return np.cos(_WAVE * u) + np.cos(_WAVE * v) - 0.7


def _rings(u: Array, v: Array) -> Array:
    return np.sin(_WAVE * np.hypot(u, v))


def _rays(u: Array, v: Array) -> Array:
    return np.sin(8 * np.arctan2(v, u))


def _zigzag(u: Array, v: Array) -> Array:
    return np.sin(_WAVE * (v + _PERIOD / 2 * _triangle(u / 1.5)))


def _spiral(u: Array, v: Array) -> Array:
    return np.sin(_WAVE * np.hypot(u, v) + 3 * np.arctan2(v, u))


def _grid(u: Array, v: Array) -> Array:
    return np.maximum(np.cos(_WAVE * u), np.cos(_WAVE * v)) - 0.7


def _hex_dots(u: Array, v: Array) -> Array:
    third = np.sqrt(3) / 2 * v
    return np.cos(_WAVE * u) + np.cos(_WAVE * (u / 2 + third)) + np.cos(_WAVE * (u / 2 - third)) - 0.6


def _bricks(u: Array, v: Array) -> Array:
    course = np.floor(v / (_PERIOD * 0.75))
    joint = np.cos(_WAVE / 1.5 * (u + course % 2 * 0.75 * _PERIOD))
    bed = np.cos(2 * np.pi * v / (_PERIOD * 0.75))
    return np.maximum(joint - 0.9, bed - 0.75) * 2


PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "zigzag": _zigzag,
    "spiral": _spiral,
    "grid": _grid,
    "hex_dots": _hex_dots,
    "bricks": _bricks,
}


def _two_colors(rng: np.random.Generator) -> NDArray[np.float64]:
    """A light and a dark colour (2, 3) of any hue, in random order; their luma, too, nearly always differs."""
    hue, saturation = rng.uniform(0, 6, 2), rng.uniform(*_SATURATION, 2)
    value = np.array([rng.uniform(*_LIGHT), rng.uniform(*_DARK)])
    sextant = (hue[:, None] + np.array([5, 3, 1])) % 6
    channels = value[:, None] * (1 - saturation[:, None] * np.minimum(sextant, 4 - sextant).clip(0, 1))
    return rng.permutation(channels)


def draw_texture(rng: np.random.Generator, pattern: str, size: int) -> NDArray[np.uint8]:
    """One image (3, size, size) of the named pattern."""
    angle = rng.uniform(0, 2 * np.pi)
    zoom = np.exp(rng.uniform(np.log(0.7), np.log(1.4)))
    centre = rng.uniform(-size / 4, size / 4, 2)
    phase = rng.uniform(0, _PERIOD, 2) if pattern not in ("rings", "rays", "spiral") else np.zeros(2)
    colors = _two_colors(rng)

    axis = np.arange(size) - (size - 1) / 2
    x, y = (axis[None, :] - centre[0]) / zoom, (axis[:, None] - centre[1]) / zoom
    u = (np.cos(angle) * x + np.sin(angle) * y + phase[0]).astype(np.float32)
    v = (np.cos(angle) * y - np.sin(angle) * x + phase[1]).astype(np.float32)
    # A steep sigmoid: sharp edges, but softened over about a pixel.
    mix = 1 / (1 + np.exp(-4 * PATTERNS[pattern](u, v)))
    image = colors[0][:, None, None] * mix + colors[1][:, None, None] * (1 - mix)
    image += rng.normal(0, _NOISE, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


class TextureSource:
    """The ``textures`` data set, in memory: 4,096 images to train on and 1,024 to test, classes balanced.

    Args:
        split: images of different splits are drawn independently.
        seed: another seed is another data set of the same distribution.
        num_images: None for the split's own size.
        image_size: pixels of a side.
        channels: 3, or 1 for the luma.
    """

    name = "textures"
    classes = tuple(PATTERNS)

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        seed: int = 0,
        num_images: int | None = None,
        image_size: int = 32,
        channels: int = 3,
    ) -> None:
        count = _SIZES[split] if num_images is None else num_images
        self.split_description = f"generated, seed {seed}, {split} part"
        self.labels = np.arange(count) % len(PATTERNS)
        first = _FIRST_INDEX[split]
        self.pixels = torch.from_numpy(
            np.stack(
                [
                    draw_texture(generator(Purpose.TEXTURE, seed, 0, first + i), self.classes[label], image_size)
                    for i, label in enumerate(self.labels)
                ]
            )
        )
        self.channels = channels
        if channels == 1:
            grey = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in self.pixels]
            self.pixels = torch.from_numpy(np.stack(grey))[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        pixels = self.pixels[index]
        return Image.fromarray((pixels[0] if self.channels == 1 else pixels.permute(1, 2, 0)).numpy())

    def describe(self, index: int) -> str:
        return f"textures image {index} ({self.split_description})"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels.numpy().tobytes() + self.labels.tobytes()).hexdigest()
