"""The data of a pretraining run, for Lightning."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader

from simclr_scale.data.augmentation import ColorOps, CropSampling, Overrides, Preset, resolve
from simclr_scale.data.memory import PixelTable, load_pixels
from simclr_scale.data.pixels import ValueRange, as_value_range, channels_of, measure_value_range, takes_value_range
from simclr_scale.data.reading import first_readable
from simclr_scale.data.sampler import GlobalBatchSampler, Key, Position
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.sources.arrays import ChannelAxis
from simclr_scale.data.sources.opening import DEFAULT_PATCH_SIZE
from simclr_scale.data.subsets import check_subset, take_subset
from simclr_scale.data.views import Batch, ViewsDataset, finish_views, keep
from simclr_scale.data.waiting import TimedLoader, WaitClock
from simclr_scale.data.workers import default_workers, outlive_first_sigterm
from simclr_scale.distributed import World, data_parallel_group, world
from simclr_scale.errors import InputError

_FEW_IMAGES = 1000
_SMALL_IMAGE = 64
_PHOTOGRAPH = 224
# How pictures are decoded, and whether arrays come before pictures.
_CHANNELS = {"grey": 1}
_ARRAYS = ("multiband",)


class SimCLRDataModule(pl.LightningDataModule):
    """Two augmented views of every image, the same whatever the workers, ranks or restarts.

    Args:
        source: a folder of pictures or arrays, ``torch/NAME``, ``hfds/PATH_OR_ID``, ``wds/PATTERN``, ``patches/FILE``
            or ``textures``.
        root: where ``torch/NAME`` finds its files.
        train_split: name of the split to train on; None finds it.
        test_split: name of the held-out split that the kNN score is measured on; None finds it.
        image_key: column of images, where the source has columns, or their extension in shards, or variable of .mat
            files; None finds it by type.
        label_key: column of labels, or their extension or field in shards, or variable that labels a scene; None finds
            it by type.
        subset: a part of the training images for a quick trial: a fraction, a count, or a file that lists names or
            numbers, one a line; balanced over the classes and seeded, a smaller part within a larger.
        global_batch_size: images in a step over all ranks; a rank's share is this divided by the ranks.
        image_size: side of the views in pixels; None: the images' own where they are at most 64 px, else 224.
        num_workers: processes that decode and crop; None: none for data in memory, else one a core up to 8.
        preset: the augmentation for "natural" photographs, "small" images such as CIFAR's, "grey" images (pictures are
            then decoded to one channel of 8 or 16 bits) or "multiband" arrays of any number of channels.
        color_ops: whose colour operations, "torchvision" or "google"; None: the preset's.
        crop_sampling: whose distribution of crops, "torchvision" or "google"; None: the preset's.
        augmentation: single fields of the augmentation that differ from the preset.
        max_bad_fraction: share of the training images that may be unreadable. Up to then another image stands in for
            each, beyond it training stops.
        in_memory: decode the whole set once; None does so for images of one size up to 96 px.
        channel_axis: axis of arrays that is that of the channels, 0 or -1; None finds it.
        value_range: the values of arrays and 16-bit pictures that become black and white; None: all that uint8 can
            hold, else the percentiles .1 and 99.9 of each channel over a seeded sample of the training images.
        patch_size: side in pixels of the patches that ``patches/FILE`` cuts; odd.
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
        subset: int | float | str | None = None,
        global_batch_size: int = 256,
        image_size: int | None = None,
        num_workers: int | None = None,
        preset: Preset = "natural",
        color_ops: ColorOps | None = None,
        crop_sampling: CropSampling | None = None,
        augmentation: Overrides | None = None,
        max_bad_fraction: float = 0.01,
        in_memory: bool | None = None,
        channel_axis: ChannelAxis | None = None,
        value_range: tuple[float, float] | None = None,
        patch_size: int = DEFAULT_PATCH_SIZE,
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
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(f"data.max_bad_fraction is a share of the images, 0 to 1, got {max_bad_fraction}")
        check_subset(subset)
        self.source, self.root, self.subset, self.preset = source, root, subset, preset
        self.channel_axis, self.patch_size = channel_axis, patch_size
        self.value_range: ValueRange | None = as_value_range(value_range) if value_range is not None else None
        self.train_split, self.test_split = train_split, test_split
        self.image_key, self.label_key = image_key, label_key
        self.global_batch_size, self.num_workers, self.in_memory = global_batch_size, num_workers, in_memory
        self.requested_image_size, self.seed = image_size, seed
        self.max_bad_fraction = max_bad_fraction
        self.unreadable: dict[int, str] = {}  # the training images that this rank met and could not read, with reasons
        self.unreadable_held_out: dict[int, str] = {}  # likewise held-out images; whoever reads them tells
        self.wait_clock = WaitClock()
        self.train_source: Source | None = None
        self.test_source: Source | None = None
        self._dataset: ViewsDataset | None = None
        self._restored: Position | None = None

    def setup(self, stage: str | None = None) -> None:
        """Opens the source and checks the batch against it, before anything is trained or written."""
        self._restored = None
        if self.train_source is None:
            self.train_source = self.open_training_images()
            has_labels = (self.train_source.labels >= 0).any()
            self.test_source = self.open_part("test") if has_labels else None
        # Anew at each call: the ranks are known only once a trainer is attached, maybe another one than last time.
        self._sampler = self._make_sampler(len(self.train_source))
        if self._dataset is None:
            self.settle(self.train_source)
            pixels = load_pixels(self.train_source, self.in_memory, self.unreadable, self.value_range)
            self._dataset = self.views_of(self.train_source, pixels)

    def settle(self, source: Source) -> None:
        """Takes from a source what the settings leave open: channels, range of the values and size of the views.

        Raises:
            InputError: the augmentation or the settings do not fit its images.
        """
        self.channels = channels_of(source)
        self.augmentation.require_channels(self.channels)
        if self.value_range is None:
            self.value_range = measure_value_range(source, self.seed)
        elif not takes_value_range(source, self.seed):
            raise InputError(f"data.value_range is for arrays and 16-bit pictures; those of {source.name} have 8 bits")
        self.image_size = self.requested_image_size or _natural_size(first_readable(source, self.value_range))

    def views_of(self, source: Source, pixels: PixelTable | None = None) -> ViewsDataset:
        """The batches of views of a source that :meth:`settle` has seen, whose images may be in memory."""
        return ViewsDataset(
            source, self.augmentation, self.image_size, self.seed, pixels, self.unreadable, self.value_range
        )

    def varied(self, *, seed: int, global_batch_size: int) -> "SimCLRDataModule":
        """The same images, opened and decoded once, in the order, draws and batches of other settings.

        A subset and a seeded split stay those of this module's own seed.

        Raises:
            InputError: the batch does not fit the images.
        """
        if self._dataset is None:
            self.setup()
        assert self._dataset is not None
        assert self.train_source is not None
        other = copy.copy(self)
        other.seed, other.global_batch_size, other.trainer = seed, global_batch_size, None
        other._dataset = other.views_of(self.train_source, self._dataset.pixels)
        other._sampler = other._make_sampler(len(self.train_source))
        return other

    def batch_of(self, epoch: int, place: int, indices: Sequence[int]) -> Batch:
        """The finished views of some training images, as the batch at a place in an epoch, from 0, has them."""
        if self._dataset is None:
            self.setup()
        assert self._dataset is not None
        batch = self._dataset.__getitems__([Key(epoch, index, place) for index in indices])
        return finish_views(batch, self.augmentation, self.image_size)

    def open_training_images(self) -> Source:
        """The images to train on: the training part, or a subset of it."""
        return take_subset(self.open_part("train"), self.subset, self.seed)

    def open_part(self, split: Literal["train", "test"]) -> Source:
        """One part of the data set, as the settings name it."""
        return open_source(
            self.source,
            root=self.root,
            split=split,
            train_split=self.train_split,
            test_split=self.test_split,
            image_key=self.image_key,
            label_key=self.label_key,
            seed=self.seed,
            channels=_CHANNELS.get(self.preset, 3),
            arrays=self.preset in _ARRAYS,
            channel_axis=self.channel_axis,
            patch_size=self.patch_size,
        )

    def _make_sampler(self, num_images: int) -> GlobalBatchSampler:
        rank, world_size = self._share()
        return GlobalBatchSampler(
            num_images,
            self.global_batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            position=self._start,
        )

    def _share(self) -> World:
        """Which part of a batch is this rank's, of how many. Tensor-parallel partners have the same one."""
        if self.trainer is None:
            return World(0, 1)
        module = getattr(self.trainer, "lightning_module", None)
        if (mesh := getattr(module, "device_mesh", None)) is not None:
            return world(data_parallel_group(mesh))
        return World(self.trainer.global_rank, self.trainer.world_size)

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

    def notes(self) -> list[str]:
        """What a person should know of the data before training begins, a line each."""
        assert self.train_source is not None, "Lightning calls setup first"
        count, notes = len(self.train_source), []
        if count < _FEW_IMAGES:
            notes.append(
                f"warning: {count:,} training images are few: features learned from them alone seldom beat those of "
                "ImageNet weights; start from such weights (--model.init_from timm:resnet18, with a model.encoder they "
                "fit), take a smaller batch, which gives more steps, and compare with knn --encoder timm:resnet18"
            )
        left_out = count - len(self._sampler) * self.global_batch_size
        if left_out:
            notes.append(
                f"the last {left_out:,} of {count:,} images of each epoch's order, other ones every epoch, "
                f"are left out: they do not fill a batch of {self.global_batch_size}"
            )
        return notes

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 where there are none."""
        return len(self.train_source.classes) if self.train_source is not None else 0

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self._dataset is not None, "Lightning calls setup first"
        workers = self.worker_count()
        device = self.trainer.strategy.root_device if self.trainer is not None else None
        loader = TimedLoader(
            self._dataset,
            batch_sampler=self._sampler,
            num_workers=workers,
            collate_fn=keep,
            worker_init_fn=outlive_first_sigterm,
            persistent_workers=workers > 0,
            pin_memory=device is not None and device.type == "cuda",
        )
        loader.clock = self.wait_clock = WaitClock(device)
        return loader

    def worker_count(self) -> int:
        """Processes that decode images on this rank."""
        if self.num_workers is not None:
            return self.num_workers
        if self._dataset is not None and self._dataset.pixels is not None:
            return 0
        return default_workers(self.trainer.num_devices if self.trainer is not None else 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "draws" in batch:
            self.unreadable.update(batch.get("unreadable", ()))
            return finish_views(batch, self.augmentation, self.image_size)
        return batch


def _natural_size(image: Tensor) -> int:
    shortest = min(image.shape[-2:])
    return shortest if shortest <= _SMALL_IMAGE else _PHOTOGRAPH
