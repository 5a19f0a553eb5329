"""The data of a pretraining run, for Lightning."""

from typing import Any, Literal

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from simclr_scale.data.augmentation import ColorOps, CropSampling, Overrides, Preset, resolve
from simclr_scale.data.memory import load_pixels
from simclr_scale.data.sampler import GlobalBatchSampler, Position
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.views import Batch, ViewsDataset, finish_views, keep
from simclr_scale.data.workers import default_workers
from simclr_scale.errors import InputError

_SMALL_IMAGE = 64
_PHOTOGRAPH = 224


class SimCLRDataModule(pl.LightningDataModule):
    """Two augmented views of every image, the same whatever the workers, ranks or restarts.

    Args:
        source: a folder, ``torch/NAME``, ``hfds/PATH_OR_ID`` or ``textures``.
        root: where ``torch/NAME`` finds its files.
        train_split: name of the split to train on; None finds it.
        test_split: name of the held-out split that the kNN score is measured on; None finds it.
        image_key: column of images, where the source has columns; None finds it by type.
        label_key: column of labels; None finds it by type.
        global_batch_size: images in a step over all ranks; a rank's share is this divided by the ranks.
        image_size: side of the views in pixels; None: the images' own where they are at most 64 px, else 224.
        num_workers: processes that decode and crop; None: none for data in memory, else one a core up to 8.
        preset: the augmentation for "natural" photographs, "small" images such as CIFAR's, "grey" ones of one channel
            such as X-rays, or "multiband" ones whose channels are no colours.
        color_ops: whose colour operations, "torchvision" or "google"; None: the preset's.
        crop_sampling: whose distribution of crops, "torchvision" or "google"; None: the preset's.
        augmentation: single fields of the augmentation that differ from the preset.
        in_memory: decode the whole set once; None does so for images of one size up to 96 px.
        seed: of the order, the draws, a seeded split and generated data; the command line's own seed by default.
    """

    def __init__(
        self,
        source: str,
        *,
        root: str | None = None,
        train_split: str | None = None,
        test_split: str | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        global_batch_size: int = 256,
        image_size: int | None = None,
        num_workers: int | None = None,
        preset: Preset = "natural",
        color_ops: ColorOps | None = None,
        crop_sampling: CropSampling | None = None,
        augmentation: Overrides | None = None,
        in_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        overrides = dict(augmentation or {})
        overrides |= {"color_ops": color_ops} if color_ops else {}
        overrides |= {"crop_sampling": crop_sampling} if crop_sampling else {}
        self.augmentation = resolve(preset, overrides)
        for name, value, least in (("seed", seed, 0), ("num_workers", num_workers, 0), ("image_size", image_size, 1)):
            if value is not None and value < least:
                raise InputError(f"data.{name} must be {least} or above, got {value}")
        self.source, self.root = source, root
        self.train_split, self.test_split = train_split, test_split
        self.image_key, self.label_key = image_key, label_key
        self.global_batch_size, self.num_workers, self.in_memory = global_batch_size, num_workers, in_memory
        self.requested_image_size, self.seed = image_size, seed
        self.train_source: Source | None = None
        self.test_source: Source | None = None
        self._dataset: ViewsDataset | None = None
        self._restored: Position | None = None

    def setup(self, stage: str | None = None) -> None:
        """Opens the source and checks the batch against it, before anything is trained or written."""
        self._restored = None
        if self.train_source is None:
            self.train_source = self._open("train")
            has_labels = (self.train_source.labels >= 0).any()
            self.test_source = self._open("test") if has_labels else None
            self.image_size = self.requested_image_size or _natural_size(self.train_source)
        # Anew at each call: the ranks are known only once a trainer is attached, maybe another one than last time.
        self._sampler = self._make_sampler(len(self.train_source))
        if self._dataset is None:
            pixels = load_pixels(self.train_source, self.in_memory)
            self._dataset = ViewsDataset(self.train_source, self.augmentation, self.image_size, self.seed, pixels)

    def _open(self, split: Literal["train", "test"]) -> Source:
        return open_source(
            self.source,
            root=self.root,
            split=split,
            train_split=self.train_split,
            test_split=self.test_split,
            image_key=self.image_key,
            label_key=self.label_key,
            seed=self.seed,
        )

    def _make_sampler(self, num_images: int) -> GlobalBatchSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return GlobalBatchSampler(
            num_images,
            self.global_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            position=self._start,
        )

    def _start(self) -> Position:
        """Where an epoch begins: after a restart in its middle, the batches already done are left out."""
        restored, self._restored = self._restored, None
        return restored or self._position()

    def _position(self) -> Position:
        if self.trainer is None:
            return Position(0, 0)
        return Position(self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def state_dict(self) -> dict[str, Any]:
        """Where training goes on. Lightning keeps it too, but starts the workers before it restores its own."""
        epoch, batch = self._position()
        ended = self.trainer is not None and batch >= self.trainer.num_training_batches
        return (Position(epoch + 1, 0) if ended else Position(epoch, batch))._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = Position(**state_dict)

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 where there are none."""
        return len(self.train_source.classes) if self.train_source is not None else 0

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self._dataset is not None, "Lightning calls setup first"
        workers = self.worker_count()
        return DataLoader(
            self._dataset,
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=keep,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def worker_count(self) -> int:
        """Processes that decode images on this rank."""
        if self.num_workers is not None:
            return self.num_workers
        if self._dataset is not None and self._dataset.pixels is not None:
            return 0
        return default_workers(self.trainer.num_devices if self.trainer is not None else 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "draws" in batch:
            return finish_views(batch, self.augmentation, self.image_size)
        return batch


def _natural_size(source: Source) -> int:
    shortest = min(source.image(0).size)
    return shortest if shortest <= _SMALL_IMAGE else _PHOTOGRAPH
