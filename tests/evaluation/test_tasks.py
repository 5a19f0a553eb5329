import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    METRICS,
    Manifest,
    encoder_fingerprint,
    evaluate_knn,
    evaluate_linear,
    extract_features,
    image_loader,
    knn_classify,
    linear_probe,
    top1,
)
from tests.evaluation.counting import CountingEncoder
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder, to_tensor
from tests.gloo_pool import GlooPool

CLASSES = ("a", "b", "c", "d")
TRAIN = ColorSource([0, 1, 2, 3] * 12 + [-1] * 3, CLASSES)
TEST = ColorSource([3, 2, 1, 0, -1] * 5, CLASSES, seed=1)


class Muddled(ColorSource):
    """Two classes of each colour: half the answers are luck."""

    def image(self, index: int) -> Image.Image:
        labels, self.labels = self.labels, self.labels // 2
        try:
            return super().image(index)
        finally:
            self.labels = labels


MUDDLED = Muddled([0, 1, 2, 3] * 12, CLASSES), Muddled([3, 2, 1, 0] * 9, CLASSES, seed=1)
EVALUATIONS = [evaluate_knn, evaluate_linear]
Evaluation = Callable[..., Manifest]


def labelled_features(source: ColorSource) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels, _ = extract_features(small_encoder(), image_loader(source, to_tensor))
    return features[labels >= 0], labels[labels >= 0]


def test_knn_is_the_functions_put_together(tmp_path: Path) -> None:
    manifest = evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=5, batch_size=7, spec="small")
    (train, labels), (test, test_labels) = labelled_features(TRAIN), labelled_features(TEST)
    assert manifest.values == (top1(knn_classify(train, labels, test, k=5), test_labels),)
    record = json.loads(manifest.write(tmp_path / "knn.json").read_text())
    assert record["task"] == "knn"
    assert record["settings"] == {"k": 5, "temperature": 0.07, "similarity": "cosine"}
    assert record["train"]["images"] == 48
    assert record["train"]["unlabelled"] == 3
    assert record["test"]["images"] == 20
    assert record["encoder"]["spec"] == "small"
    assert record["warnings"] == []


def test_of_several_k_the_first_is_the_result_and_the_others_stand_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ks = (7, 48, 1)
    manifest = evaluate_knn(small_encoder(), to_tensor, *MUDDLED, k=ks, temperature=0.5)
    one = {k: evaluate_knn(small_encoder(), to_tensor, *MUDDLED, k=k, temperature=0.5).mean for k in ks}
    assert one[7] > max(one[48], one[1])
    record = json.loads(manifest.write(tmp_path / "knn.json").read_text())
    assert manifest.values == (one[7],)
    assert record["settings"]["k"] == record["details"]["neighbors"] == 7
    assert record["details"]["top1_by_k"] == {str(k): value for k, value in one.items()}
    capsys.readouterr()
    manifest.print_table()
    assert f"48: {one[48]:.4g}, 1: {one[1]:.4g}" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_the_answers_behind_the_values_come_with_them(evaluate: Evaluation) -> None:
    settings = {"k": (5, 1)} if evaluate is evaluate_knn else {"l2": 1e-3}
    manifest = evaluate(small_encoder(), to_tensor, MUDDLED[0], TEST, labels="5-shot", **settings)
    outcome = manifest.outcome
    assert outcome is not None
    assert outcome.indices.tolist() == np.flatnonzero(TEST.labels >= 0).tolist()
    assert outcome.targets.tolist() == TEST.labels[TEST.labels >= 0].tolist()
    assert len({values.tobytes() for values in outcome.answers}) > 1
    assert manifest.values == tuple(METRICS[manifest.metric](answers, outcome.targets) for answers in outcome.answers)
    assert "outcome" not in manifest.as_dict()


def test_fewer_readable_images_than_k_all_vote_and_that_is_said() -> None:
    damaged = DamagedSource(TRAIN.labels.tolist(), CLASSES, 0, range(8))
    manifest = evaluate_knn(small_encoder(), to_tensor, damaged, TEST, k=48)
    assert manifest.details["neighbors"] == 40
    assert manifest.warnings[-1] == "k is 48, but only 40 training images can be read: all of them vote"


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_a_cache_changes_no_digit(evaluate: Evaluation, tmp_path: Path) -> None:
    settings = {"k": (5, 20)} if evaluate is evaluate_knn else {"l2": 1e-3}
    damaged, encoder = DamagedSource(TRAIN.labels.tolist(), CLASSES, 0, (0, 17)), CountingEncoder()
    records = []
    for cache in (None, tmp_path, tmp_path):
        encoder.forwards.clear()
        record = evaluate(encoder, to_tensor, damaged, MUDDLED[1], batch_size=7, cache=cache, **settings).as_dict()
        del record["created"]
        records.append(record)
    assert len(encoder.forwards) == 2  # a probe for each part
    assert records[0] == records[1] == records[2]


def _evaluated(rank: int, world_size: int, task: str) -> dict[str, object]:
    del rank, world_size
    evaluate, settings = {"knn": (evaluate_knn, {"k": (5, 20)}), "linear": (evaluate_linear, {"l2": 1e-3})}[task]
    manifest = evaluate(small_encoder(), to_tensor, *MUDDLED, batch_size=7, **settings)  # type: ignore[operator]
    assert 0.3 < manifest.mean < 0.8
    assert manifest.encoder.fingerprint == encoder_fingerprint(small_encoder())
    return {**manifest.as_dict(), "created": "", "encoder": ""}


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_ranks_share_the_work_and_give_the_same_digits(gloo: GlooPool, task: str) -> None:
    (alone,) = gloo(1, _evaluated, task)
    assert gloo(2, _evaluated, task) == [alone, alone]


def test_linear_is_the_functions_put_together(tmp_path: Path) -> None:
    manifest = evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, l2_values=(1e-4, 1e-2, 1.0), seed=3)
    train, labels = labelled_features(TRAIN)
    probe = linear_probe(train, labels, *labelled_features(TEST), l2_values=(1e-4, 1e-2, 1.0), seed=3)
    assert manifest.values == (probe.test_accuracy,)
    assert manifest.mean > 0.5
    record = json.loads(manifest.write(tmp_path / "linear.json").read_text())
    assert record["settings"]["l2_values"] == [1e-4, 1e-2, 1.0]
    assert record["settings"]["seed"] == 3
    assert record["details"]["l2"] == probe.l2
    assert [score["l2"] for score in record["details"]["validation"]] == [1.0, 1e-2, 1e-4]


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_images_that_cannot_be_read_are_left_out_and_named(evaluate: Evaluation, tmp_path: Path) -> None:
    train_bad, test_bad = (0, 17, 49), (2, 4)  # 49 and 4 have no label and are not used anyway
    damaged = (
        DamagedSource(TRAIN.labels.tolist(), CLASSES, 0, train_bad),
        DamagedSource(TEST.labels.tolist(), CLASSES, 1, test_bad),
    )
    whole = []
    for source, bad in ((TRAIN, train_bad), (TEST, test_bad)):
        labels = source.labels.copy()
        labels[list(bad)] = -1
        whole.append(ColorSource(labels.tolist(), CLASSES, source.seed))
        # The colours are those of the labels.
        whole[-1].image = source.image  # type: ignore[method-assign]
    settings = {"k": 5} if evaluate is evaluate_knn else {"l2": 1e-3}
    manifest = evaluate(small_encoder(), to_tensor, *damaged, **settings)
    assert manifest.values == evaluate(small_encoder(), to_tensor, *whole, **settings).values
    record = json.loads(manifest.write(tmp_path / "manifest.json").read_text())
    assert (record["train"]["images"], record["test"]["images"]) == (46, 19)
    assert record["test"]["unreadable"] == ["image 2: not a readable image (cut off)"]
    assert len(record["train"]["unreadable"]) == 2
    assert record["warnings"] == [
        "2 of 48 training images cannot be read and are left out; the first: image 0: not a readable image (cut off)",
        "1 of 20 test images cannot be read and are left out; the first: image 2: not a readable image (cut off)",
    ]


def test_a_given_l2_is_all_there_is_to_record() -> None:
    manifest = evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, l2=0.01)
    assert manifest.settings == {"method": "lbfgs", "l2": 0.01, "max_iterations": 5000}
    assert manifest.details["validation"] == []


def test_a_fit_that_stops_short_is_a_warning() -> None:
    manifest = evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, l2=1e-6, max_iterations=1)
    assert manifest.details["converged"] is False
    assert manifest.warnings == ("the fit stopped short of its optimum after 1 iterations",)


NO_TRAINING = "5 of 20 test images count as errors: their classes have no training image (d)"
NO_TEST = "12 of 48 training images are of classes that have no test image (d)"


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_test_images_of_unseen_classes_are_errors_and_counted_where_that_is_allowed(evaluate: Evaluation) -> None:
    train = ColorSource([0, 1, 2] * 16, CLASSES)
    settings = {"k": 48} if evaluate is evaluate_knn else {}
    with_unseen = evaluate(small_encoder(), to_tensor, train, TEST, allow_missing_classes=True, **settings)
    without = evaluate(
        small_encoder(), to_tensor, train, ColorSource([-1, 2, 1, 0, -1] * 5, CLASSES, seed=1), **settings
    )
    assert with_unseen.mean == pytest.approx(0.75 * without.mean)
    assert with_unseen.warnings == (NO_TRAINING,)
    assert without.warnings == ()


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_classes_without_a_test_image_are_a_warning_where_that_is_allowed(evaluate: Evaluation) -> None:
    test = ColorSource([-1, 2, 1, 0, -1] * 5, CLASSES, seed=1)
    settings = {"k": 5} if evaluate is evaluate_knn else {"l2": 0.1}
    manifest = evaluate(small_encoder(), to_tensor, TRAIN, test, allow_missing_classes=True, **settings)
    assert manifest.warnings == (NO_TEST,)


def test_classes_of_two_data_sets_are_matched_by_name() -> None:
    # The same images and names, numbered otherwise; "x" takes the number that "a" has in the training set.
    other = ("x", "d", "c", "b", "a")
    renamed = ColorSource([1, 2, 3, 4, -1] * 5, other, seed=1)
    renamed.image = TEST.image  # type: ignore[method-assign]
    manifest = evaluate_knn(small_encoder(), to_tensor, TRAIN, renamed, k=5)
    assert manifest.values == evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=5).values
    assert manifest.mean > 0.5


@pytest.mark.parametrize("evaluate", EVALUATIONS)
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (ColorSource([-1] * 4, ()), TEST, "colors: no image of the train part has a label"),
        (TRAIN, ColorSource([-1] * 4, ()), "colors: no image of the test part has a label"),
        (ColorSource([0, 1, 2] * 16, CLASSES), TEST, f"colors: {NO_TRAINING}; wanted the same classes in both parts"),
        (TRAIN, ColorSource([0, 1, 2], CLASSES), f"colors: {NO_TEST}; wanted the same classes in both parts"),
        (
            ColorSource([0, 1, 2] * 2, CLASSES),
            ColorSource([1, 2, 3], CLASSES),
            "1 of 3 test images count as errors: their classes have no training image (d); "
            "2 of 6 training images are of classes that have no test image (a); wanted the same",
        ),
        (ColorSource([2] * 4, CLASSES), TEST, "its training labels are all of class 'c'; a classifier needs"),
        (
            TRAIN,
            ColorSource([0, 1], ("fish", "owl"), name="birds"),
            r"birds: none of its classes (fish, owl) has a training image in colors (a, b, c, d)",
        ),
        (
            ColorSource([0, 1], tuple("ABCDEFG")),
            ColorSource([0, 1], ("x", "y")),
            "(A, B, C, D, E and 2 more)",
        ),
    ],
)
def test_sources_that_cannot_be_evaluated_are_refused_before_any_work(
    evaluate: Evaluation, train: ColorSource, test: ColorSource, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate(None, None, train, test)


@pytest.mark.parametrize(
    ("evaluate", "settings", "message"),
    [
        (evaluate_knn, {"k": 0}, "k: 0"),
        (evaluate_knn, {"k": ()}, "k: none given"),
        (evaluate_knn, {"k": (5, 7, 5)}, "k: 5, 7, 5, wanted each number once"),
        (evaluate_knn, {"k": 49}, "k: 49, wanted at most 48, the labelled training images of colors"),
        (evaluate_knn, {"k": (5, 200)}, "k: 200, wanted at most 48"),
        (evaluate_knn, {"temperature": -1.0}, "temperature: -1.0"),
        (evaluate_linear, {"l2": -1.0}, "l2: -1.0"),
        (evaluate_linear, {"validation_fraction": 0.0}, "validation_fraction: 0.0"),
    ],
)
def test_settings_are_refused_before_any_work(evaluate: Evaluation, settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(None, None, TRAIN, TEST, **settings)


def test_away_from_a_terminal_each_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_knn(small_encoder(), to_tensor, TRAIN, TEST, k=48)
    captured = capsys.readouterr()
    stages = [re.sub(r" in [\d.]+ s$", "", line) for line in captured.err.splitlines()]
    assert stages == ["features, train: 48 images", "features, test: 20 images", "nearest neighbours: 20 images"]
    assert captured.out == ""


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    evaluate_linear(small_encoder(), to_tensor, TRAIN, TEST, l2_values=(1.0, 0.1))
    bars = capsys.readouterr().err
    assert "━" in bars
    assert "3/3" in bars
    assert np.char.count(bars, "logistic regression") >= 1
