"""A small labelled source and a small encoder for the tests of this folder."""

import hashlib
from collections.abc import Collection

import numpy as np
import torch
from PIL import Image
from torch import nn

from simclr_scale.errors import InputError


class ColorSource:
    """Noisy 8 px images, one base colour a class."""

    def __init__(self, labels: list[int], classes: tuple[str, ...], seed: int = 0, name: str = "colors") -> None:
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = classes
        self.seed = seed
        self.name = name
        self.split_description = f"seed {seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        base = np.random.default_rng(max(self.labels[index], 0)).uniform(40, 215, size=3)
        noise = np.random.default_rng([self.seed, index]).normal(0, 12, size=(8, 8, 3))
        return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.labels.tobytes() + bytes([self.seed])).hexdigest()

    def describe(self, index: int) -> str:
        return f"image {index}"


class DamagedSource(ColorSource):
    """A ColorSource of which some images cannot be read."""

    def __init__(self, labels: list[int], classes: tuple[str, ...], seed: int, bad: Collection[int]) -> None:
        super().__init__(labels, classes, seed)
        self.bad = bad

    def image(self, index: int) -> Image.Image:
        if index in self.bad:
            raise InputError(f"image {index}: not a readable image (cut off)")
        return super().image(index)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def small_encoder() -> nn.Sequential:
    """Images (B, 3, H, W) to features (B, 8); batch norm and dropout tell evaluation mode from training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
