"""The command noise-scale."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import Outcome, TrainedRun, start_command

Command = Callable[..., Outcome]


def test_along_training(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    files = ("--output", tmp_path / "n.json", "--plot", tmp_path / "n.png")
    outcome = command("noise-scale", "--run", trained.folder, "--batches", 4, *files)
    assert outcome.status == 0
    result = json.loads((tmp_path / "n.json").read_text())
    assert [row["step"] for row in result["rows"]] == [3, 6]
    assert {row["batch"] for row in result["rows"]} == {16}
    assert all(row["noise_of_one_image"] > 0 for row in result["rows"])
    assert (tmp_path / "n.png").stat().st_size > 10_000
    one = trained.folder / "checkpoints" / "step=6.ckpt"
    again = command("noise-scale", "--checkpoint", one, "--batches", 4, "--output", tmp_path / "one.json")
    assert again.status == 0
    assert json.loads((tmp_path / "one.json").read_text())["rows"] == result["rows"][1:]


def test_negatives_and_batch_are_two_things(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    one = ("--checkpoint", trained.folder / "checkpoints" / "step=6.ckpt", "--batch_size", 32)
    for mode in ("probe", "jackknife"):
        what = ("--negatives", 8, "--mode", mode, "--batches", 2, "--parts", 2, "--output", tmp_path / mode)
        assert command("noise-scale", *one, *what).status == 0
        (row,) = json.loads((tmp_path / mode).read_text())["rows"]
        assert (row["batch"], row["negatives_per_view"]) == (32, 14)


@pytest.mark.slow
def test_ranks_measure_the_same(trained: TrainedRun, tmp_path: Path) -> None:
    what = ("noise-scale", "--checkpoint", trained.folder / "checkpoints" / "step=6.ckpt", "--batches", 3)
    for ranks in (1, 2):
        outcome = start_command(*what, "--output", tmp_path / f"{ranks}.json", cwd=tmp_path, ranks=ranks)
        assert outcome.status == 0, outcome.err
    (one,), (two,) = (json.loads((tmp_path / f"{ranks}.json").read_text())["rows"] for ranks in (1, 2))
    assert two["noise_of_one_image"] == pytest.approx(one["noise_of_one_image"], rel=1e-3)
    assert two["gradient_squared"] == pytest.approx(one["gradient_squared"], rel=1e-3)


MISTAKES = [
    ("", "give --run FOLDER (all of its checkpoints), or --checkpoint FILE"),
    ("--run nowhere", "--run nowhere: there is no such run"),
    ("--run empty", "empty is not a run: it has no config.yaml"),
    ("--run unstarted", "run unstarted has no checkpoint yet"),
    ("--checkpoint no.ckpt", "--checkpoint no.ckpt: there is no such checkpoint"),
    ("--run runs/x --mode free", "--mode: there is no 'free'; there are probe, per_rank, jackknife"),
    ("--run runs/x --mode per_rank", "mode per_rank compares the gradients of ranks, and there is one"),
    ("--run runs/x --mode per_rank --force true", "mode per_rank compares the gradients of ranks, and there is one"),
    ("--run runs/x --batches 1", "--batches must be at least 2, got 1"),
    ("--run runs/x --batch_size 99999", "a batch of 99999 images is larger than the training set of"),
    (
        "--run runs/x --batch_size 20 --negatives 8",
        "--batch_size: 20 images (of a rank) do not divide into groups of 8",
    ),
    ("--run runs/x --batch_size 16 --negatives 1", "a group needs 2 images at least, got 1"),
    ("--run runs/x --mode jackknife --batch_size 10", "parts of equal size, 2 of them at least: 10 images, 8 parts"),
    ("--run runs/x --output old.json", "old.json exists already"),
    ("--run runs/x --plot new.doc", "--plot new.doc: the name of a picture ends in .png"),
    ("--run runs/x --source nowhere", "no such folder"),
    ("--run runs/x --step 3", "there is no option step"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, run: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unstarted" / "checkpoints").mkdir(parents=True)
    (tmp_path / "unstarted" / "config.yaml").write_text((run / "config.yaml").read_text())
    assert line in refusal("noise-scale", *options.split())


def test_the_weights_of_another_network(run: Path, refusal: Callable[..., str]) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("- 96\n", "- 64\n"))
    assert "its weights do not fit the run's configuration" in refusal("noise-scale", "--run", run)


@pytest.mark.slow
def test_per_rank_is_refused_with_the_reason(trained: TrainedRun, tmp_path: Path) -> None:
    # torchrun takes --run for a short form of an option of its own.
    what = ("noise-scale", "--checkpoint", trained.folder / "checkpoints" / "step=6.ckpt", "--mode", "per_rank")
    outcome = start_command(*what, cwd=tmp_path, ranks=2)
    assert "mode per_rank is wrong for NTXentLoss with negatives from all ranks" in outcome.err
    assert outcome.status != 0
    forced = start_command(*what, "--force", "true", "--batches", "2", cwd=tmp_path, ranks=2)
    assert forced.status == 0, forced.err
