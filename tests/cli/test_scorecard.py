"""The command scorecard."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.bundle import load_encoder
from simclr_scale.data.sources import open_source
from simclr_scale.evaluation import evaluate_knn
from tests.cli.commands import Outcome, TrainedRun, files_below, start_command, write_images

Command = Callable[..., Outcome]
QUICK = ("--permutations", 200, "--resamples", 50, "--data.num_workers", 0)


def test_several_encoders_on_one_card(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    before = files_below(trained.folder)
    images = write_images(tmp_path / "images", "red", "green", "blue", count=20)
    encoders = ("--encoder", trained.folder, "--encoder", "pixels:4")
    options = ("--tasks", "knn,linear@5-shot", "--k", 7, *QUICK)
    outcome = command("scorecard", *encoders, "--data.source", images, "--output", tmp_path / "card", *options)
    assert outcome.status == 0, outcome.err
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [one["spec"] for one in card["encoders"]] == [str(trained.folder), "pixels:4"]
    knn, few = card["rows"]
    sources = [open_source(str(images), split=split) for split in ("train", "test")]
    expected = evaluate_knn(*load_encoder("pixels:4"), *sources, k=7)
    assert knn["cells"][1]["mean"] == expected.mean
    assert few["cells"][0]["manifest"]["value"]["seeds"] == 5
    assert few["comparisons"][0]["second"] == "pixels:4"
    assert len(card["health"]) == 2
    assert card["settings"]["k"] == 7
    text = (tmp_path / "card" / "scorecard.md").read_text()
    assert "| linear, 5 a class | " in text
    assert f"{few['cells'][0]['mean']:.1%}" in outcome.out
    assert not (tmp_path / "card" / "features").exists()
    assert (tmp_path / "card" / "labels.png").exists() is False  # one number of labels a kind
    assert files_below(trained.folder) == before


def test_an_interrupted_card_is_gone_on_with(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", "red", "green", "blue", count=20)
    what = ("--encoder", "pixels:4", "--encoder", "histogram:2", "--data.source", images, "--tasks", "knn,linear")
    options = ("--k", 7, "--health", "false", *QUICK)

    def interrupted(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("simclr_scale.cli.scorecard.Scorecard.of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command("scorecard", *what, "--output", tmp_path / "card", *options)
    kept = sorted((tmp_path / "card" / "evaluations").glob("*.json"))
    assert len(kept) == 4
    before = [file.stat().st_mtime_ns for file in kept]
    monkeypatch.setattr("simclr_scale.evaluation.scorecard_run.evaluate_knn", interrupted)
    outcome = command("scorecard", *what, "--output", tmp_path / "card", *options)
    assert outcome.status == 0, outcome.err
    assert [file.stat().st_mtime_ns for file in kept] == before
    once = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [row["task"] for row in once["rows"]] == ["knn", "linear"]


def test_the_sets_of_a_suite_are_rows_too(command: Command, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "red", "green", "blue", count=20)
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "published: another encoder\n"
        "sets:\n"
        "  - {name: Colours, source: images, metric: mean_auc, published: 61.5}\n"
        "  - {name: Lost, source: archive/dtd, metric: top1}\n"
    )
    what = ("--encoder", "pixels:4", "--encoder", "histogram:2", "--data.source", images, "--tasks", "knn", "--k", 5)
    options = ("--suite", suite, "--root", tmp_path, "--suite_labels", "5-shot,1.0", "--health", "false", *QUICK)
    outcome = command("scorecard", *what, *options, "--output", tmp_path / "card")
    assert outcome.status == 0, outcome.err
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [row["task"] for row in card["rows"]] == ["knn", "transfer:Colours@5-shot", "transfer:Colours"]
    few, full = card["rows"][1:]
    assert full["metric"] == few["metric"] == "mean_auc"
    assert few["cells"][0]["std"] is not None
    assert full["published"][0]["value"] == 0.615
    assert few["published"] == []
    assert set(card["skipped"]) == {"transfer:Lost@5-shot", "transfer:Lost"}
    assert "| Colours: linear, all labels (mean_auc) |" in (tmp_path / "card" / "scorecard.md").read_text()


def test_fine_tuning_is_a_task_too(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "red", "green", "blue", count=20)
    what = ("--encoder", trained.folder, "--encoder", "pixels:4", "--data.source", images, "--health", "false", *QUICK)
    tasks = ("--tasks", "finetune,finetune@0.5,linear@0.5", "--finetune_epochs", 2)
    outcome = command("scorecard", *what, *tasks, "--output", tmp_path / "card")
    assert outcome.status == 0, outcome.err
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [row["title"] for row in card["rows"]][:2] == ["fine-tuned, all labels", "fine-tuned, 50% of the labels"]
    manifest = card["rows"][1]["cells"][0]["manifest"]
    assert (manifest["task"], manifest["settings"]["epochs"]) == ("finetune", 2)
    assert (tmp_path / "card" / "labels.png").is_file()


def test_tasks_that_the_labels_do_not_reach_are_left_out_and_named(command: Command, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "red", "green", count=20)
    what = ("--encoder", "pixels:4", "--data.source", images, "--k", 5, "--health", "false", *QUICK)
    outcome = command("scorecard", *what, "--output", tmp_path / "card")
    assert outcome.status == 0, outcome.err
    card = json.loads((tmp_path / "card" / "scorecard.json").read_text())
    assert [row["task"] for row in card["rows"]] == ["knn", "linear", "linear@0.1", "linear@5-shot"]
    assert list(card["skipped"]) == ["linear@0.01"]
    assert "Left out: linear@0.01" in outcome.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tasks", "svm"), "wanted knn, linear"),
        (("--tasks", "linear@1-shot"), "linear@1-shot"),
        (("--tasks", "knn@40-shot"), "knn@40-shot"),
        (("--tasks", "knn", "--k", 500), "k: 500, wanted at most 32"),
        (("--resamples", 0), "--resamples must be at least 1"),
        (("--batch_size", 0), "--batch_size must be at least 1"),
        (("--encoder", "pixels:4"), "pixels:4 is given twice"),
        (("--encoder", "nothing"), "there is no encoder"),
        (("--output", "images"), "holds other things"),
        (("--output", "no/folder"), "no folder"),
        (("--tasks", "finetune", "--finetune_epochs", 0), "epochs"),
        (("--suite", "thirteen"), "no suite file or shipped suite"),
        (("--seeds", 2, "--tasks", "linear@5-shot"), "at least 5"),
        (("--data.source", "no"), "no"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    refusal: Callable[..., str], options: tuple[object, ...], says: str, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", "red", "green", count=20)
    basic = ("--encoder", "pixels:4", "--data.source", "images", "--output", "card", "--k", 5, *QUICK)
    assert says in refusal("scorecard", *basic, *options)


def test_a_card_is_never_overwritten(refusal: Callable[..., str], command: Command, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "red", "green", count=20)
    what = ("--encoder", "pixels:4", "--data.source", images, "--tasks", "knn", "--k", 5, "--health", "false", *QUICK)
    assert command("scorecard", *what, "--output", "card").status == 0
    assert "holds a scorecard already" in refusal("scorecard", *what, "--output", "card")


@pytest.mark.slow
def test_the_processes_of_a_launcher_share_the_work(command: Command, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "red", "green", "blue", count=20)
    what = ("--encoder", "pixels:4", "--data.source", images, "--tasks", "knn,linear", "--k", 5, "--health", "false")
    cards = []
    outcome = command("scorecard", *what, "--batch_size", 8, *QUICK, "--output", tmp_path / "one")
    assert outcome.status == 0, outcome.err
    launched = start_command(
        *("scorecard", *what, "--batch_size", 8, *QUICK, "--output", tmp_path / "two"), cwd=tmp_path, ranks=2
    )
    assert launched.status == 0, launched.err
    assert launched.out.count("Scorecard on") == 1
    for name in ("one", "two"):
        card = json.loads((tmp_path / name / "scorecard.json").read_text())
        for row in card["rows"]:
            for cell in row["cells"]:
                del cell["manifest"]["created"]
        cards.append(card["rows"])
    assert cards[0] == cards[1]
