"""The score of an encoder while it trains, for a search: kNN with labels, RankMe without."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import extract_features, image_loader
from simclr_scale.evaluation.health import rankme
from simclr_scale.pretraining.knn_monitor import KNNMonitor

Score = Literal["knn", "rankme"]

# Of the training images, for RankMe: the paper's figure (Garrido et al. 2023) takes a GPU for so small a question.
RANKED_IMAGES = 4096


class Pruned(Exception):
    """This training is not worth going on with."""


class TrialScore(pl.Callback):
    """Scores the encoder every few epochs and at the end, and ends a training that compares badly.

    Args:
        kind: "knn", the run's own kNN top-1, or "rankme" of training images, whose labels are not looked at.
        every_n_epochs: between scores.
        report: is told epoch and score, and says whether to end.
    """

    def __init__(self, kind: Score, every_n_epochs: int, report: Callable[[int, float], bool]) -> None:
        self.kind, self.every_n_epochs, self.report = kind, every_n_epochs, report
        self.last: float | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch == trainer.max_epochs or epoch % self.every_n_epochs:
            return
        if self.report(epoch, self.measure(trainer, pl_module)):
            raise Pruned

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also of a run that was finished before its score was noted."""
        self.last = self.measure(trainer, pl_module)

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> float:
        """The score of the encoder as it is now."""
        return knn_top1(trainer, pl_module) if self.kind == "knn" else rank_of(trainer, pl_module)


def knn_top1(trainer: pl.Trainer, pl_module: Any) -> float:
    """Of the run's own monitor. Raises InputError where no image has a label."""
    monitor = next((callback for callback in trainer.callbacks if isinstance(callback, KNNMonitor)), None)  # type: ignore[attr-defined]
    if monitor is None or trainer.datamodule.test_source is None:  # type: ignore[attr-defined]
        raise InputError("--score knn needs labels, and these images have none: take --score rankme")
    return monitor.trained_top1(trainer, pl_module)


def rank_of(trainer: pl.Trainer, pl_module: Any) -> float:
    """RankMe of training images, evenly spaced."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    count = len(data.train_source)
    indices = np.linspace(0, count - 1, min(RANKED_IMAGES, count)).round().astype(int).tolist()
    loader = image_loader(data.train_source, pl_module.transform, indices=indices, num_workers=data.worker_count())
    device = trainer.strategy.root_device
    with torch.autocast(device.type, enabled=False):
        features, _, _ = extract_features(pl_module.encoder, loader, device=device, unreadable=dict(data.unreadable))
    return rankme(features)
