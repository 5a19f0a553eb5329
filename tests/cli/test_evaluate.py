"""The commands knn and linear."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simclr_scale.bundle import load_encoder
from simclr_scale.data.sources import open_source
from simclr_scale.evaluation import Manifest, evaluate_knn, evaluate_linear
from tests.cli.commands import Outcome, TrainedRun, files_below, write_images

Command = Callable[..., Outcome]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", "red", "green", "blue", count=15)


def as_read(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(manifest.as_dict()))


def test_knn_of_a_run_on_textures(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    before = files_below(trained.folder)
    manifest = tmp_path / "m.json"
    outcome = command("knn", "--encoder", trained.folder, "--data.source", "textures", "--output", manifest)
    assert outcome.status == 0
    record = json.loads(manifest.read_text())
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert record["task"] == "knn"
    assert record["settings"] == {"k": 200, "temperature": 0.07, "similarity": "cosine"}
    assert record["encoder"]["spec"] == str(trained.folder)
    assert (record["train"]["images"], record["test"]["images"]) == (summary["train_images"], 1024)
    assert f"{record['value']['mean']:.2%}" in outcome.out
    assert files_below(trained.folder) == before


def test_knn_is_the_function_of_that_name(images: Path, command: Command, tmp_path: Path) -> None:
    options = ("--k", 3, "--temperature", 0.5, "--batch_size", 4, "--data.seed", 7, "--data.num_workers", 0)
    manifest = tmp_path / "m.json"
    what = ("--encoder", "pixels:4", "--data.source", images)
    assert command("knn", *what, *options, "--output", manifest).status == 0
    record = json.loads(manifest.read_text())
    train, test = (open_source(str(images), split=part, seed=7) for part in ("train", "test"))
    expected = as_read(evaluate_knn(*load_encoder("pixels:4"), train, test, k=3, temperature=0.5))
    assert record["settings"] == {"k": 3, "temperature": 0.5, "similarity": "cosine"}
    for key in ("value", "train", "test", "details", "warnings"):
        assert record[key] == expected[key]


def test_linear_of_a_run(trained: TrainedRun, images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("--encoder", trained.folder, "--data.source", images, "--data.num_workers", 0)
    outcome = command("linear", *what, "--l2", 0.001, "--output", manifest)
    assert outcome.status == 0
    record = json.loads(manifest.read_text())
    train, test = (open_source(str(images), split=part) for part in ("train", "test"))
    expected = as_read(evaluate_linear(*load_encoder(trained.folder), train, test, l2=0.001))
    assert record["task"] == "linear"
    assert record["settings"]["l2"] == 0.001
    for key in ("value", "train", "test", "settings"):
        assert record[key] == expected[key]
    assert f"{record['value']['mean']:.2%}" in outcome.out


def test_linear_chooses_the_penalty_where_none_is_given(images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("--encoder", "histogram:2", "--data.source", images, "--data.num_workers", 0)
    assert command("linear", *what, "--seed", 3, "--output", manifest).status == 0
    record = json.loads(manifest.read_text())
    assert record["settings"]["seed"] == 3
    assert record["details"]["l2"] in record["settings"]["l2_values"]
    assert record["value"]["mean"] == 1  # the classes are colours


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_a_cache_serves_every_evaluation_of_an_encoder_with_the_same_digits(
    name: str, trained: TrainedRun, images: Path, command: Command, tmp_path: Path
) -> None:
    what = ("--encoder", trained.folder, "--data.source", images, "--data.num_workers", 0)
    options = {"knn": ("--k", "9,3,20"), "linear": ("--l2", 0.001)}
    cache = ("--cache", tmp_path / "cache")
    records = []
    for number, (task, more) in enumerate(
        [(name, ()), ("knn" if name == "linear" else "linear", cache), (name, cache)]
    ):
        manifest = tmp_path / f"{number}.json"
        assert command(task, *what, *options[task], *more, "--output", manifest).status == 0
        records.append({**json.loads(manifest.read_text()), "created": ""})
        if number == 1:
            kept = files_below(tmp_path / "cache")
    assert records[2] == records[0]
    assert {Path(file).name for file in kept} >= {"facts.json", "features.f32", "batches.jsonl"}
    after = files_below(tmp_path / "cache")
    assert [after[file] for file in kept if file.endswith((".f32", ".jsonl"))] == [
        kept[file] for file in kept if file.endswith((".f32", ".jsonl"))
    ]
    assert after.keys() == kept.keys()
    if name == "knn":
        assert records[0]["settings"]["k"] == 9
        assert list(records[0]["details"]["top1_by_k"]) == ["9", "3", "20"]
