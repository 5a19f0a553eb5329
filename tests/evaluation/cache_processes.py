"""``python -m tests.evaluation.cache_processes kills|waits FOLDER``: a cache of features and several processes.

``kills``: a process is killed (SIGKILL) at a step, another goes on; for every step in turn. A step is the moment before
or after a forward, and before or after a write to a file of the cache. ``waits``: a process that wants what another
computes. Prints the number of kills, or of waits. A process of its own, as it forks.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from simclr_scale.evaluation import cache, source_features
from tests.evaluation.counting import CountingEncoder, CountingSource
from tests.evaluation.synthetic import to_tensor

IMAGES, BATCH = 11, 3
BATCHES = 4


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    return child


class Stepping(CountingEncoder):
    """Tells of the moments before and after a forward."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.step = step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.step()
        features = super().forward(images)
        self.step()
        return features


def features(folder: Path, encoder: CountingEncoder) -> torch.Tensor:
    return source_features(encoder, CountingSource(IMAGES), to_tensor, batch_size=BATCH, cache=folder)[0]


def kill_at(number: int, folder: Path) -> bool:
    """Whether a process was killed at this step, or there were not so many."""
    steps = iter(range(10**6))

    def step() -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    class File:
        """As `open` gives it, with steps around every write."""

        def __init__(self, *arguments: object) -> None:
            self.file = open(*arguments)  # type: ignore[call-overload]  # noqa: SIM115

        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            step()
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            step()
            self.file.write(content[len(content) // 2 :])
            self.file.flush()
            step()

    def work() -> None:
        with mock.patch.object(cache, "open", File, create=True):
            features(folder, Stepping(step))

    status = os.waitpid(forked(work), 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def kills(folder: Path) -> int:
    whole = features(folder / "whole", Stepping(int))
    number = 0
    while kill_at(number, folder / "killed"):
        # Batches on record, by what the killed process had said last.
        journal = next((folder / "killed").glob("*/batches.jsonl"), None)
        recorded = 0 if journal is None else journal.read_bytes().count(b"\n")
        encoder = Stepping(int)
        assert torch.equal(features(folder / "killed", encoder), whole), number
        # The first forward is the probe; each of the process killed has two steps, and its batch six more.
        begun = max(0, -(-(number - 1) // 8))
        assert len(encoder.forwards) - 1 == BATCHES - recorded, number
        assert recorded >= begun - 1, (number, recorded, begun)
        shutil.rmtree(folder / "killed")
        number += 1
    assert torch.equal(features(folder / "killed", Stepping(int)), whole)
    return number


def waits(folder: Path) -> int:
    """The first process stops in its third batch until the second has said that it waits."""
    said = folder / "said"
    begun, may_go = os.pipe()

    def first() -> None:
        encoder = Stepping(int)

        def step() -> None:
            if len(encoder.forwards) == 3:
                os.write(may_go, b"x")
                while "waiting for another process" not in (said.read_text() if said.exists() else ""):
                    time.sleep(0.01)

        encoder.step = step
        features(folder / "shared", encoder)
        assert len(encoder.forwards) == 1 + BATCHES

    def second() -> None:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 2)
        encoder = Stepping(int)
        features(folder / "shared", encoder)
        assert len(encoder.forwards) == 1, encoder.forwards

    one = forked(first)
    os.read(begun, 1)
    two = forked(second)
    assert [os.waitpid(child, 0)[1] for child in (one, two)] == [0, 0], said.read_text()
    return 1


if __name__ == "__main__":
    # A fork does not take a pool of threads with it, and would wait for it for ever.
    torch.set_num_threads(1)
    print({"kills": kills, "waits": waits}[sys.argv[1]](Path(sys.argv[2])))
