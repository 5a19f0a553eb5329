"""The default number of decoding processes."""

import os

import pytest

from simclr_scale.data.workers import default_workers


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
