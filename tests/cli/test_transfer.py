"""The command transfer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.bundle import load_encoder
from simclr_scale.evaluation import evaluate_transfer
from tests.cli.commands import CHECKOUT, Outcome, write_images
from tests.data.sources import miniatures

Command = Callable[..., Outcome]

# The user's: folders of classes without splits, and train/ and test/.
SUITE = """
sets:
  - {name: Chest X-rays, source: chest_xray, metric: mean_auc}
  - {name: Clothing, source: clothing, metric: top1, published: 61.5}
  - {name: Elsewhere, source: elsewhere, metric: top1}
published: of someone
"""


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    write_images(tmp_path / "data" / "chest_xray", "Covid-19", "No_findings", "Pneumonia", count=10, size=8)
    for part, count in (("train", 8), ("test", 4)):
        write_images(tmp_path / "data" / "clothing" / part, "coat", "hat", count=count, size=8)
    (tmp_path / "s.yaml").write_text(SUITE)
    return tmp_path


def test_local_folders_with_two_encoders_and_few_labels(sets: Path, command: Command) -> None:
    what = ("--encoder", "pixels:2", "--encoder", "histogram:2", "--suite", sets / "s.yaml", "--root", sets / "data")
    more = ("--labels", "1-shot,1.0", "--num_workers", 0, "--seed", 3, "--cache", sets / "cache")
    outcome = command("transfer", *what, *more, "--output", sets / "t.json")
    assert outcome.status == 0, outcome.err
    record = json.loads((sets / "t.json").read_text())
    rows = record["results"]
    assert [(row["encoder"], row["set"], row["labels"]) for row in rows] == [
        (encoder, name, labels)
        for encoder in ("pixels:2", "histogram:2")
        for name in ("Chest X-rays", "Clothing", "Elsewhere")
        for labels in ("1-shot", "1")
    ]
    expected = evaluate_transfer(
        *load_encoder("pixels:2"), sets / "s.yaml", root=sets / "data", labels=("1-shot", 1.0), seed=3
    )
    for row, result in zip(rows, expected, strict=False):
        if row["set"] == "Elsewhere":
            assert row["manifest"] is None
            assert "elsewhere" in row["skipped"]
            continue
        assert result.manifest is not None
        assert row["manifest"]["value"]["each"] == list(result.manifest.values)
        assert len(result.manifest.values) == (5 if row["labels"] == "1-shot" else 1)
        mean = f"{100 * result.manifest.mean:.1f}"
        spread = result.manifest.std
        assert (mean if spread is None else f"{mean} ± {100 * spread:.1f}") in outcome.out
    printed = " ".join(outcome.out.replace("│", " ").split())
    assert "61.5" in printed
    assert "skipped Elsewhere, labels 1-shot: not on disk: elsewhere" in printed
    assert len(list((sets / "cache" / "fits").iterdir())) == 2 * 2 * 6

    again = command("transfer", *what, *more, "--output", sets / "t.json")
    assert (again.status, "exists already" in again.err) == (2, True)


def test_the_shipped_suite_by_name_and_by_file(command: Command, tmp_path: Path) -> None:
    miniatures.pets(tmp_path)
    what = ("--encoder", "pixels:2", "--root", tmp_path, "--num_workers", 0)
    for suite in ("twelve", CHECKOUT / "suites" / "twelve.yaml"):
        outcome = command("transfer", *what, "--suite", suite)
        assert outcome.status == 0, outcome.err
        assert "83.6" in outcome.out
        assert "skipped Food-101, labels 1: not on disk: archive/food101" in " ".join(outcome.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--encoder pixels:2", "the following arguments are required: suite"),
        ("--suite s.yaml", "encoder"),
        ("--encoder pixels:2 --suite twelv", "no suite file or shipped suite 'twelv'; did you mean twelve?"),
        ("--encoder pixels:2 --suite bad.yaml", "bad.yaml: set 1 (A): metric: there is no 'auc'"),
        ("--encoder pixels:2 --suite broken.yaml", "broken.yaml, line 2"),
        ("--encoder pixels:2 --suite s.yaml --root nowhere", "none of its 3 sets can be evaluated"),
        ("--encoder pixels:2 --encoder pixels:2 --suite s.yaml", "--encoder pixels:2: is given twice"),
        ("--encoder pixel:2 --suite s.yaml --root data", "pixel"),
        ("--encoder pixels:2 --suite s.yaml --root data --labels 0-shot", "labels: 0-shot, wanted at least 1-shot"),
        ("--encoder pixels:2 --suite s.yaml --root data --labels 1.0,1", "names one budget twice"),
        ("--encoder pixels:2 --suite s.yaml --root data --labels 9-shot", "Chest X-rays: chest_xray: labels: 9-shot"),
        ("--encoder pixels:2 --suite s.yaml --root data --labels 5-shot --seeds 2", "seeds: 2, wanted at least 5"),
        ("--encoder pixels:2 --suite s.yaml --root data --batch_size 0", "--batch_size must be at least 1"),
        ("--encoder pixels:2 --suite s.yaml --root data --num_workers -1", "--num_workers must be 0 or above"),
        ("--encoder pixels:2 --suite s.yaml --root data --device gpu7", "--device gpu7"),
        ("--encoder pixels:2 --suite s.yaml --root data --output no/t.json", "there is no folder no"),
        ("--encoder pixels:2 --suite s.yaml --metric top1", "there is no option metric"),
    ],
)
def test_mistakes(arguments: str, message: str, sets: Path, refusal: Callable[..., str]) -> None:
    (sets / "bad.yaml").write_text("sets: [{name: A, source: a, metric: auc}]")
    (sets / "broken.yaml").write_text("sets:\n  - {name: A: b}\n")
    assert message in refusal("transfer", *arguments.split())
