import json
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_scale.bundle import ImageTransform
from simclr_scale.errors import InputError
from simclr_scale.evaluation import Contestant, Evaluated, Scorecard, Task, evaluate_knn, evaluate_linear
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.published import known_dataset, published
from simclr_scale.evaluation.scorecard_plots import plot_labels, plot_sizes
from simclr_scale.evaluation.scorecard_run import Entrant, Protocol, Work, doable, evaluate
from simclr_scale.evaluation.scorecard_text import markdown
from simclr_scale.models import PixelEncoder
from tests.evaluation.synthetic import ColorSource

CLASSES = ("a", "b", "c")
TRAIN = ColorSource([0, 1, 2] * 20, CLASSES)
TEST = ColorSource([2, 1, 0] * 9, CLASSES, seed=1)
TRANSFORM = ImageTransform((3, 8, 8), crop_pct=1.0)


def entrant(side: int = 4, train: ColorSource = TRAIN) -> Entrant:
    transform = ImageTransform((3, side, side), crop_pct=1.0)
    return Entrant(f"pixels:{side}", PixelEncoder(side).eval(), transform, train, TEST)


def record(mean: float, images: int, **more: object) -> dict[str, object]:
    return {
        "metric": "top1",
        "value": {"mean": mean, "std": None, "seeds": 1, "each": [mean]},
        "train": {"images": images},
        "test": {"name": "set", "split": "test", "images": 40, "classes": ["x", "y"]},
        "warnings": [],
        **more,
    }


def card(parameters: tuple[int, ...] = (10, 1000)) -> Scorecard:
    """Two tasks of which the second has 100 labels, and encoders of which each is right on fewer images."""
    contestants = [Contestant(f"e{number}", "f" * 64, size, 8) for number, size in enumerate(parameters)]
    targets = np.zeros(40, dtype=np.int64)

    def cell(right: int, images: int) -> Evaluated:
        answers = np.where(np.arange(40) < right, 0, 1)
        return Evaluated(record(right / 40, images), Outcome(np.arange(40), targets, (answers,)))

    results = {
        Task("linear"): [cell(36 - 4 * number, 1000) for number in range(len(parameters))],
        Task("linear", "0.1"): [cell(30 - 9 * number, 100) for number in range(len(parameters))],
    }
    return Scorecard.of(contestants, results, skipped={"linear@0.01": "too few"}, permutations=2000, resamples=200)


@pytest.mark.parametrize(
    ("text", "kind", "labels", "title"),
    [
        ("knn", "knn", "1", "kNN, all labels"),
        ("knn@1.0", "knn", "1.0", "kNN, all labels"),
        (" linear@0.1", "linear", "0.1", "linear, 10% of the labels"),
        ("linear@5-shot", "linear", "5-shot", "linear, 5 a class"),
    ],
)
def test_tasks_as_users_write_them(text: str, kind: str, labels: str, title: str) -> None:
    task = Task.parse(text)
    assert (task.kind, task.labels, task.title) == (kind, labels, title)


@pytest.mark.parametrize(
    ("text", "says"),
    [("svm", "'svm', wanted knn, linear"), ("knn@7", "7-shot"), ("linear@0-shot", "1-shot"), ("knn@no.txt", "no.txt")],
)
def test_tasks_that_there_are_not(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Task.parse(text)


def test_an_evaluation_is_that_of_the_function_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, protocol, work = entrant(), Protocol(k=5, seed=3), Work(batch_size=16)
    settings = {"batch_size": 16, "seed": 3, "spec": one.spec}
    expected = {
        "knn": evaluate_knn(one.encoder, one.transform, TRAIN, TEST, k=5, **settings),
        "linear@5-shot": evaluate_linear(one.encoder, one.transform, TRAIN, TEST, labels="5-shot", **settings),
    }
    made = {}
    for text, manifest in expected.items():
        made[text] = evaluate(one, Task.parse(text), protocol, work, tmp_path)
        found, wanted = dict(made[text].record), json.loads(json.dumps(manifest.as_dict()))
        del found["created"], wanted["created"]
        assert found == wanted
        assert manifest.outcome is not None
        for ours, theirs in zip(made[text].outcome.answers, manifest.outcome.answers, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    monkeypatch.setattr(ColorSource, "image", None)
    for text, evaluated in made.items():
        again = evaluate(one, Task.parse(text), protocol, work, tmp_path)
        assert again.record == evaluated.record
        np.testing.assert_array_equal(np.stack(again.outcome.answers), np.stack(evaluated.outcome.answers))
        np.testing.assert_array_equal(again.outcome.targets, evaluated.outcome.targets)


@pytest.mark.parametrize("change", ["encoder", "images", "settings", "task"])
def test_it_is_made_anew_where_anything_differs(tmp_path: Path, change: str) -> None:
    evaluate(entrant(), Task("knn"), Protocol(k=5), Work(), tmp_path)
    before = len(list(tmp_path.glob("*.json")))
    other = {
        "encoder": lambda: evaluate(entrant(3), Task("knn"), Protocol(k=5), Work(), tmp_path),
        "images": lambda: evaluate(
            entrant(train=ColorSource([0, 1, 2] * 20, CLASSES, seed=8)), Task("knn"), Protocol(k=5), Work(), tmp_path
        ),
        "settings": lambda: evaluate(entrant(), Task("knn"), Protocol(k=6), Work(), tmp_path),
        "task": lambda: evaluate(entrant(), Task("knn", "0.5"), Protocol(k=5), Work(), tmp_path),
    }
    other[change]()
    # Settings of other tasks count for nothing.
    evaluate(entrant(), Task("knn"), Protocol(k=5, finetune_epochs=3), Work(), tmp_path)
    assert (before, len(list(tmp_path.glob("*.json")))) == (1, 2)


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    evaluate(entrant(), Task("knn"), Protocol(k=5), Work(), tmp_path)
    [file] = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"knn-.*cannot be read.*delete both"):
        evaluate(entrant(), Task("knn"), Protocol(k=5), Work(), tmp_path)


def test_with_few_labels_all_vote_at_most(tmp_path: Path) -> None:
    few = evaluate(entrant(), Task("knn", "1-shot"), Protocol(k=50), Work(), tmp_path)
    assert few.record["settings"]["k"] == 3
    assert few.training_images == 3


def test_what_the_labels_do_not_allow_is_known_before_any_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ColorSource, "image", None)
    tasks = [Task("knn"), Task("linear"), Task("linear", "0.01"), Task("linear", "30-shot")]
    left, skipped = doable([entrant()], tasks, Protocol(k=20), skip=True)
    assert left == [Task("knn"), Task("linear")]
    assert set(skipped) == {"linear@0.01", "linear@30-shot"}
    assert "30-shot" in skipped["linear@30-shot"]
    with pytest.raises(InputError, match=r"linear@0.01: .* fewer than the 3 classes"):
        doable([entrant()], tasks, Protocol(k=20))
    with pytest.raises(InputError, match="k: 200, wanted at most 60"):
        doable([entrant()], [Task("knn")], Protocol(), skip=True)
    with pytest.raises(InputError, match="none left to choose l2 by"):
        doable([entrant()], [Task("linear", "1-shot")], Protocol())
    one_class = ColorSource([0] * 60, CLASSES)
    with pytest.raises(InputError, match="at least two classes"):
        doable([entrant(train=one_class)], [Task("linear")], Protocol())


def test_a_card_holds_values_intervals_and_comparisons(tmp_path: Path) -> None:
    saved = json.loads(card((10, 1000, 0)).write(tmp_path / "card.json").read_text())
    first, second = saved["rows"]
    assert [row["task"] for row in saved["rows"]] == ["linear", "linear@0.1"]
    assert [cell["mean"] for cell in first["cells"]] == [0.9, 0.8, 0.7]
    assert all(cell["interval"]["low"] < cell["mean"] < cell["interval"]["high"] for cell in second["cells"])
    assert [one["difference"] for one in second["comparisons"]] == pytest.approx([9 / 40, 18 / 40])
    assert [one["second"] for one in second["comparisons"]] == ["e1", "e2"]
    assert second["comparisons"][1]["p_value"] < 0.01 < first["comparisons"][0]["p_value"]
    assert saved["skipped"] == {"linear@0.01": "too few"}


def test_markdown_shows_every_value() -> None:
    text = markdown(card())
    lines = text.splitlines()
    assert "| evaluation | e0 | e1 |" in lines
    row = next(line for line in lines if line.startswith("| linear, 10% of the labels | 75.0% ["))
    assert "| 52.5% [" in row
    assert any(line.startswith("| linear, all labels | +10.0%, p ") for line in lines)
    assert "- Left out: linear@0.01: too few" in lines


def test_results_of_other_images_are_not_put_side_by_side() -> None:
    one = card()
    cells = one.rows[0].cells
    other = Outcome(np.arange(40) + 1, cells[1].outcome.targets, cells[1].outcome.answers)
    with pytest.raises(InputError, match="linear: the two encoders were judged by other test images"):
        Scorecard.of(one.contestants, {Task("linear"): [cells[0], Evaluated(cells[1].record, other)]})
    with pytest.raises(InputError, match="1 results for 2 encoders"):
        Scorecard.of(one.contestants, {Task("linear"): cells[:1]})


def test_plots_are_drawn_where_there_is_something_to_see(tmp_path: Path) -> None:
    assert plot_labels(card(), tmp_path / "labels.png") == tmp_path / "labels.png"
    assert plot_sizes(card(), tmp_path / "sizes.png") == tmp_path / "sizes.png"
    assert (
        (tmp_path / "labels.png").read_bytes()[:8] == (tmp_path / "sizes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    )
    assert plot_sizes(card((10, 0)), tmp_path / "one.png") is None
    single = card()
    single = Scorecard(single.contestants, single.rows[:1])
    assert plot_labels(single, tmp_path / "one.png") is None
    with pytest.raises(InputError, match="exists already"):
        plot_labels(card(), tmp_path / "labels.png")


def test_published_values_stand_beside_the_same_protocol_on_the_same_set() -> None:
    cifar = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert known_dataset(cifar, 10_000) == "cifar10"
    assert known_dataset(cifar, 9_999) is None
    assert known_dataset(tuple(map(str, range(10))), 10_000) is None  # MNIST has as many
    assert known_dataset(tuple(map(str, range(1000))), 50_000) == "imagenet"
    assert {one.value for one in published("imagenet", "finetune", "0.01")} >= {0.483, 0.585, 0.630}
    assert [one.value for one in published("cifar10", "knn", "1")] == [0.848, 0.879]
    assert published("cifar10", "knn", "5-shot") == published(None, "knn", "1") == ()


def test_frozen_evaluations_leave_every_bit_of_the_encoder(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    one = Entrant("module", encoder, TRANSFORM, TRAIN, TEST)
    for text in ("knn", "linear", "linear@5-shot"):
        evaluate(one, Task.parse(text), Protocol(k=5), Work(), tmp_path)
    assert encoder.training
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert one.contestant().parameters == 3 * 4 * 9 + 4 + 8
