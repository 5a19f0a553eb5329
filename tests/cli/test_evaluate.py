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


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_few_labels_are_drawn_named_and_averaged(task: str, images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("--encoder", "pixels:4", "--data.source", images, "--data.num_workers", 0, "--labels", "2-shot")
    settings = {"knn": {"k": 3}, "linear": {"l2": 0.01}}[task]
    options = [item for name, value in settings.items() for item in (f"--{name}", value)]
    outcome = command(task, *what, *options, "--seed", 1, "--seeds", 6, "--output", manifest)
    assert outcome.status == 0
    record = json.loads(manifest.read_text())
    train, test = (open_source(str(images), split=part) for part in ("train", "test"))
    evaluate: Any = {"knn": evaluate_knn, "linear": evaluate_linear}[task]
    expected = as_read(evaluate(*load_encoder("pixels:4"), train, test, labels="2-shot", seed=1, seeds=6, **settings))
    for key in ("value", "train", "test", "settings", "details", "label_selection"):
        assert record[key] == expected[key]
    assert record["value"]["seeds"] == 6
    names = record["details"]["chosen"][0]["ids"]
    assert sorted(name.partition("/")[0] for name in names) == ["blue", "blue", "green", "green", "red", "red"]
    assert "over 6 seeds" in outcome.out

    # The ids of a manifest are a list file.
    listed = tmp_path / "listed.txt"
    listed.write_text("\n".join(names))
    again = tmp_path / "again.json"
    # The seed of the data's split is that of before; the labels are not drawn any more.
    same = ("--encoder", "pixels:4", "--data.source", images, "--data.num_workers", 0, "--labels", listed)
    assert command(task, *same, *options, "--output", again).status == 0
    record_of_list = json.loads(again.read_text())
    assert record_of_list["value"]["each"] == record["value"]["each"][:1]
    assert record_of_list["details"]["chosen"][0]["ids_sha256"] == record["details"]["chosen"][0]["ids_sha256"]


def test_linear_by_a_grid_of_probes(images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("--encoder", "histogram:2", "--data.source", images, "--data.num_workers", 0)
    assert command("linear", *what, "--method", "grid", "--epochs", 20, "--output", manifest).status == 0
    record = json.loads(manifest.read_text())
    assert (record["settings"]["method"], record["settings"]["epochs"]) == ("grid", 20)
    assert len(record["details"]["validation"]) == 16
    assert record["details"]["learning_rate"] in record["settings"]["learning_rates"]
    assert record["value"]["mean"] > 0.6


def test_linear_by_sgd_on_augmented_images(images: Path, command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    what = ("--encoder", "histogram:2", "--data.source", images, "--data.num_workers", 0)
    assert command("linear", *what, "--method", "sgd", "--epochs", 30, "--output", manifest).status == 0
    record = json.loads(manifest.read_text())
    assert (record["settings"]["method"], record["settings"]["learning_rate"]) == ("sgd", 0.1)
    assert len(record["details"]["losses"]) == 30
    assert record["value"]["mean"] > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--labels 13-shot", "labels: 13-shot, but class 'blue' has 12 labelled training images"),
        ("--labels 5-shot --seeds 3", "seeds: 3, wanted at least 5 of 5-shot"),
        ("--labels 7", "labels: 7, a fraction lies above 0 and is at most 1; 7 of every class are 7-shot"),
        ("--labels nowhere.txt", "labels: there is no list file 'nowhere.txt'"),
        ("--seeds 2", "seeds: 2, but all labels are used"),
    ],
)
@pytest.mark.parametrize("task", ["knn", "linear"])
def test_labels_that_cannot_be_had_are_one_line(
    task: str, options: str, message: str, images: Path, command: Command
) -> None:
    outcome = command(task, "--encoder", "pixels:4", "--data.source", images, *options.split())
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_methods_of_linear_are_named_where_another_is_given(images: Path, command: Command) -> None:
    what = ("linear", "--encoder", "pixels:4", "--data.source", images)
    outcome = command(*what, "--method", "adam")
    assert outcome.status == 2
    assert "method: expected one of 'lbfgs', 'grid', 'sgd'; got adam" in outcome.err
    outcome = command(*what, "--labels", "1-shot")
    assert outcome.status == 2
    assert "one image in each class, none left to choose l2 by; give l2 itself" in outcome.err
