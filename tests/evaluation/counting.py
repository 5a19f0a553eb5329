"""A source and an encoder that tell what was asked of them."""

from collections.abc import Collection

import torch
from PIL import Image
from torch import nn

from tests.evaluation.synthetic import DamagedSource, small_encoder


class CountingSource(DamagedSource):
    """Notes the images that are read, in order."""

    def __init__(self, images: int, bad: Collection[int] = ()) -> None:
        super().__init__([index % 3 for index in range(images)], ("a", "b", "c"), 0, bad)
        self.reads: list[int] = []

    def image(self, index: int) -> Image.Image:
        self.reads.append(index)
        return super().image(index)


class CountingEncoder(nn.Module):
    """The small encoder; notes how many images each forward was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_encoder()
        self.forwards: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.forwards.append(len(images))
        return self.inner(images)
