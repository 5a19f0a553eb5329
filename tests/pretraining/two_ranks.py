"""Runs of two real processes, under Lightning's own launcher or torchrun, and what is left when they end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.pretraining.test_killed_worker import children, commands
from tests.pretraining.test_preemption import CHECKOUT, HANGS_AFTER, assert_gone, family, wait_for

RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
TORCHRUN = (*("-m", "torch.distributed.run"), *("--standalone", "--nproc_per_node", "2"))
ERROR = "simclr-scale pretrain: error: "


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(CHECKOUT), *filter(None, sys.path)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


class TwoRanks:
    """A started run.

    Args:
        arguments: of ``simclr-scale pretrain``.
        launcher: arguments of Python before ``-m simclr_scale``; none: Lightning starts the second process.
    """

    def __init__(self, arguments: list[str], launcher: tuple[str, ...] = ()) -> None:
        self.launched_by_torchrun = bool(launcher)
        self.everybody: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "simclr_scale", "pretrain", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment(),
        )

    def reach(self, path: Path) -> None:
        """Waits for a file of the run, and takes note of all its processes."""
        wait_for(path, self.process)
        self.everybody = family(self.process.pid)

    def rank(self, rank: int) -> int:
        """The pid of a rank."""
        if rank == 0 and not self.launched_by_torchrun:
            return self.process.pid
        for pid in family(self.process.pid)[1:]:
            found = re.search(rb"(?:^|\0)LOCAL_RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            if found and int(found[1]) == rank:
                return pid
        raise ProcessLookupError(f"there is no rank {rank}")

    def wait_for_rank(self, rank: int) -> int:
        """The pid of a rank as soon as there is one."""
        deadline = time.monotonic() + HANGS_AFTER
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(ProcessLookupError, FileNotFoundError):
                return self.rank(rank)
        raise AssertionError(f"rank {rank} does not come")

    def workers(self, rank: int) -> list[int]:
        """The pids of the processes that read images for a rank."""
        others = {self.rank(1 - rank)}
        pids = [pid for pid in children(self.rank(rank)) if pid not in others]
        return [pid for pid in pids if "resource_tracker" not in commands(pid)]

    def end(self) -> tuple[int, list[str]]:
        """Exit status, and the lines of simclr-scale on standard error."""
        self.process.wait(HANGS_AFTER)
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            lines = stream.read().splitlines()
        return self.process.returncode, [line for line in lines if line.startswith(ERROR)]


@contextmanager
def two_ranks(arguments: list[str], launcher: tuple[str, ...] = ()) -> Iterator[TwoRanks]:
    """A run that must have left no process when it ended."""
    run = TwoRanks(arguments, launcher)
    try:
        yield run
        assert_gone(run.everybody)
    finally:
        for pid in {*family(run.process.pid), *run.everybody}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()
