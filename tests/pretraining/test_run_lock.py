"""One of two runs of one name wins, the other says so; and a lock ends with its process."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import pytorch_lightning as pl

from simclr_scale.errors import InputError
from simclr_scale.pretraining.run_lock import RunLock
from tests.pretraining.runs import QUIET, arguments, assert_same_run, pretrain

pytestmark = QUIET


class Second(pl.Callback):
    """Starts the same run again while this one is in mid-course, and keeps what the other says."""

    def __init__(self, command: list[str]) -> None:
        self.command, self.said = command, ""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == 7:
            with pytest.raises(InputError) as refused:
                pretrain(self.command)
            self.said = str(refused.value)


def test_the_second_says_so_and_harms_nothing(images: Path, tmp_path: Path) -> None:
    command = lambda name: [*arguments(images, tmp_path, name, "--trainer.max_epochs", "2"), "--resume", "auto"]  # noqa: E731
    pretrain(command("alone"))
    second = Second(command("x"))
    pretrain(command("x"), second)
    assert second.said == (
        f"run {tmp_path / 'x'} is being trained by another process; give another --name, or end that one first"
    )
    assert_same_run(tmp_path / "alone", tmp_path / "x")


def hold(folder: Path, connection: Connection) -> None:
    """Holds the lock, forks off a process that outlives it, as one that reads images may, and waits."""
    held = RunLock(folder).acquire()
    child = os.fork()
    if child == 0:
        signal.pause()
    connection.send((held, child))
    signal.pause()


@pytest.mark.slow
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path, there))
    holder.start()
    assert holder.pid is not None
    held, reader = here.recv()
    try:
        assert held
        assert not RunLock(tmp_path).acquire()
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        os.kill(reader, 0)  # is still there
        mine = RunLock(tmp_path)
        assert mine.acquire()
        assert not RunLock(tmp_path).acquire()
        mine.release()
        assert RunLock(tmp_path).acquire()
        assert os.listdir(tmp_path) == []
    finally:
        os.kill(reader, signal.SIGKILL)
