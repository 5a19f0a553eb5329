"""Two thousand steps on two processes: nothing grows."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pretraining.runs import QUIET, arguments
from tests.pretraining.two_ranks import RANKS, TwoRanks, two_ranks

pytestmark = [QUIET, pytest.mark.slow]

STEPS_AN_EPOCH = 5
# What is allocated once (the first evaluation, the second of the checkpoints that are kept) lies before the first look.
WARM, END = 300, 2300
TOLERANCE = 0.05


class Use(NamedTuple):
    """Of one process; memory in bytes that the system has given to it alone, and shared parts by their share."""

    memory: int
    files: int
    threads: int


def use(pid: int) -> Use:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [proportional] = [line for line in rollup if line.startswith("Pss:")]
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    [threads] = [line for line in status if line.startswith("Threads:")]
    return Use(int(proportional.split()[1]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(threads.split()[1]))


def median_use(run: TwoRanks, seconds: float = 4.0) -> dict[str, Use]:
    """By name of the process, over some seconds: what a step or a checkpoint takes for a moment is no leak."""
    looks: dict[str, list[Use]] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for rank in (0, 1):
            looks.setdefault(f"rank {rank}", []).append(use(run.rank(rank)))
            for number, pid in enumerate(sorted(run.workers(rank))):
                with suppress(FileNotFoundError):  # one that ended with its epoch
                    looks.setdefault(f"worker {number} of rank {rank}", []).append(use(pid))
    return {
        name: Use(*(sorted(values)[len(values) // 2] for values in zip(*of_one, strict=True)))
        for name, of_one in looks.items()
    }


def test_memory_files_and_threads_stay(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (*RANKS, "--data.in_memory", "false", "--data.num_workers", "1", "--checkpoint.every_n_epochs", "20")
    epochs = ("--trainer.max_epochs", "100000", "--knn.every_n_epochs", "100", "--timeout", "300")
    folder = tmp_path / "x" / "checkpoints"
    with two_ranks(arguments(images, tmp_path, "x", *options, *epochs, "--checkpoint.keep", "1000")) as run:
        run.reach(folder / f"step={WARM}.ckpt")
        before = median_use(run)
        run.reach(folder / f"step={END}.ckpt")
        after = median_use(run)
        run.process.terminate()
        run.process.communicate()
    assert run.process.returncode == 143
    with capsys.disabled():
        for name, first in before.items():
            grown = after[name].memory / first.memory - 1
            print(f"\n{name}: {first.memory / 2**20:.1f} MiB {grown:+.2%}, {first} -> {after[name]}", end="")
    assert before.keys() == after.keys()
    for name, first in before.items():
        last = after[name]
        assert abs(last.memory / first.memory - 1) < TOLERANCE, name
        assert (last.files, last.threads) == (first.files, first.threads), name
