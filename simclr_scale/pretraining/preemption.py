"""SIGTERM and SIGUSR1: a checkpoint within one step, then the end of the process or a place in SLURM's queue."""

import os
import signal
import subprocess
import threading
from types import FrameType, SimpleNamespace
from typing import Any

import pytorch_lightning as pl

from simclr_scale.errors import Preempted, RunFailed
from simclr_scale.pretraining.agreement import Voter, largest_votes
from simclr_scale.pretraining.checkpointing import RunCheckpoint

# In the order of their weight: whoever is told to end ends, even if another rank is told to write a checkpoint.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption(pl.Callback, Voter):
    """Answers the signals that a scheduler sends before it takes the machine away.

    SIGTERM: a checkpoint of the step that is under way, then :class:`~simclr_scale.errors.Preempted`. SIGUSR1: the
    same and ``scontrol requeue`` in a job of SLURM; elsewhere a checkpoint, and the run goes on. It is enough that one
    rank gets the signal. At the end of an epoch the epoch's kNN score comes before the checkpoint, which holds it.

    Lightning's own handlers are not installed: of several ranks they broadcast within the handler, which hangs where
    the ranks are at different places, and under SLURM they write a checkpoint of another name at once, in the middle
    of a step.

    Args:
        name: of the run, for the message.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._received = 0  # 1 + the index in _SIGNALS
        self._stops_by: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        trainer._signal_connector = SimpleNamespace(
            received_sigterm=False, register_signal_handlers=lambda: None, teardown=lambda: None
        )
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, 1 + _SIGNALS.index(signal.Signals(number)))

    def vote(self, trainer: Any, pl_module: Any) -> int:
        received, self._received = self._received, 0
        return received

    def decided(self, trainer: Any, pl_module: Any, vote: int) -> None:
        if not vote:
            return
        if (checkpoint := _checkpoint(trainer)) is not None:
            checkpoint.request()
        number = _SIGNALS[vote - 1]
        if number == signal.SIGTERM or "SLURM_JOB_ID" in os.environ:
            self._stops_by = number

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # One that came since the last step. What is left after this needs no checkpoint: SIGTERM then ends it at once.
        [vote] = largest_votes([self.vote(trainer, pl_module)], trainer.strategy.root_device)
        self.decided(trainer, pl_module, vote)
        self._stop(trainer)
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else former)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def _stop(self, trainer: Any) -> None:
        """Ends the run, once the metrics of its last step are logged."""
        if self._stops_by is None:
            return
        number, self._stops_by = self._stops_by, None
        if (checkpoint := _checkpoint(trainer)) is not None:
            checkpoint.publish_written(trainer)
        step = trainer.global_step
        failure = requeue() if number == signal.SIGUSR1 and trainer.is_global_zero else None
        # No rank leaves before the checkpoint is in place: a launcher may end the others with the first that does.
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise RunFailed(
                f"the checkpoint of step {step} is written, but {failure}; submit the job again with "
                f"--resume auto --name {self.name}"
            )
        requeued = "and requeued " if number == signal.SIGUSR1 else ""
        raise Preempted(
            f"ended {requeued}by {number.name} with a checkpoint of step {step}; "
            f"--resume auto --name {self.name} continues"
        )


def requeue() -> str | None:
    """Puts the job of SLURM that this process belongs to back into the queue; returns what went wrong, if anything."""
    job = os.environ["SLURM_JOB_ID"]
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) and (task := os.environ.get("SLURM_ARRAY_TASK_ID")):
        job = f"{array}_{task}"
    command = ["scontrol", "requeue", job]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{' '.join(command)} cannot be run ({error.strerror})"
    if result.returncode:
        said = " ".join((result.stderr or result.stdout).split())
        return f"{' '.join(command)} failed with status {result.returncode}{f' ({said})' if said else ''}"
    return None


def _checkpoint(trainer: Any) -> RunCheckpoint | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, RunCheckpoint)), None)
