"""The share of time without a batch: much with a slow source, little with one in memory."""

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simclr_scale.data.sampler import Key
from simclr_scale.data.views import Batch, ViewsDataset
from tests.pretraining.runs import QUIET, arguments, pretrain

pytestmark = QUIET


def shares(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["data_wait"]) for row in csv.DictReader(file) if row["data_wait"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_source_is_waited_for(
    images: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ViewsDataset.__getitems__

    def slowly(dataset: ViewsDataset, keys: Sequence[Key]) -> Batch:
        # As long as ten steps take here, whatever else the machine is doing.
        start = time.perf_counter()
        batch = make(dataset, keys)
        time.sleep(0.5 + 5 * (time.perf_counter() - start))
        return batch

    monkeypatch.setattr(ViewsDataset, "__getitems__", slowly)
    options: tuple[Any, ...] = ("--trainer.max_epochs", "1", "--data.num_workers", str(workers))
    pretrain(arguments(images, tmp_path, "x", *options))
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert len(shares(tmp_path / "x")) == 2
    assert min(shares(tmp_path / "x")) > 0.5
    assert summary["data_wait"] > 0.5


def test_a_source_in_memory_is_not(images: Path, tmp_path: Path) -> None:
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "2"))
    assert len(shares(tmp_path / "x")) == 5
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["data_wait"] < 0.5
