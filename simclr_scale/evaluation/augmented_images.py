"""Images under random crops and flips, in seeded batches shared out among ranks: what evaluations that train look at.

"random cropping with resizing and horizontal flips" and no other augmentation (Chen et al. 2020, appendix B.5, B.6).
n images, B images a batch of all ranks together.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.draws import BOX, Draw, draw_views
from simclr_scale.data.pixels import size_of
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources import Source
from simclr_scale.distributed import World, world
from simclr_scale.errors import InputError

_CROP_AND_FLIP = Augmentation(jitter=0, grey=0, blur=0)
_READ_AT_ONCE = 64


class AugmentedImages(Dataset[tuple[torch.Tensor, int]]):
    """Random crops and flips of the images of a source, each a pure function of (seed, epoch, index).

    Item (epoch, index) is the image (C, H, W) as the encoder takes it, and the index.
    """

    def __init__(self, source: Source, transform: ImageTransform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        image = self.source.image(index)
        draws = draw_views(_CROP_AND_FLIP, self.seed, epoch, [index], np.array(size_of(image)))[0, 0]
        return self.transform.cropped(image, draws[BOX], flip=bool(draws[Draw.FLIP])), index


class Batches:
    """This rank's (epoch, index) of all batches of all epochs.

    Each epoch has a new seeded order, cut into global batches without the tail; a rank has every so many-th of a batch.
    """

    def __init__(self, indices: np.ndarray, size: int, epochs: int, seed: int, ranks: World) -> None:
        self._indices = indices
        self._size = size
        self._epochs = epochs
        self._seed = seed
        self._ranks = ranks

    def __len__(self) -> int:
        return self._epochs * (len(self._indices) // self._size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self._epochs):
            raw = generator(Purpose.ORDER, self._seed, epoch, 0).bit_generator.random_raw(len(self._indices))
            order = self._indices[np.argsort(raw, kind="stable")].tolist()
            for start in range(0, len(order) - self._size + 1, self._size):
                mine = order[start + self._ranks.rank : start + self._size : self._ranks.size]
                yield [(epoch, index) for index in mine]


class _ReadingOnly(Dataset[tuple[int, str]]):
    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[int, str]:
        index = int(self._indices[position])
        try:
            self._source.image(index)
        except InputError as error:
            return index, str(error)
        return index, ""


def unreadable_images(
    source: Source, indices: np.ndarray, num_workers: int = 0, group: dist.ProcessGroup | None = None
) -> dict[int, str]:
    """Which of the images at `indices` cannot be read, with the reason; each is tried once, by one of the ranks.

    Raises:
        InputError: none can be.
    """
    rank, size = world(group)
    images = _ReadingOnly(source, indices[rank::size])
    loader = DataLoader(images, batch_size=_READ_AT_ONCE, num_workers=num_workers, collate_fn=list)
    mine = {index: reason for batch in loader for index, reason in batch if reason}
    found: list[dict[int, str]] = [mine]
    if size > 1:
        found = [{}] * size
        dist.all_gather_object(found, mine, group=group)
    unreadable = {index: reason for part in found for index, reason in part.items()}
    if len(unreadable) == len(indices):
        reason = unreadable[int(indices[0])]
        raise InputError(f"none of the {len(indices):,} images can be read; the first: {reason}")
    return unreadable


def check_labelled(source: Source, indices: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The images to train on, (n,) (of None: all labelled ones), and their classes, ascending.

    Raises:
        InputError: one of them has no label, or they are of fewer than two classes.
    """
    chosen = np.flatnonzero(source.labels >= 0) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(chosen) or (source.labels[chosen] < 0).any():
        raise InputError(f"{source.name}: training takes images with labels, and some of those chosen have none")
    classes = np.unique(source.labels[chosen])
    if len(classes) < 2:
        raise InputError(f"{source.name}: all labels are of class {int(classes[0])}; a classifier needs at least two")
    return chosen, classes


def check_crops(transform: object) -> None:
    """Raises InputError for a transform that cannot crop at random; for a command to call before its work."""
    if not isinstance(transform, ImageTransform):
        raise InputError(
            f"transform: a {type(transform).__name__} cannot crop at random; wanted the ImageTransform of load_encoder"
        )
    height, width = transform.config["input_size"][1:]
    if height != width:
        raise InputError(f"transform: images of {height} x {width}, but random crops are square")


def check_training(learning_rate: float, weight_decay: float, epochs: int, batch_size: int) -> None:
    """Raises InputError for settings out of range; for a command to call before its work."""
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate: {learning_rate}, wanted a finite number above 0")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay: {weight_decay}, wanted a finite number of at least 0")
    if epochs < 1:
        raise InputError(f"epochs: {epochs}, wanted at least 1")
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}, wanted at least 1 image a step")
