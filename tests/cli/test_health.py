"""The command health."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.bundle import load_encoder
from simclr_scale.data.augmentation import resolve
from simclr_scale.data.sources import open_source
from simclr_scale.evaluation import evaluate_health
from tests.cli.commands import Outcome, TrainedRun, files_below, write_images

Command = Callable[..., Outcome]


def test_health_of_a_run_on_held_out_images(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    before, output = files_below(trained.folder), tmp_path / "h.json"
    what = ("--encoder", trained.folder, "--data.source", "textures", "--data.max_images", 60)
    outcome = command("health", *what, "--output", output)
    assert outcome.status == 0, outcome.err
    record = json.loads(output.read_text())
    assert record["encoder"]["spec"] == str(trained.folder)
    assert record["images"]["images"] == 60
    assert "test" in record["images"]["split"]
    assert f"{record['values']['rankme']:.3f}" in outcome.out
    assert f"{record['values']['alignment']:.3f}" in outcome.out
    assert files_below(trained.folder) == before


def test_it_is_the_function_of_that_name(command: Command, tmp_path: Path) -> None:
    images, output = write_images(tmp_path / "images", "red", "green", count=15), tmp_path / "h.json"
    options = ("--batch_size", 4, "--preset", "natural", "--data.seed", 7, "--data.num_workers", 0)
    outcome = command("health", "--encoder", "pixels:4", "--data.source", images, *options, "--output", output)
    assert outcome.status == 0, outcome.err
    record = json.loads(output.read_text())
    test = open_source(str(images), split="test", seed=7)
    expected = evaluate_health(*load_encoder("pixels:4"), test, resolve("natural", {}), batch_size=4, seed=7)
    assert record["values"] == dict(expected.values)
    assert record["settings"]["augmentation"]["strength"] == 1.0
    assert record["warnings"] == list(expected.warnings)
    assert expected.warnings[0] in " ".join(outcome.out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("classes", "choice", "images"),
    [
        (("red", "green"), None, 6),
        (("red", "green"), "test", 6),
        (("red", "green"), "train", 24),
        (("red", "green"), "all", 30),
        ((), None, 15),
        ((), "all", 15),
    ],
)
def test_held_out_images_or_all(
    classes: tuple[str, ...], choice: str | None, images: int, command: Command, tmp_path: Path
) -> None:
    folder, output = write_images(tmp_path / "images", *classes, count=15), tmp_path / "h.json"
    options = ("--data.images", choice) if choice else ()
    what = ("--encoder", "pixels:4", "--data.source", folder, "--data.num_workers", 0)
    outcome = command("health", *what, *options, "--output", output)
    assert outcome.status == 0, outcome.err
    assert json.loads(output.read_text())["images"]["images"] == images


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--data.images", "tests"), "test"),
        (("--data.max_images", 1), "data.max_images must be at least 2"),
        (("--batch_size", 0), "--batch_size must be at least 1"),
        (("--preset", "gray"), "grey"),
        (("--output", "no/folder/h.json"), "no folder"),
        (("--encoder", "nothing"), "there is no encoder"),
    ],
)
def test_mistakes_are_one_line(refusal: Callable[..., str], options: tuple[object, ...], says: str) -> None:
    line = refusal("health", "--encoder", "pixels:4", "--data.source", "textures", *options)
    assert says in line


def test_an_unlabelled_folder_has_nothing_held_out(refusal: Callable[..., str], tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=5)
    line = refusal("health", "--encoder", "pixels:4", "--data.source", folder, "--data.images", "test")
    assert "no test part" in line
