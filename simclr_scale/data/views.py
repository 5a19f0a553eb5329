"""From images to the two augmented views: what a worker does, and what the device does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.color import augment_colors
from simclr_scale.data.crops import cut, cut_batch
from simclr_scale.data.draws import BOX, VIEWS, draw_views
from simclr_scale.data.memory import PixelTable
from simclr_scale.data.pixels import ValueRange, channels_of, to_pixels
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import Source

Batch = dict[str, Tensor]


class ViewsDataset(Dataset[Batch]):
    """Batches of decoded and cropped images with their draws; everything random about them is a function of the key.

    A batch is asked for as a list of :class:`Key`, so that workers need no state of their own, and comes as

    - ``views`` (B, 2, C, H, W), cut here; or, where the data set is in memory, ``images`` (B, C, H, W), cut later on
      the device; uint8, or float32 in [0, 255] for deeper images;
    - ``draws`` (B, 2, P) float32, ``label`` (B,) int64 (-1: none), ``index`` (B,) int64.

    Args:
        pixels: all images of the source in memory, see ``load_pixels``, or None.
        value_range: of deeper images, see ``to_pixels``.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        image_size: int,
        seed: int,
        pixels: PixelTable | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        self.source, self.augmentation, self.image_size, self.seed = source, augmentation, image_size, seed
        self.pixels, self.value_range, self.channels = pixels, value_range, channels_of(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epoch = keys[0].epoch
        indices = np.array([key.image for key in keys])
        batch = {"index": torch.from_numpy(indices), "label": torch.from_numpy(self.source.labels[indices])}
        if self.pixels is not None:
            sizes = np.array(self.pixels.shape[-2:])
            draws = draw_views(self.augmentation, self.seed, epoch, indices, sizes, self.channels, keys[0].batch)
            return batch | {"images": self.pixels[batch["index"]], "draws": torch.from_numpy(draws)}
        # One image at a time: decoded photographs are large, their crops small.
        all_draws, all_views = [], []
        for index in indices:
            image = to_pixels(self.source.image(int(index)), self.value_range)
            size = np.array(image.shape[-2:])
            draws = draw_views(self.augmentation, self.seed, epoch, [index], size, self.channels, keys[0].batch)[0]
            all_views.append(torch.stack([cut(image, draws[view, BOX], self.image_size) for view in range(VIEWS)]))
            all_draws.append(torch.from_numpy(draws))
        return batch | {"views": torch.stack(all_views), "draws": torch.stack(all_draws)}


def keep(batch: Any) -> Any:
    """Collates nothing: the data set gives whole batches."""
    return batch


def finish_views(batch: Batch, augmentation: Augmentation, image_size: int) -> Batch:
    """The device's part: crops where they are still to be cut, then colours.

    Returns:
        ``inputs`` (2B, C, H, W) float32 in [0, 1], all first views and then all second views; ``label``; ``index``.
    """
    draws = batch["draws"]
    views = batch["views"] if "views" in batch else cut_batch(batch["images"], draws[..., BOX], image_size)
    return {
        "inputs": augment_colors(views, draws, augmentation),
        "label": batch["label"],
        "index": batch["index"],
    }
