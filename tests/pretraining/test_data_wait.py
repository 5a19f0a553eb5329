"""The share of time without a batch: much with a slow source, little with one in memory."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from simclr_scale.data.sampler import Key
from simclr_scale.data.views import Batch, ViewsDataset
from simclr_scale.pretraining import SimCLR
from tests.pretraining.runs import QUIET, arguments, pretrain

pytestmark = QUIET


def shares(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["data_wait"]) for row in csv.DictReader(file) if row["data_wait"]]


class Clock:
    """Seconds that pass only where a test says so: the share must not depend on what else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("reading", "training", "share"), [(3.0, 1.0, 0.75), (0.5, 2.0, 0.2), (0.0, 1.0, 0.0)])
def test_the_share_is_that_of_waiting_in_all_time(
    images: Path, tmp_path: Path, reading: float, training: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, make, step = Clock(), ViewsDataset.__getitems__, SimCLR.training_step

    def read(dataset: ViewsDataset, keys: Sequence[Key]) -> Batch:
        clock.now += reading
        return make(dataset, keys)

    def train(module: SimCLR, batch: Any, batch_idx: int) -> Tensor:
        clock.now += training
        return step(module, batch, batch_idx)

    monkeypatch.setattr(ViewsDataset, "__getitems__", read)
    monkeypatch.setattr(SimCLR, "training_step", train)
    monkeypatch.setattr("simclr_scale.data.waiting.time", clock)
    monkeypatch.setattr("simclr_scale.pretraining.data_wait.time", clock)
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "2", "--data.num_workers", "0"))
    assert len(shares(tmp_path / "x")) == 5
    # The loader reads one batch ahead to know the last, so that the first interval may hold one more.
    assert shares(tmp_path / "x")[1:] == pytest.approx([share] * 4, abs=0.13)
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["data_wait"] == pytest.approx(share, abs=0.08)
