"""SIGKILL at ten moments, half of them while a checkpoint is written: the run ends as if nothing had been."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from simclr_scale.pretraining.checkpointing import checkpoints, newest_intact
from tests.pretraining.runs import QUIET, arguments, assert_same_run, pretrain

pytestmark = QUIET

KILLS = 10
HANGS_AFTER = 300.0


def quiet_run(command: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    pretrain(command)


def steps_there(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()


def kill(command: list[str], folder: Path, delay: float | None) -> None:
    """Starts or continues the run and kills it: in the midst of the second checkpoint, or a time after the first."""
    # A server that has imported everything and forks: each start then takes a moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pretraining.runs"])
    before = steps_there(folder)
    process = context.Process(target=quiet_run, args=(command,))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + HANGS_AFTER
    while process.is_alive():
        assert time.monotonic() < deadline
        new = steps_there(folder) - before
        if any(name.startswith("step=") for name in new):
            if delay is not None:
                time.sleep(delay)
                break
            if any(name.startswith(".step=") for name in new):
                break
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_ends_as_the_unbroken_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--trainer.max_epochs", "40", "--knn.every_n_epochs", "20", "--checkpoint.every_n_steps", "2")
    pretrain(arguments(images, tmp_path, "unbroken", *options))
    command = [*arguments(images, tmp_path, "broken", *options), "--resume", "auto"]
    folder = tmp_path / "broken" / "checkpoints"
    draw = random.Random(0)
    half_written = 0
    for attempt in range(KILLS):
        kill(command, folder, draw.uniform(0.0, 0.4) if attempt % 2 else None)
        half_written += any(name.startswith(".step=") for name in os.listdir(folder))
        newest, damaged = newest_intact(folder)
        assert newest is not None
        assert damaged == []
    assert half_written > 0, "no kill came while a checkpoint was written"
    # And one that the file system has lost the end of.
    truncated, good = checkpoints(folder)[:2]
    os.truncate(truncated, truncated.stat().st_size // 2)
    capsys.readouterr()
    pretrain(command)
    out = capsys.readouterr().out
    assert f"{truncated} is damaged (its checksum differs) and is passed over" in out
    assert f"continuing from {good}" in out
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
