"""Is it learning? kNN accuracy on held-out images while training goes on, and beside three baselines at its end."""

import math
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from simclr_scale.bundle import ImageTransform, baseline
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.sources import Source
from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import extract_features, gather_features, image_loader
from simclr_scale.evaluation.knn import knn_classify
from simclr_scale.evaluation.metrics import top1
from simclr_scale.optim.lars_sharded import is_sharded
from simclr_scale.pretraining.apart import bring_weights_together
from simclr_scale.pretraining.lost_ranks import report_progress
from simclr_scale.pretraining.progress import RunProgress
from simclr_scale.pretraining.sharding import whole_encoder

_RGB = 3
_SIDE_OF_RAW_PIXELS = 16
# Raw pixels of hundreds of bands take a smaller side: neighbours are sought among all of them in memory.
_MOST_RAW_PIXELS = 8192
_BINS = {1: 64}


class KNNMonitor(pl.Callback):
    """Weighted kNN top-1 of the encoder, from training to held-out images, where the data has labels.

    The labels are looked at, never learnt from. The value is logged as ``knn_top1``.

    Args:
        every_n_epochs: epochs between measurements; there is always one before training and one at its end.
        k: neighbours that vote.
        temperature: of their weights, exp(similarity / temperature).
        max_train_images: a larger training set is searched through an evenly spaced part of this size; None for all.
        batch_size: images a forward.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        k: int = 200,
        temperature: float = 0.07,
        max_train_images: int | None = 50_000,
        batch_size: int = 256,
    ) -> None:
        sizes = {"every_n_epochs": every_n_epochs, "k": k, "batch_size": batch_size}
        if max_train_images is not None:
            sizes["max_train_images"] = max_train_images
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"knn.{name} must be at least 1, got {value}")
        if not temperature > 0:
            raise InputError(f"knn.temperature must be above 0, got {temperature}")
        self.every_n_epochs, self.k, self.temperature = every_n_epochs, k, temperature
        self.max_train_images, self.batch_size = max_train_images, batch_size
        self.untrained: float | None = None
        self.left_out = 0  # images of the last score that cannot be read
        self._trained: tuple[int, float] | None = None  # the step it was measured after, and the value

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.untrained = state_dict["untrained"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.untrained is None and _has_held_out_images(trainer):
            self.untrained = self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if (ends or (trainer.current_epoch + 1) % self.every_n_epochs == 0) and _has_held_out_images(trainer):
            value = self._measure(trainer, pl_module)
            self._trained = trainer.global_step, value
            pl_module.log("knn_top1", value, sync_dist=True)

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> float:
        bring_weights_together(trainer, pl_module)
        value = self.top1(trainer, pl_module.encoder, pl_module.transform)
        if isinstance(trainer.progress_bar_callback, RunProgress):
            trainer.progress_bar_callback.pause(trainer)
        return value

    def scores(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """The trained encoder beside three that learnt nothing; empty where no labels are held out.

        The others are raw pixels, histograms of the colours or of each band, and the encoder as it was before training.
        """
        if self.untrained is None:
            return {}
        baselines = {}
        for name, spec in baselines_for(pl_module.transform).items():
            channels, height, width = pl_module.transform.config["input_size"]
            # Small images are not enlarged: of hundreds of bands that would be most of the work.
            encoder, transform = baseline(spec, channels, min(64, height, width))
            baselines[name] = self.top1(trainer, encoder, transform.with_value_range(pl_module.transform.value_range))
        return {**baselines, "untrained": self.untrained, "trained": self.trained_top1(trainer, pl_module)}

    def trained_top1(self, trainer: pl.Trainer, pl_module: Any) -> float:
        """kNN top-1 of the encoder as it is now, measured anew only where steps were taken since the last time."""
        if self._trained is None or self._trained[0] != trainer.global_step:
            self._trained = trainer.global_step, self.top1(trainer, pl_module.encoder, pl_module.transform)
        return self._trained[1]

    def top1(self, trainer: pl.Trainer, encoder: nn.Module, transform: ImageTransform) -> float:
        """kNN top-1 of an encoder on the data of a run; every rank extracts its share and gets the same value."""
        data: SimCLRDataModule = trainer.datamodule  # type: ignore[attr-defined]
        assert data.train_source is not None
        assert data.test_source is not None
        if _is_sharded(encoder):
            # A whole copy: the shards of an encoder would have to meet for every batch, and ranks have as many as
            # they have images.
            whole = whole_encoder(encoder, everywhere=True)
            assert whole is not None
            encoder = whole
        device = trainer.strategy.root_device
        parts = []
        ranks = world()
        left_out = 0
        for source, limit, unreadable in (
            (data.train_source, self.max_train_images, data.unreadable),
            (data.test_source, None, data.unreadable_held_out),
        ):
            indices = labelled_images(source, limit)[ranks.rank :: ranks.size]
            loader = image_loader(
                source, transform, batch_size=self.batch_size, indices=indices, num_workers=data.worker_count()
            )
            report_progress(trainer, "features for kNN")
            with torch.autocast(device.type, enabled=False):
                features, labels, rows = extract_features(
                    encoder,
                    loader,
                    device=device,
                    unreadable=unreadable,
                    progress=lambda _: report_progress(trainer, "features for kNN"),
                )
            report_progress(trainer, "kNN")
            parts.append(gather_features(features, labels, rows)[:2])
            left_out += len(labelled_images(source, limit)) - len(parts[-1][1])
        self.left_out = left_out
        (train, train_labels), (test, test_labels) = parts
        return top1(knn_classify(train, train_labels, test, self.k, self.temperature), test_labels)


def baselines_for(transform: ImageTransform) -> dict[str, str]:
    """Names and specs of what learns nothing, for images of this transform."""
    channels, height, width = transform.config["input_size"]
    side = max(1, min(_SIDE_OF_RAW_PIXELS, height, width, math.isqrt(_MOST_RAW_PIXELS // channels)))
    histogram = "color_histogram" if channels == _RGB else "grey_histogram" if channels == 1 else "band_histogram"
    return {"raw_pixels": f"pixels:{side}", histogram: f"histogram:{_BINS.get(channels, 8)}"}


def _is_sharded(encoder: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in encoder.parameters())


def _has_held_out_images(trainer: pl.Trainer) -> bool:
    data = getattr(trainer, "datamodule", None)
    return isinstance(data, SimCLRDataModule) and data.test_source is not None


def labelled_images(source: Source, limit: int | None = None) -> list[int]:
    """At most ``limit`` of the images that have a label, evenly spaced."""
    labelled = np.flatnonzero(source.labels >= 0)
    if limit is not None and len(labelled) > limit:
        labelled = labelled[np.linspace(0, len(labelled) - 1, limit).round().astype(int)]
    return labelled.tolist()
