"""The first thing a user does, whole: the quickstart learns what it says, by two seeds of data and training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import simclr_scale

BASELINES = ("raw_pixels", "color_histogram", "untrained")


def quickstart(folder: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "simclr_scale", "pretrain", "--config", "quickstart", "--name", "run", *options]
    checkout = Path(simclr_scale.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for words in (
        "raw pixels",
        "colour histogram",
        "untrained encoder",
        "trained encoder",
        "run/encoder",
        "simclr-scale",
    ):
        assert words in done.stdout
    return json.loads((folder / "runs/run/summary.json").read_text())["knn_top1"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_trained_encoder_beats_what_learnt_nothing(tmp_path: Path, seed: int) -> None:
    scores = quickstart(tmp_path, "--seed_everything", str(seed))
    assert scores["trained"] >= 0.8
    assert all(scores["trained"] >= 2.5 * scores[name] for name in BASELINES)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        results.append(quickstart(tmp_path / name, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5"))
    assert results[0] == results[1]
    assert set(results[0]) == {*BASELINES, "trained"}
