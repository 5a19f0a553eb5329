"""From images to the two augmented views: what a worker does, and what the device does."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.color import augment_colors
from simclr_scale.data.crops import cut, cut_batch
from simclr_scale.data.draws import BOX, VIEWS, draw_views
from simclr_scale.data.memory import PixelTable
from simclr_scale.data.pixels import ValueRange, channels_of
from simclr_scale.data.reading import Unreadable, read_or_replace, readable_instead
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import Source

Batch = dict[str, Any]

# Draws are cheap by the dozen, and decoded photographs large.
_MOST_IMAGES_AT_ONCE = 16
_MOST_BYTES_AT_ONCE = 64 << 20


class ViewsDataset(Dataset[Batch]):
    """Batches of decoded and cropped images with their draws; everything random about them is a function of the key.

    A batch is asked for as a list of :class:`Key`, so that workers need no state of their own, and comes as

    - ``views`` (B, 2, C, H, W), cut here, the channels of a pixel side by side in memory; or, where the data set is in
      memory, ``images`` (B, C, H, W), cut later on the device; uint8, or float32 in [0, 255] where an image of the
      batch is deeper;
    - ``draws`` (B, 2, P) float32, ``label`` (B,) int64 (-1: none), ``index`` (B,) int64;
    - ``unreadable``, only where there are such: a list of (index, reason). Another image stands in the place of each,
      with its own label, but with the index and the draws of the one that it replaces.

    Args:
        pixels: all images of the source in memory, see ``load_pixels``, or None.
        unreadable: those among ``pixels`` that could not be read.
        value_range: of deeper images, see ``to_pixels``.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        image_size: int,
        seed: int,
        pixels: PixelTable | None = None,
        unreadable: Collection[int] = (),
        value_range: ValueRange | None = None,
    ) -> None:
        self.source, self.augmentation, self.image_size, self.seed = source, augmentation, image_size, seed
        self.pixels, self.unreadable = pixels, frozenset(unreadable)
        self.value_range, self.channels = value_range, channels_of(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epoch, place = keys[0].epoch, keys[0].batch
        indices = np.array([key.image for key in keys])
        if self.pixels is not None:
            return self._from_memory(self.pixels, epoch, place, indices)
        views: Tensor | None = None
        shown, all_draws, unreadable = indices.copy(), [], []
        images: list[Tensor] = []
        for row, index in enumerate(indices):
            image, shown[row], bad = read_or_replace(self.source, self.seed, epoch, int(index), self.value_range)
            images.append(image)
            unreadable += bad
            enough = len(images) == _MOST_IMAGES_AT_ONCE or sum(image.nbytes for image in images) > _MOST_BYTES_AT_ONCE
            if not enough and row + 1 < len(indices):
                continue
            dtype = torch.float32 if any(map(torch.is_floating_point, images)) else torch.uint8
            if views is None:
                views = _empty_views(len(indices), image.shape[0], self.image_size, dtype)
            elif dtype == torch.float32:
                # Also where 8-bit pictures came first, in a set that has deeper ones too.
                views = views.to(dtype)
            first = row + 1 - len(images)
            all_draws.append(self._cut(images, epoch, place, indices[first : row + 1], views[first : row + 1]))
            images.clear()
        batch = self._batch(indices, shown, np.concatenate(all_draws), unreadable)
        return batch | {"views": views}

    def _cut(
        self, images: list[Tensor], epoch: int, place: int, indices: NDArray[np.int64], views: Tensor
    ) -> NDArray[np.float32]:
        """Writes the crops of some images and returns their draws."""
        sizes = np.array([image.shape[-2:] for image in images])
        draws = draw_views(self.augmentation, self.seed, epoch, indices, sizes, self.channels, place)
        for image, its_draws, its_views in zip(images, draws, views, strict=True):
            for view in range(VIEWS):
                its_views[view] = cut(image, its_draws[view, BOX], self.image_size)
        return draws

    def _from_memory(self, pixels: PixelTable, epoch: int, place: int, indices: NDArray[np.int64]) -> Batch:
        shown = indices
        if self.unreadable:
            count = len(self.source)
            shown = np.array([readable_instead(self.unreadable, self.seed, epoch, int(i), count) for i in indices])
        sizes = np.array(pixels.shape[-2:])
        draws = draw_views(self.augmentation, self.seed, epoch, indices, sizes, self.channels, place)
        return self._batch(indices, shown, draws, []) | {"images": pixels[torch.from_numpy(shown)]}

    def _batch(
        self,
        indices: NDArray[np.int64],
        shown: NDArray[np.int64],
        draws: NDArray[np.float32],
        unreadable: list[Unreadable],
    ) -> Batch:
        batch: Batch = {
            "index": torch.from_numpy(indices),
            "label": torch.from_numpy(self.source.labels[shown]),
            "draws": torch.from_numpy(draws),
        }
        return batch | {"unreadable": unreadable} if unreadable else batch


def _empty_views(count: int, channels: int, size: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (B, 2, C, size, size), the channels of a pixel side by side as the resize writes them."""
    return torch.empty((count, VIEWS, size, size, channels), dtype=dtype).movedim(-1, 2)


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
