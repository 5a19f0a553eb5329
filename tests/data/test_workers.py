"""The default number of decoding processes."""

import os

import pytest

from simclr_scale.data.workers import default_workers, killed_workers_explained
from simclr_scale.errors import RunFailed


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 2), (6, 1, 6), (64, 1, 8), (16, 4, 4), (7, 2, 3), (2, 4, 1)]
)
def test_one_a_core_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, workers: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_workers(ranks) == workers


@pytest.mark.parametrize(("cores", "workers"), [(4, 4), (None, 1)])
def test_machines_without_affinity(monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("DataLoader worker (pid 17) is killed by signal: Killed. ", r"\(pid 17\) was killed .*signal: Killed.*memory"),
        ("DataLoader worker (pid 17) is killed by signal: Terminated. ", r"ended from outside .*scheduler"),
        ("DataLoader worker (pid 17) is killed by signal: Segmentation fault. ", r"crashed .*faulthandler"),
        ("DataLoader worker (pid 17) is killed by signal: Bus error. It is possible that", "shared memory is full"),
        ("DataLoader worker (pid(s) 17, 18) exited unexpectedly", r"\(pid 17, 18\) is gone"),
        ("DataLoader worker (pid 17) exited unexpectedly with exit code 1. Details are", "ended with exit code 1"),
    ],
)
def test_what_torch_says_of_a_worker_that_is_gone_becomes_a_line(message: str, says: str) -> None:
    with pytest.raises(RunFailed, match=says) as caught, killed_workers_explained("; then rest"):
        raise RuntimeError(message)
    assert ("--data.num_workers" in str(caught.value)) == ("Terminated" not in message)
    assert str(caught.value).endswith("; then rest")
    assert "\n" not in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), killed_workers_explained():
        raise RuntimeError("size mismatch")
