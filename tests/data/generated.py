"""Sources of generated images for the tests of this folder."""

import hashlib
from collections.abc import Iterable

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_scale.errors import InputError


class GradientSource:
    """Smooth colour gradients, no two alike, of the given sizes (height, width) in turn.

    Values keep away from 0 and 255, so that no resize of them overshoots and is clipped.
    """

    name = "gradients"
    classes = ("even", "odd")
    split_description = "all images"

    def __init__(self, num_images: int, *sizes: tuple[int, int]) -> None:
        self.labels = np.arange(num_images) % 2
        self.sizes = sizes
        self.images_read = 0

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        self.images_read += 1
        rng = np.random.default_rng(index)
        height, width = self.sizes[index % len(self.sizes)]
        rows, columns, phase = rng.uniform(-6, 6, (3, 3))
        y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
        return Image.fromarray((128 + 70 * np.sin(rows * y + columns * x + phase)).round().astype(np.uint8))

    def describe(self, index: int) -> str:
        return f"gradient {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{len(self)} {self.sizes}".encode()).hexdigest()


class ArraySource:
    """Arrays (N, C, H, W) as a source; the images at `unreadable` cannot be read."""

    name = "arrays"
    classes = ("even", "odd")
    split_description = "all images"

    def __init__(self, values: Tensor, unreadable: Iterable[int] = ()) -> None:
        self.values, self.unreadable = values, set(unreadable)
        self.channels = values.shape[1]
        self.labels = np.arange(len(values)) % 2

    def __len__(self) -> int:
        return len(self.values)

    def image(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise InputError(f"image {index} is damaged")
        return self.values[index]

    def describe(self, index: int) -> str:
        return f"array {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()
