"""Few labels: which they are, and evaluations with them."""

import hashlib
import json
import re
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_scale.data.sources.folders import FolderSource
from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    LabelBudget,
    Manifest,
    evaluate_knn,
    evaluate_linear,
    extract_features,
    few_label_knn,
    few_label_linear,
    image_loader,
    knn_classify,
    linear_probe,
    probe_grid,
    select_labels,
    top1,
)
from simclr_scale.evaluation.few_labels import OFFICIAL_LISTS
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder, to_tensor

CLASSES = ("a", "b", "c", "d")
TRAIN = ColorSource([0, 1, 2, 3] * 25 + [-1] * 7, CLASSES)
TEST = ColorSource([3, 2, 1, 0] * 10, CLASSES, seed=1)
Evaluation = Callable[..., Manifest]


def uneven() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2, 3], [90, 30, 70, 300, 600]))


def chosen(text: str | float, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    return LabelBudget.parse(text).choose(labels, seed)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_fractions_are_balanced_and_nested(seed: int) -> None:
    labels = uneven()
    sizes = np.array([30, 70, 300, 600])
    parts = [chosen(fraction, labels, seed) for fraction in (0.01, "0.05", 0.1, 0.5, "0.99")]
    for fraction, part in zip((0.01, 0.05, 0.1, 0.5, 0.99), parts, strict=True):
        assert len(part) == round(1000 * fraction)
        assert (np.diff(part) > 0).all()
        taken = np.bincount(labels[part], minlength=4)
        assert (taken >= 1).all()
        assert (np.abs(taken - fraction * sizes) < 1.5).all()
    for smaller, larger in pairwise(parts):
        assert set(smaller) < set(larger)
    assert np.array_equal(chosen("1.0", labels), np.flatnonzero(labels >= 0))


def test_equal_classes_have_equal_shares() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 500))
    assert np.bincount(labels[chosen(0.1, labels)]).tolist() == [50] * 10
    assert np.bincount(labels[chosen(0.01, labels)]).tolist() == [5] * 10


def test_shots_are_so_many_of_every_class_and_nested() -> None:
    labels = uneven()
    parts = [chosen(f"{shots}-shot", labels, 4) for shots in (1, 2, 5, 30)]
    for shots, part in zip((1, 2, 5, 30), parts, strict=True):
        assert np.bincount(labels[part]).tolist() == [shots] * 4
        assert (np.diff(part) > 0).all()
    for smaller, larger in pairwise(parts):
        assert set(smaller) < set(larger)
    # One order of each class serves both: 1-shot lies within every fraction.
    assert set(parts[0]) <= set(chosen(0.01, labels, 4))


def test_the_seed_decides() -> None:
    labels = uneven()
    for text in ("0.1", "5-shot"):
        assert np.array_equal(chosen(text, labels, 3), chosen(text, labels, 3))
        first, second = set(chosen(text, labels, 3)), set(chosen(text, labels, 4))
        assert len(first & second) < len(first) / 2


def test_what_is_chosen_is_always_the_same() -> None:
    """Numbers that somebody has published: they must not change."""
    labels = np.array([0, 1] * 6)
    assert chosen("2-shot", labels).tolist() == [1, 2, 3, 10]
    assert chosen(0.25, labels).tolist() == [1, 2, 3]


def test_every_image_is_as_likely_as_its_neighbours() -> None:
    labels = np.repeat([0, 1], 10)
    times = np.bincount(np.concatenate([chosen("3-shot", labels, seed) for seed in range(1000)]), minlength=20)
    # 1,000 draws of probability .3: standard deviation 14.5.
    assert (np.abs(times - 300) < 5 * 14.5).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("5shot", "there is no list file '5shot'; wanted a fraction such as 0.1, k of every class such as 5-shot"),
        ("0-shot", "0-shot, wanted at least 1-shot"),
        ("5", "5, a fraction lies above 0 and is at most 1; 5 of every class are 5-shot"),
        ("1.5", "1.5, a fraction lies above 0 and is at most 1"),
        (0.0, "0.0, a fraction lies above 0"),
        (-0.1, "-0.1, a fraction lies above 0"),
        ("nan", "nan, a fraction lies above 0"),
        ("nowhere/1percent.txt", "there is no list file 'nowhere/1percent.txt'"),
    ],
)
def test_what_is_no_budget_is_named(labels: str | float, message: str) -> None:
    with pytest.raises(InputError, match="labels: " + re.escape(message)):
        LabelBudget.parse(labels)


def test_shots_are_drawn_at_least_five_times(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("0\n")
    assert LabelBudget.parse("5-shot").seeds() == (0, 1, 2, 3, 4)
    assert LabelBudget.parse("5-shot").seeds(7, first=10) == tuple(range(10, 17))
    assert LabelBudget.parse("0.1").seeds() == (0,)
    assert LabelBudget.parse("0.1").seeds(3, 4) == (4, 5, 6)
    for text, count, first, message in (
        ("5-shot", 4, 0, "seeds: 4, wanted at least 5 of 5-shot"),
        ("0.1", 0, 0, "seeds: 0, wanted at least 1"),
        ("1.0", 2, 0, "seeds: 2, but all labels are used"),
        (str(file), 5, 0, "seeds: 5, but list.txt lists the images"),
        ("0.1", 1, -1, "seed: -1, must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            LabelBudget.parse(text).seeds(count, first)


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("5-shot", [0] * 5 + [1] * 3, "5-shot, but class 'b' has 3 labelled training images; wanted at most 3-shot"),
        ("0.1", [0, 1, 2] * 5, "0.1 of 15 images are 2, fewer than the 3 classes; wanted at least 0.2, or 1-shot"),
        ("0.5", [-1, -1], "0.5 of them wanted, but no training image has a label"),
        ("1-shot", [], "1-shot of them wanted, but no training image has a label"),
    ],
)
def test_labels_that_are_not_there_are_named(text: str, labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        LabelBudget.parse(text).choose(np.array(labels, dtype=np.int64), 0, CLASSES)


def synthetic_features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=draw)
    labels = torch.arange(4).repeat(100)
    features = centres[labels] + 1.5 * torch.randn(400, 12, generator=draw)
    return features[:300], labels[:300], features[300:], labels[300:]


def test_knn_on_features_is_knn_of_the_chosen_rows() -> None:
    x, y, test_x, test_y = synthetic_features()
    score = few_label_knn(x, y, test_x, test_y, "5-shot", k=7, seed=2)
    assert [selection.seed for selection in score.selections] == [2, 3, 4, 5, 6]
    for accuracy, selection in zip(score.accuracies, score.selections, strict=True):
        rows = chosen("5-shot", y.numpy(), selection.seed)
        assert np.array_equal(selection.indices, rows)
        assert accuracy == top1(knn_classify(x[rows], y[rows], test_x, k=7), test_y)
    assert score.mean == pytest.approx(statistics.fmean(score.accuracies))
    assert score.std == pytest.approx(statistics.stdev(score.accuracies))
    assert score.std > 0
    # Unlabelled rows change nothing.
    more_x, more_y = torch.cat([x, test_x]), torch.cat([y, -torch.ones(100, dtype=torch.long)])
    assert few_label_knn(more_x, more_y, test_x, test_y, "5-shot", k=7, seed=2).accuracies == score.accuracies


def test_linear_on_features_is_linear_of_the_chosen_rows() -> None:
    x, y, test_x, test_y = synthetic_features()
    values = (1e-3, 1e-1, 10.0)
    score = few_label_linear(x.numpy(), y.numpy(), test_x, test_y, 0.1, l2_values=values, seed=3)
    rows = chosen(0.1, y.numpy(), 3)
    assert score.accuracies == (linear_probe(x[rows], y[rows], test_x, test_y, l2_values=values, seed=3).test_accuracy,)
    assert score.std is None
    everything = few_label_linear(x, y, test_x, test_y, 1.0, l2=0.1)
    assert everything.accuracies == (linear_probe(x, y, test_x, test_y, l2=0.1).test_accuracy,)
    one = few_label_linear(x, y, test_x, test_y, "1-shot", l2=0.1)
    assert len(one.accuracies) == 5
    assert one.mean < everything.mean
    with pytest.raises(InputError, match="one image in each class, none left to choose l2 by; give l2 itself"):
        few_label_linear(x, y, test_x, test_y, "1-shot")
    with pytest.raises(InputError, match="train_labels: 299 labels for 300 rows of features"):
        few_label_knn(x, y[1:], test_x, test_y, "1-shot")


def labelled_features(source: ColorSource) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels, _ = extract_features(small_encoder(), image_loader(source, to_tensor))
    return features[labels >= 0], labels[labels >= 0]


def as_written(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(manifest.as_dict()))


def test_knn_with_few_labels_from_images_to_manifest() -> None:
    manifest = evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=3, labels="2-shot", seeds=6, seed=1)
    (x, y), (test_x, test_y) = labelled_features(TRAIN), labelled_features(TEST)
    score = few_label_knn(x, y, test_x, test_y, "2-shot", k=3, seeds=6, seed=1)
    assert manifest.values == score.accuracies
    record = as_written(manifest)
    assert record["value"]["seeds"] == 6
    assert record["value"]["mean"] == pytest.approx(score.mean)
    assert record["value"]["std"] == pytest.approx(score.std)
    assert record["label_selection"] == "2-shot (class-balanced, seeds 1 to 6)"
    assert record["settings"]["labels"] == "2-shot"
    assert record["settings"]["seeds"] == [1, 2, 3, 4, 5, 6]
    assert record["details"]["neighbors"] == 3
    assert (record["train"]["images"], record["train"]["unlabelled"]) == (8, 7)
    for record_of_draw, selection in zip(record["details"]["chosen"], score.selections, strict=True):
        ids = selection.indices.tolist()  # images of this source have no names
        checksum = hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
        assert record_of_draw == {"seed": selection.seed, "images": 8, "ids_sha256": checksum, "ids": ids}


@pytest.mark.parametrize("method", ["lbfgs", "grid"])
def test_linear_with_few_labels_from_images_to_manifest(method: str) -> None:
    settings: dict[str, Any] = {"lbfgs": {"l2_values": (1.0, 1e-2)}, "grid": {"epochs": 5}}[method]
    run = {"method": method, "labels": 0.2, "seeds": 2, "seed": 4, **settings}
    manifest = evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, **run)
    (x, y), test = labelled_features(TRAIN), labelled_features(TEST)
    fit: Callable[..., Any] = linear_probe if method == "lbfgs" else probe_grid
    expected = []
    for seed in (4, 5):
        rows = chosen(0.2, TRAIN.labels, seed)
        assert rows.max() < 100  # rows of the source are rows of the features: the unlabelled come last
        expected.append(fit(x[rows], y[rows], *test, seed=seed, **settings).test_accuracy)
    assert manifest.values == tuple(expected)
    record = as_written(manifest)
    assert record["settings"]["method"] == method
    assert len(record["details"]["fits"]) == len(record["details"]["chosen"]) == 2
    assert record["details"]["chosen"][0]["ids"] == chosen(0.2, TRAIN.labels, 4).tolist()
    for warning in record["warnings"]:
        assert warning.startswith(("seed 4: ", "seed 5: "))


def test_only_the_chosen_images_are_read() -> None:
    rows = set(chosen(0.1, TRAIN.labels).tolist())
    damaged = DamagedSource(TRAIN.labels.tolist(), CLASSES, 0, set(range(107)) - rows)
    manifest = evaluate_linear(small_encoder(), to_tensor, damaged, TEST, l2=0.1, labels=0.1)
    assert manifest.warnings == ()
    assert manifest.values == evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, l2=0.1, labels=0.1).values


def test_a_chosen_image_that_cannot_be_read_is_named() -> None:
    bad = int(chosen(0.1, TRAIN.labels)[0])
    damaged = DamagedSource(TRAIN.labels.tolist(), CLASSES, 0, {bad})
    manifest = evaluate_knn(small_encoder(), to_tensor, damaged, TEST, k=5, labels=0.1)
    assert manifest.train.images == 9
    assert manifest.warnings[0].startswith("1 of 10 training images cannot be read and are left out; the first: image")


def test_a_list_of_numbers_from_file_to_manifest(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("9\n0\n\n2\n5\n")
    with pytest.raises(InputError, match=r"10 of 40 test images count as errors"):
        evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=3, labels=str(file))
    manifest = evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=3, labels=str(file), allow_missing_classes=True)
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    assert manifest.label_selection == f"listed in mine.txt (4 images, md5 {md5})"
    assert manifest.details["chosen"][0]["ids"] == [0, 2, 5, 9]
    assert manifest.train.images == 4
    # Of classes a, b and c alone: images of d are errors, and are said to be.
    assert manifest.warnings == ("10 of 40 test images count as errors: their classes have no training image (d)",)


NEVER: Any = None


def test_more_neighbours_than_a_draw_has_images_are_an_error() -> None:
    with pytest.raises(InputError, match=r"k: 21, wanted at most 20, .* that labels 5-shot leaves"):
        evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=(3, 21), labels="5-shot")
    several = evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=(3, 20), labels="5-shot")
    alone = evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=20, labels="5-shot")
    assert several.details["top1_by_k"] == {"3": list(several.values), "20": list(alone.values)}


@pytest.mark.parametrize("evaluate", [evaluate_knn, evaluate_linear])
@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (TRAIN, {"labels": "26-shot"}, "colors: labels: 26-shot, but class 'a' has 25 labelled training images"),
        (TRAIN, {"labels": 0.01}, "colors: labels: 0.01 of 100 images are 1, fewer than the 4 classes"),
        (TRAIN, {"labels": "5-shot", "seeds": 2}, "seeds: 2, wanted at least 5 of 5-shot"),
        (TRAIN, {"seeds": 2}, "seeds: 2, but all labels are used"),
        (ColorSource([-1] * 5, ()), {"labels": "5-shot"}, "colors: no image of the train part has a label"),
        (ColorSource([1] * 5, CLASSES), {"labels": "2-shot"}, "its training labels are all of class 'b'"),
    ],
)
def test_mistakes_are_named_before_any_work(
    evaluate: Evaluation, train: ColorSource, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate(NEVER, NEVER, train, TEST, **settings)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("100\n1\n", "1 of the 2 images that list.txt lists have no label in colors; the first is image 100"),
        ("1\n1\n", "line 2: '1' is the image of line 1 again"),
        ("200\n", "line 1: no image 200; the training images of colors are 0 to 106"),
        ("\n", "lists no image"),
        ("0\n4\n", "its training labels are all of class 'a'"),
    ],
)
def test_lists_that_do_not_fit_are_named(lines: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(lines)
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate_knn(NEVER, NEVER, TRAIN, TEST, labels=str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "1-shot"}, "none left to choose l2 by; give l2 itself"),
        (
            {"labels": "1-shot", "method": "grid"},
            "none left to choose one of learning_rates and weight_decays by",
        ),
        ({"method": "grid", "l2": 1.0}, "l2: 1.0, but method grid has weight_decays"),
        ({"method": "grid", "epochs": 0}, "epochs: 0"),
        ({"method": "sgd", "l2": 1.0}, "l2: 1.0, but method sgd is not regularised"),
        ({"method": "sgd"}, "transform: a NoneType cannot crop at random; wanted the ImageTransform of load_encoder"),
        ({"method": "adam"}, "method: 'adam', wanted lbfgs, grid or sgd"),
    ],
)
def test_settings_of_linear_are_refused_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_linear(NEVER, NEVER, TRAIN, TEST, **settings)


def test_one_shot_needs_no_choice_with_one_setting() -> None:
    one = {"learning_rates": (0.1,), "weight_decays": (0.0,), "epochs": 2}
    for settings in ({"l2": 1.0}, {"method": "grid", **one}):
        manifest = evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, labels="1-shot", **settings)  # type: ignore[arg-type]
        assert len(manifest.values) == 5
        assert manifest.train.images == 4


@pytest.fixture(scope="module")
def official(real_data: Path) -> dict[str, Path]:
    return {name: real_data / "imagenet_subsets" / f"{name}.txt" for name in ("1percent", "10percent")}


def test_googles_lists_are_those_of_the_papers(official: dict[str, Path]) -> None:
    md5 = {name: hashlib.md5(file.read_bytes()).hexdigest() for name, file in official.items()}
    assert md5 == {
        "1percent": "b61c91b8ddb75fabdb02a9bb2ae3bd74",
        "10percent": "b0d861160cc9531910d069ff547fc1b6",
    }
    assert list(OFFICIAL_LISTS) == list(md5.values())
    one, ten = (set(official[name].read_text().split()) for name in ("1percent", "10percent"))
    assert (len(one), len(ten)) == (12_811, 128_116)
    assert one < ten


def test_googles_lists_choose_in_imagenets_layout(official: dict[str, Path]) -> None:
    """A training set of the images of the longer list, each in the folder of its class."""
    names = official["10percent"].read_text().split()
    files = sorted(f"{name.partition('_')[0]}/{name}" for name in names)
    classes = tuple(sorted({file.partition("/")[0] for file in files}))
    labels = np.searchsorted(classes, [file.partition("/")[0] for file in files])
    source = FolderSource("imagenet", "/nowhere", files, labels, classes, "folder train/")
    (selection,), description = select_labels(source, LabelBudget.parse(str(official["1percent"])), (0,))
    assert description == (
        "listed in 1percent.txt (12,811 images, md5 b61c91b8ddb75fabdb02a9bb2ae3bd74, Google's list of 1% of ImageNet)"
    )
    record = selection.record(source)
    assert sorted(identity.partition("/")[2] for identity in record["ids"]) == sorted(
        official["1percent"].read_text().split()
    )
    per_class = np.bincount(labels[selection.indices])
    assert (len(per_class), per_class.min(), per_class.max()) == (1000, 12, 13)
    # Ours are as balanced: of the 128 or 129 images of a class, 12 or 13, or 14 where rounding meets.
    (ours,), _ = select_labels(source, LabelBudget.parse("0.1"), (0,))
    assert set(np.bincount(labels[ours.indices]).tolist()) <= {12, 13}
    without = FolderSource("imagenet", "/nowhere", files[1000:], labels[1000:], classes, "folder train/")
    with pytest.raises(InputError, match=r"1percent.txt, line \d+: no training image 'n\d+_\d+.JPEG' in imagenet"):
        select_labels(without, LabelBudget.parse(str(official["1percent"])), (0,))
