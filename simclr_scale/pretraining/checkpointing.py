"""Checkpoints that are whole or not there: written beside, checksummed, moved into place."""

import hashlib
import math
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from simclr_scale.errors import InputError, RunFailed
from simclr_scale.pretraining.agreement import Agreement, Voter

_NAME = re.compile(r"step=\d+\.ckpt")
LAST = "last.ckpt"


class RunCheckpoint(Checkpoint, Voter):
    """Keeps the newest checkpoints of a run as ``step=N.ckpt``, each with a ``.sha256``, and ``last.ckpt``.

    Each is a file, or, under a strategy whose ranks write their shards, a folder of them.

    A checkpoint appears once the metrics of its last step are logged: it is written at the end of a step or an epoch,
    and moved into place when the next one starts. Whenever a run is killed, resuming loses and repeats no metric.
    Minutes count from the last checkpoint of any kind. Ranks agree on its step through the callback ``Agreement``,
    which has to be there.

    Args:
        every_n_epochs: epochs between checkpoints; there is always one at the end of training.
        every_n_steps: steps between further checkpoints within an epoch; None for none.
        keep: how many to keep.
        every_n_minutes: minutes between further ones; None for none.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        keep: int = 2,
        every_n_minutes: float | None = None,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "keep": keep}.items():
            if value is not None and value < 1:
                raise InputError(f"checkpoint.{name} must be at least 1, got {value}")
        if every_n_minutes is not None and not 0 < every_n_minutes < math.inf:
            raise InputError(f"checkpoint.every_n_minutes must be above 0, got {every_n_minutes}")
        self.every_n_epochs, self.every_n_steps, self.keep = every_n_epochs, every_n_steps, keep
        self.every_n_minutes = every_n_minutes
        self._last_time = time.monotonic()
        self.folder: Path | None = None
        self._last_step = -1
        self._written: Path | None = None
        self._requested = False

    def request(self) -> None:
        """Asks, on every rank at the same step, for a checkpoint at the end of the step that is under way."""
        self._requested = True

    def vote(self, trainer: Any, pl_module: Any) -> int:
        if self.every_n_minutes is None:
            return 0
        return int(time.monotonic() - self._last_time >= 60 * self.every_n_minutes)

    def decided(self, trainer: Any, pl_module: Any, vote: int) -> None:
        if vote:
            self.request()

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self._last_time = time.monotonic()
        if self.every_n_minutes is not None and not any(isinstance(other, Agreement) for other in trainer.callbacks):
            raise InputError("checkpoint.every_n_minutes needs the callback Agreement among those of the trainer")
        if self.folder is not None and trainer.is_global_zero:
            for leftover in self.folder.glob(".*.partial"):
                _remove(leftover)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.publish_written(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # The last batch of an epoch is left to the end of the epoch, whose state differs from that of its middle.
        due = self._requested or (self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0)
        if not trainer.is_last_batch and (due or _stops_here(trainer)):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        due = self._requested or epochs % self.every_n_epochs == 0
        if due or epochs == trainer.max_epochs or _stops_here(trainer):
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.publish_written(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self._written is not None:
            try:
                self._publish(self._written)
            except OSError as error:
                exception.add_note(self._failure(error, self._last_step))

    def _write(self, trainer: Any) -> None:
        self._requested, self._last_time = False, time.monotonic()
        if self.folder is None or trainer.global_step == self._last_step or trainer.fast_dev_run:
            return
        beside = self.folder / f".step={trainer.global_step}.ckpt.partial"
        failure = None
        try:
            trainer.save_checkpoint(beside)
        except OSError as error:
            failure = self._failure(error, trainer.global_step)
            with suppress(
                OSError
            ):  # half a file, whose room the end of the run may want; where even that fails, it stays
                if trainer.is_global_zero:
                    _remove(beside)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        _fail_together(trainer, failure)
        self._written, self._last_step = beside, trainer.global_step

    def publish_written(self, trainer: pl.Trainer) -> None:
        """Moves what was written at the last step into place; only once the metrics of that step are logged.

        Raises:
            RunFailed: on all ranks, where the file system takes it not.
        """
        written, self._written = self._written, None
        if written is None:
            return
        failure = None
        if trainer.is_global_zero:
            try:
                self._publish(written)
            except OSError as error:
                failure = self._failure(error, self._last_step)
        _fail_together(trainer, failure)

    def _publish(self, written: Path) -> None:
        path = written.with_name(f"step={self._last_step}.ckpt")
        publish(written, path)
        saved = checkpoints(path.parent)
        # Those of later steps belong to a course of the run that was left when it resumed before them.
        kept = [other for other in saved if _step(other) <= self._last_step][: self.keep]
        for old in saved:
            if old not in kept:
                _checksum_path(old).unlink(missing_ok=True)
                _remove(old)

    def _failure(self, error: OSError, step: int) -> str:
        assert self.folder is not None
        lying = [path for path in checkpoints(self.folder) if _step(path) < step]
        last = "there is no earlier one"
        if lying:
            last = f"{lying[0]} is whole, and --resume auto --name {self.folder.parent.name} continues from it"
        return f"the checkpoint of step {step} cannot be written to {self.folder}: {error.strerror or error}; {last}"


def _fail_together(trainer: Any, failure: str | None) -> None:
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise RunFailed(failure)


def _stops_here(trainer: pl.Trainer) -> bool:
    """Whether training ends with this step, be it in the middle of an epoch."""
    return trainer.should_stop or trainer.global_step == trainer.max_steps


def publish(beside: Path, path: Path) -> None:
    """Moves what was written into place with its checksum, and lets ``last.ckpt`` be the same.

    That is a second name of a file, and a link to a folder.
    """
    checksum = _checksum_path(path)
    partial = checksum.with_name(f".{checksum.name}.partial")
    partial.write_text(_checksums(beside, path.name))
    os.replace(partial, checksum)
    if path.exists() and (path.is_dir() or beside.is_dir()):
        # Of a course of the run that was left. No folder is replaced by a file, nor a file by a folder.
        _remove(path)
    os.replace(beside, path)
    link, last = path.with_name(f".{LAST}.partial"), path.with_name(LAST)
    link.unlink(missing_ok=True)
    try:
        if path.is_dir():
            link.symlink_to(path.name)
        else:
            os.link(path, link)
    except OSError:  # a file system without links
        if path.is_dir():
            return
        shutil.copyfile(path, link)
    os.replace(link, last)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _checksums(written: Path, name: str) -> str:
    """Lines as of ``sha256sum``: of a file, or of every file of a folder, under the name that it will have."""
    if written.is_file():
        return f"{sha256(written)}  {name}\n"
    return "".join(f"{sha256(file)}  {name}/{file.name}\n" for file in sorted(written.iterdir()))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("step=*.ckpt") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def is_intact(path: Path) -> bool:
    """Whether a checkpoint is what its checksum was made of, to the last file."""
    checksum = _checksum_path(path)
    if not checksum.is_file() or not path.exists():
        return False
    return checksum.read_text().split() == _checksums(path, path.name).split()


def newest_intact(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole, and the damaged ones that were passed over."""
    damaged: list[Path] = []
    for path in checkpoints(folder):
        if is_intact(path):
            return path, damaged
        damaged.append(path)
    return None, damaged
