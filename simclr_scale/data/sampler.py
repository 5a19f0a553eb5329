"""The order of images: a pure function of (seed, epoch), cut into global batches and shared out to ranks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.errors import InputError


class Key(NamedTuple):
    """What a worker needs to make the views of one image."""

    epoch: int
    image: int
    batch: int = 0
    """Which global batch of the epoch the image is in, for what the images of a batch draw together."""


class Position(NamedTuple):
    """Where an epoch is to begin: a fresh one at batch 0, a resumed one where the checkpoint was written."""

    epoch: int
    batch: int


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch."""
    # By the raw stream, which NumPy promises to keep; its permutation() may change between releases.
    raw = generator(Purpose.ORDER, seed, epoch, 0).bit_generator.random_raw(num_images)
    return np.argsort(raw, kind="stable")


class GlobalBatchSampler(Sampler[list[Key]]):
    """Batches of one rank, so that the ranks' batches together are the same global batches at any number of ranks.

    The last, incomplete batch is dropped. ``len`` is that of a whole epoch, also when an epoch begins in its middle.

    Args:
        num_images: size of the data set.
        global_batch_size: images in a step, over all ranks; must divide by ``world_size``.
        position: asked at the start of every iteration for the epoch and the first batch.

    Raises:
        InputError: an indivisible or too large batch.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position] = lambda: Position(0, 0),
    ) -> None:
        if global_batch_size < 2:
            raise InputError(
                f"data.global_batch_size must be at least 2 (one image has no negatives), got {global_batch_size}"
            )
        if global_batch_size % world_size:
            raise InputError(
                f"data.global_batch_size {global_batch_size} does not divide by the {world_size} ranks; "
                f"use {max(1, round(global_batch_size / world_size)) * world_size}"
            )
        if global_batch_size > num_images:
            raise InputError(
                f"data.global_batch_size {global_batch_size} is larger than the training set of {num_images} images"
            )
        self.num_images, self.global_batch_size, self.seed = num_images, global_batch_size, seed
        self.rank, self.world_size, self.position = rank, world_size, position

    @property
    def batch_size(self) -> int:
        """Images of one step on one rank."""
        return self.global_batch_size // self.world_size

    def __len__(self) -> int:
        return self.num_images // self.global_batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, first = self.position()
        order = epoch_order(self.num_images, self.seed, epoch)
        for batch in range(first, len(self)):
            start = batch * self.global_batch_size + self.rank * self.batch_size
            yield [Key(epoch, int(index), batch) for index in order[start : start + self.batch_size]]
