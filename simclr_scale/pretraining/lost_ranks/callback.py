"""What counts as progress of a rank: whatever hook of training it passes, and every batch of an evaluation."""

from typing import Any

import pytorch_lightning as pl

from simclr_scale.pretraining.lost_ranks.beats import Pulse

_WAITING = "waiting for images"


class RankProgress(pl.Callback):
    """Tells a :class:`Pulse` where the training stands.

    All hooks are those that every rank passes, in the same order: a rank that has passed fewer is behind.
    """

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.pulse.move("setting up")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pulse.move("start of training", trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pulse.move(_WAITING)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.pulse.move("forward pass", trainer.global_step)

    def on_before_backward(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.pulse.move("backward pass")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.pulse.move("optimizer's step")

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.pulse.move("end of the step")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.pulse.move(_WAITING, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pulse.move("end of the epoch")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pulse.move("end of training")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pulse.move("end of the run")


def report_progress(trainer: Any, doing: str) -> None:
    """For what takes long within one hook."""
    for callback in trainer.callbacks:
        if isinstance(callback, RankProgress):
            callback.pulse.move(doing)
