"""metrics.csv and events: every row once, in order, also over restarts."""

import csv
from pathlib import Path

import pytest
from pytorch_lightning.utilities import rank_zero_only

from simclr_scale.pretraining.logger import RunLogger
from tests.pretraining.runs import QUIET, StopAfter, arguments, pretrain


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_nothing_is_written_before_the_first_metric(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run")
    logger.log_hyperparams({"a": 1})
    logger.continue_from(0)
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_columns_that_appear_later(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    logger.log_metrics({"loss": 0.1, "epoch": 0}, 1)
    logger.log_metrics({"loss": 1 / 3, "epoch": 0}, 3)
    logger.log_metrics({"knn_top1": 0.5, "epoch": 0}, 3)
    logger.log_metrics({"loss": float("nan"), "epoch": 1}, 5)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,epoch,knn_top1",
        "1,0.1,0,",
        "3,0.3333333333333333,0,0.5",
        "5,nan,1,",
    ]
    logger.finalize("success")
    assert scalars(tmp_path, "knn_top1") == [(3, 0.5)]


def test_continues_where_a_run_was(tmp_path: Path) -> None:
    first = RunLogger(tmp_path)
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("failed")

    second = RunLogger(tmp_path)
    second.continue_from(4)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]
    for step in range(4, 8):
        second.log_metrics({"loss": 10.0 * step, "rate": 1.0}, step)
    second.finalize("success")
    assert [float(row["loss"]) for row in rows(tmp_path)] == [0, 1, 2, 3, 40, 50, 60, 70]
    assert scalars(tmp_path, "loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    RunLogger(tmp_path / "run").log_metrics({"loss": 1.0}, 0)
    assert not (tmp_path / "run").exists()


@QUIET
def test_rows_of_a_run(images: Path, tmp_path: Path) -> None:
    """A row's step is the index of its step: of 2 epochs with 5 steps, every second step and the last of each epoch."""
    options = ("--trainer.max_epochs", "2", "--knn.every_n_epochs", "1")
    pretrain(arguments(images, tmp_path, "run", *options))
    table = rows(tmp_path / "run")
    assert [(row["step"], row["epoch"]) for row in table] == [
        ("1", "0"), ("3", "0"), ("4", "0"), ("5", "1"), ("7", "1"), ("9", "1"),
    ]  # fmt: skip
    rates = {int(row["step"]): float(row["learning_rate"]) for row in table if "learning_rate" in row}
    peak = 0.3 * 8 / 256
    assert rates[1] == pytest.approx(peak / 5), "the second step of a warm-up over 5"
    assert rates[5] == pytest.approx(peak)
    assert [row["step"] for row in table if "knn_top1" in row] == ["4", "9"]
    assert {"loss", "contrastive_accuracy", "probe_loss", "probe_accuracy"} <= table[0].keys()
    assert [step for step, _ in scalars(tmp_path / "run", "loss")] == [1, 3, 5, 7, 9]


@QUIET
def test_events_of_a_resumed_run(images: Path, tmp_path: Path) -> None:
    command = arguments(images, tmp_path, "run", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1")
    pretrain(command, StopAfter(7))
    pretrain([*command, "--resume", str(tmp_path / "run" / "checkpoints" / "step=5.ckpt")])
    assert [step for step, _ in scalars(tmp_path / "run", "loss")] == list(range(10))
