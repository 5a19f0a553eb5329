"""Does the device wait for images? The share of training time that passes without a batch."""

import time
from typing import Any

import pytorch_lightning as pl

from simclr_scale.data.datamodule import SimCLRDataModule


class DataWait(pl.Callback):
    """Logs ``data_wait``: since the last logged step, the time spent waiting for a batch over all of it, 0 to 1.

    What lies between epochs (a kNN score, a checkpoint at their end) counts as neither. Of several ranks it is the one
    that waits longest: the others wait for it.
    """

    def __init__(self) -> None:
        self._wait = self._time = self._all_wait = self._all_time = 0.0

    @property
    def share(self) -> float | None:
        """Of this rank, over the whole run, its resumed parts included; None before the first step."""
        time_so_far = self._all_time + self._time
        return (self._all_wait + self._wait) / time_so_far if time_so_far > 0 else None

    def state_dict(self) -> dict[str, float]:
        return {"waited": self._all_wait + self._wait, "seconds": self._all_time + self._time}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._all_wait, self._all_time = state_dict["waited"], state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that is resumed in the middle of an epoch does not start that epoch again.
        self._mark = time.perf_counter(), _waited(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter(), _waited(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        (then, waited_then), self._mark = self._mark, (time.perf_counter(), _waited(trainer))
        now, waited = self._mark
        self._time += now - then
        self._wait += waited - waited_then
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0 and isinstance(_data(trainer), SimCLRDataModule):
            share = min(1.0, self._wait / self._time)
            pl_module.log("data_wait", share, sync_dist=True, reduce_fx="max")
            self._all_wait += self._wait
            self._all_time += self._time
            self._wait = self._time = 0.0


def _data(trainer: Any) -> Any:
    return getattr(trainer, "datamodule", None)


def _waited(trainer: pl.Trainer) -> float:
    data = _data(trainer)
    return data.wait_clock.seconds if isinstance(data, SimCLRDataModule) else 0.0
