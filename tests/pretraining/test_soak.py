"""Two thousand steps on two processes: nothing grows."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pretraining.runs import QUIET, arguments
from tests.pretraining.two_ranks import RANKS, TwoRanks, two_ranks

pytestmark = [QUIET, pytest.mark.slow]

STEPS_AN_EPOCH = 5
EPOCHS_A_CHECKPOINT = 20
# What is allocated once (the first evaluation, the second of the checkpoints that are kept) lies before the first look.
WARM, END = 300, 2300
TOLERANCE = 0.05
# Less than one in each of the evaluations, or in each of the twenty checkpoints, between the looks.
MORE_FILES = 3


class Use(NamedTuple):
    """Of one process.

    ``memory``: bytes of its own, and its share of what it shares with the other processes of the run. Libraries, which
    are mapped from files, are left out: whose share they are depends on what else runs on this machine.
    """

    memory: int
    files: int
    threads: int


def use(pid: int) -> Use:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = [int(line.split()[1]) for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    [threads] = [line for line in status if line.startswith("Threads:")]
    return Use(sum(own) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(threads.split()[1]))


def lowest_use(run: TwoRanks, seconds: float = 8.0) -> dict[str, Use]:
    """By name of the process, over some seconds: a batch on its way holds memory and a file, and is no leak."""
    pids = {f"rank {rank}": run.rank(rank) for rank in (0, 1)}
    for rank in (0, 1):
        pids |= {f"worker {number} of rank {rank}": pid for number, pid in enumerate(sorted(run.workers(rank)))}
    looks: dict[str, list[Use]] = {name: [] for name in pids}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, pid in pids.items():
            looks[name].append(use(pid))
        time.sleep(0.01)
    return {name: Use(*map(min, zip(*of_one, strict=True))) for name, of_one in looks.items()}


def test_memory_files_and_threads_stay(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        *RANKS,
        "--data.in_memory",
        "false",
        "--data.num_workers",
        "1",
        "--checkpoint.every_n_epochs",
        str(EPOCHS_A_CHECKPOINT),
    )
    epochs = ("--trainer.max_epochs", "100000", "--knn.every_n_epochs", "100", "--timeout", "300")
    folder = tmp_path / "x" / "checkpoints"
    with two_ranks(arguments(images, tmp_path, "x", *options, *epochs, "--checkpoint.keep", "1000")) as run:
        run.reach(folder / f"step={WARM}.ckpt")
        before = lowest_use(run)
        # One after the other: the wait for each has an end.
        for step in range(WARM, END + 1, STEPS_AN_EPOCH * EPOCHS_A_CHECKPOINT):
            run.reach(folder / f"step={step}.ckpt")
        after = lowest_use(run)
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
        assert last.memory / first.memory - 1 < TOLERANCE, name
        assert last.files <= first.files + MORE_FILES, name
        assert last.threads == first.threads, name
