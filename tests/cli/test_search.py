"""The command search: trials, their scores and their resumption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.pretraining.run_folder import RunFolder
from simclr_scale.scaling.search import study
from tests.cli.commands import CHECKOUT, Outcome, write_images

Command = Callable[..., Outcome]

# Seconds a trial.
SHORT = (
    "--config=quickstart",
    "--widths=0.25,0.5",
    "--heads=16x2",
    "--data.global_batch_size=16",
    "--trainer.limit_train_batches=2",
    "--trainer.max_epochs=2",
    "--knn.max_train_images=200",
    "--checkpoint.every_n_epochs=1",
    "--data.num_workers=0",
)
TINY = "--encoders=simclr_resnet_tiny"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pictures", "red", "green", count=60)


def test_scores_and_linear_accuracy(command: Command, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    options = (*SHORT, TINY, f"--data.source={pictures}", "--knn.k=5", f"--folder={folder}")
    outcome = command("search", *options, "--trials=1")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"new search {folder}" in outcome.out
    assert "epoch 1, " in outcome.out
    # The same search, further; and then evaluated.
    outcome = command("search", *options, "--validate=linear", "--output", tmp_path / "s.json")
    assert outcome.status == 0, outcome
    report = json.loads((tmp_path / "s.json").read_text())
    assert f"going on with search {folder}" in outcome.out
    labels = ["simclr_resnet_tiny-w0.25-16x2", "simclr_resnet_tiny-w0.5-16x2"]
    assert sorted(row["label"] for row in report["trials"]) == labels
    for row in report["trials"]:
        run = folder / "runs" / row["label"]
        summary = json.loads((run / "summary.json").read_text())
        assert (row["outcome"], row["attempts"]) == ("complete", 1)
        assert row["score"] == row["facts"]["knn"] == pytest.approx(summary["knn_top1"]["trained"], abs=1e-4)
        assert 1 <= row["facts"]["rankme"] <= row["facts"]["features"]
        assert row["linear"] == json.loads((folder / "linear" / f"{row['label']}.json").read_text())["value"]["mean"]
        config = (run / "config.yaml").read_text()
        assert f"width: {row['label'].split('-w')[1].split('-')[0]}" in config
        assert "out_features: 16" in config
    assert report["best"] == report["trials"][0]["label"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")}
    assert command("search", *options, "--validate=linear").status == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")} == before
    refused = command("search", *options, "--score=rankme")
    assert refused.status == 2
    assert f"{folder} is a search with another score" in refused.err
    assert "another options" in command("search", *options, "--knn.k=6").err


def test_rankme_needs_no_labels(command: Command, tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "flat", count=60)
    options = (*SHORT, TINY, f"--data.source={pictures}", f"--folder={tmp_path / 's'}", "--trials=1")
    assert "--score knn needs labels" in command("search", *options).err
    outcome = command("search", *options, "--score=rankme", "--output", tmp_path / "s.json")
    assert outcome.status == 0, outcome
    [row] = json.loads((tmp_path / "s.json").read_text())["trials"]
    assert row["score"] == row["facts"]["rankme"]
    assert "knn" not in row["facts"]


def _start(folder: Path, pictures: Path, *more: str) -> subprocess.Popen:
    arguments = (*SHORT, TINY, f"--data.source={pictures}", "--knn.k=5", f"--folder={folder}", *more)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "simclr_scale", "search", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "workers"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_a_search_that_is_killed_goes_on(
    end: signal.Signals, workers: int, command: Command, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    long = ("--trainer.max_epochs=40", "--score_every=1", "--pruner=none")
    killed = _start(folder, pictures, *long, f"--workers={workers}")
    try:
        deadline = time.monotonic() + 200
        while len(found := sorted(folder.glob("runs/*/checkpoints/last.ckpt"))) < workers:
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(killed.pid, end)
        killed.wait(timeout=60)
    finally:
        killed.kill()
        killed.communicate(timeout=60)
    assert killed.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[end]
    # Its workers end with it: what they held is free.
    options = (*SHORT, TINY, f"--data.source={pictures}", "--knn.k=5", f"--folder={folder}", *long)
    outcome = command("search", *options, "--output", tmp_path / "s.json")
    assert outcome.status == 0, outcome
    rows = json.loads((tmp_path / "s.json").read_text())["trials"]
    assert [row["outcome"] for row in rows] == ["complete"] * 2
    assert sorted(row["attempts"] for row in rows) == ([2, 2] if workers == 2 else [1, 2])
    for path in found:
        log = (folder / "logs" / f"{path.parts[-3]}.txt").read_text()
        assert "continuing from" in log
        epochs = [line.split(",")[0] for line in (path.parents[1] / "metrics.csv").read_text().splitlines()[1:]]
        assert epochs == sorted(epochs, key=int)


@pytest.mark.slow
def test_two_processes_share_the_trials(pictures: Path, tmp_path: Path) -> None:
    process = _start(tmp_path / "s", pictures, "--workers=2", "--validate=linear", f"--output={tmp_path / 's.json'}")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    rows = json.loads((tmp_path / "s.json").read_text())["trials"]
    assert [(row["outcome"], row["attempts"]) for row in rows] == [("complete", 1)] * 2
    assert all(row["linear"] is not None for row in rows)


def test_a_trial_that_cannot_be_run_is_told_and_the_others_go_on(
    command: Command, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = RunFolder._take

    def full_for_one(self: RunFolder) -> str | None:
        return "the disk is full" if "w0.25" in self.folder.name else take(self)

    monkeypatch.setattr(RunFolder, "_take", full_for_one)
    options = (*SHORT, TINY, f"--data.source={pictures}", "--knn.k=5", f"--folder={tmp_path / 's'}")
    outcome = command("search", *options, "--output", tmp_path / "s.json")
    assert outcome.status == 0, outcome
    rows = {row["label"]: row for row in json.loads((tmp_path / "s.json").read_text())["trials"]}
    assert rows["simclr_resnet_tiny-w0.5-16x2"]["outcome"] == "complete"
    failed = rows["simclr_resnet_tiny-w0.25-16x2"]
    assert (failed["outcome"], failed["facts"]["reason"]) == ("failed", "the disk is full")
    assert "the disk is full" in (tmp_path / "s" / "logs" / "simclr_resnet_tiny-w0.25-16x2.txt").read_text()


MISTAKES = [
    ("", "the following arguments are required: folder, config"),
    ("--folder s --config quickstart", "give --encoders A,B or --space FILE: what to choose from"),
    ("--folder s --config quickstrt --encoders resnet18", "no configuration file or recipe 'quickstrt'; did you mean"),
    ("--folder s --config quickstart --encoders resnet19", "unknown encoder 'resnet19'; did you mean 'resnet18'"),
    ("--folder s --config quickstart --encoders=", "search: encoders is empty: there is nothing to choose from"),
    ("--folder s --config quickstart --encoders resnet18 --heads 128", "head '128', wanted OUTxLAYERS, such as 128x2"),
    ("--folder s --config quickstart --encoders resnet18 --widths wide", "width 'wide', wanted a number above 0"),
    ("--folder s --config quickstart --encoders resnet18 --space s.yaml", "--space names encoders, widths and heads"),
    ("--folder s --config quickstart --space no.yaml", "no.yaml: it cannot be read as YAML"),
    ("--folder s --config quickstart --space s.yaml", "s.yaml: there is no entry 'encoder'"),
    ("--folder s --config quickstart --encoders resnet18 --trials 0", "--trials must be at least 1, got 0"),
    ("--folder s --config quickstart --encoders resnet18 --workers 0", "--workers must be at least 1, got 0"),
    ("--folder s --config quickstart --encoders resnet18 --score loss", "score: expected one of 'knn', 'rankme'"),
    ("--folder s --config quickstart --encoders resnet18 --pruner no", "pruner: expected one of 'median', 'halving'"),
    ("--folder s --config quickstart --encoders resnet18 --trails 3", "there is no option trails; did you mean trials"),
    (
        "--folder s --config quickstart --encoders resnet18 --data.sorce x",
        "there is no option data.sorce; did you mean",
    ),
    ("--folder s --config quickstart --encoders resnet18 --data.source x", "no such folder; a source is a"),
    (
        "--folder s --config quickstart --encoders resnet18 --model.encoder.name x",
        "--model.encoder.name is the search's",
    ),
    ("--folder s --config quickstart --encoders resnet18 --trainer.devices 2", "--trainer.devices is the search's own"),
    ("--folder s --config quickstart --encoders resnet18 --output s.yaml", "s.yaml exists already"),
    ("--folder . --config quickstart --encoders simclr_resnet_tiny", ". is not empty and no search"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("encoder: [resnet18]\n")
    assert line in refusal("search", *options.split())


def test_without_optuna(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "optuna", None)
    line = refusal("search", "--folder", "s", "--config", "quickstart", TINY)
    assert line == 'search needs Optuna: pip install "simclr_scale[search]"'
