"""Ranking metrics against scikit-learn and against the definition, pair by pair and recall by recall."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, roc_auc_score

from simclr_scale.errors import InputError
from simclr_scale.evaluation import METRICS, mean_auc, voc2007_map
from simclr_scale.evaluation.metrics import check_metric
from simclr_scale.evaluation.ranking import classes_counted


def several_labels(images: int, classes: int, ties: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.choice([-1, 0, 1], size=(images, classes), p=[0.1, 0.6, 0.3])
    targets[0], targets[1] = 1, 0  # every class has both
    scores = rng.normal(size=(images, classes)) + targets
    return (scores.round(0) if ties else scores), targets


def naive_map(scores: np.ndarray, targets: np.ndarray) -> float:
    """The definition, in exact fractions: the best precision at a recall of at least k / 10, for k = 0 to 10."""
    values = []
    for score, truth in zip(scores.T, targets.T, strict=True):
        score, truth = score[truth >= 0], truth[truth >= 0]
        points = []
        for threshold in np.unique(score):
            retrieved = truth[score >= threshold]
            points.append(
                (Fraction(int(retrieved.sum()), int(truth.sum())), Fraction(int(retrieved.sum()), len(retrieved)))
            )
        best = [max(p for recall, p in points if recall >= Fraction(k, 10)) for k in range(11)]
        values.append(sum(best) / 11)
    return float(sum(values) / len(values))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("images", "classes"), [(3, 1), (41, 5), (500, 20)])
def test_the_11_point_map_is_its_definition(images: int, classes: int, ties: bool) -> None:
    scores, targets = several_labels(images, classes, ties, images)
    assert voc2007_map(scores, targets) == pytest.approx(naive_map(scores, targets), abs=1e-12)
    expected = []
    for column in range(classes):
        said = targets[:, column] >= 0
        precision, recall, _ = precision_recall_curve(targets[said, column], scores[said, column])
        precision, recall = precision[:-1], recall[:-1]  # scikit-learn adds a point of recall 0 and precision 1
        expected.append(np.mean([precision[recall >= k / 10 - 1e-9].max() for k in range(11)]))
    assert voc2007_map(torch.from_numpy(scores), torch.from_numpy(targets)) == pytest.approx(np.mean(expected))


def test_the_11_point_map_worked_by_hand() -> None:
    # Ranked: hit, miss, hit. Recall .5 at precision 1, recall 1 at 2/3: six points of 1 and five of 2/3.
    targets = np.array([[1], [0], [1], [-1]])
    scores = np.array([[9.0], [8.0], [7.0], [100.0]])  # the difficult one, ranked first, does not count
    assert voc2007_map(scores, targets) == pytest.approx((6 + 5 * 2 / 3) / 11, abs=1e-15)
    assert voc2007_map(scores[:3], targets[:3]) == voc2007_map(scores, targets)
    targets[3] = 0
    assert voc2007_map(scores, targets) < 0.6


def test_recall_of_three_in_ten_counts_as_three_tenths() -> None:
    targets = np.array([1] * 3 + [0] * 4 + [1] * 7)[:, None]
    scores = np.arange(14.0)[::-1][:, None].copy()
    # Recalls to .3 at precision 1; then 10/14 is the best.
    assert voc2007_map(scores, targets) == pytest.approx((4 + 7 * 10 / 14) / 11, abs=1e-15)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("images", "classes"), [(2, 1), (41, 5), (500, 20)])
def test_mean_auc_of_several_labels_is_that_of_scikit_learn(images: int, classes: int, ties: bool) -> None:
    scores, targets = several_labels(images, classes, ties, images + 1)
    said = [targets[:, column] >= 0 for column in range(classes)]
    expected = [roc_auc_score(targets[rows, c], scores[rows, c]) for c, rows in enumerate(said)]
    assert mean_auc(scores, targets) == pytest.approx(np.mean(expected), abs=1e-12)
    pairs = [
        np.mean(np.sign(scores[targets[:, c] == 1, c][:, None] - scores[targets[:, c] == 0, c]) / 2 + 0.5)
        for c in range(classes)
    ]
    assert mean_auc(scores, targets) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_mean_auc_of_one_label_is_one_against_the_rest(ties: bool) -> None:
    rng = np.random.default_rng(5)
    labels = np.concatenate([np.arange(7), rng.integers(7, size=90)])
    logits = rng.normal(size=(97, 7)) + 2 * np.eye(7)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = probabilities.round(1) + 0.02  # equal sums are not needed for the order
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert mean_auc(probabilities, labels) == pytest.approx(expected, abs=1e-12)
    one_hot = (labels[:, None] == np.arange(7)).astype(int)
    assert mean_auc(probabilities, one_hot) == mean_auc(probabilities, labels)


@pytest.mark.parametrize("metric", [voc2007_map, mean_auc])
def test_the_order_of_the_images_does_not_matter_even_among_ties(metric: Callable[..., float]) -> None:
    scores, targets = several_labels(60, 3, True, 3)
    order = np.random.default_rng(0).permutation(60)
    assert metric(scores[order], targets[order]) == pytest.approx(metric(scores, targets), abs=1e-15)


def test_equal_scores_are_chance_for_the_auc() -> None:
    assert mean_auc(np.zeros((9, 1)), np.array([1] * 3 + [0] * 6)[:, None]) == 0.5


def test_classes_without_positives_or_negatives_are_left_out() -> None:
    scores, targets = several_labels(30, 4, False, 8)
    targets[targets[:, 1] == 1, 1] = 0
    targets[targets[:, 2] == 0, 2] = -1
    assert classes_counted(targets, 4, negatives=True) == [0, 3]
    assert classes_counted(targets, 4, negatives=False) == [0, 2, 3]
    assert mean_auc(scores, targets) == mean_auc(scores[:, [0, 3]], targets[:, [0, 3]])
    assert voc2007_map(scores, targets) == voc2007_map(scores[:, [0, 2, 3]], targets[:, [0, 2, 3]])
    with pytest.raises(InputError, match="no class has both positive and negative images"):
        mean_auc(scores[:, 1:3], targets[:, 1:3])
    with pytest.raises(InputError, match="no class has positive images"):
        voc2007_map(scores[:, 1:2], targets[:, 1:2])


@pytest.mark.parametrize("metric", [voc2007_map, mean_auc])
@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.ones((3, 2)), np.zeros((3, 3), int), r"targets: shape \(3, 3\) for scores \(3, 2\)"),
        (np.ones((3, 2)), np.zeros(4, int), "targets: shape"),
        (np.ones((3, 2)), np.array([0, 1, -1]), "1 of 3 are negative"),
        (np.ones((3, 2)), np.full((3, 2), 2), "are 1, 0 or -1"),
        (np.ones((3, 2)), np.ones((3, 2)), "wanted integers"),
        (np.ones(3), np.array([0, 1, 0]), "scores: shape"),
        (np.full((3, 2), np.nan), np.array([0, 1, 0]), "scores: row 0 holds NaN"),
    ],
)
def test_bad_input_is_named(
    metric: Callable[..., float], scores: np.ndarray, targets: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metric(scores, targets)


def test_metrics_by_name() -> None:
    assert list(METRICS) == ["top1", "mean_per_class", "voc2007_map", "mean_auc"]
    for name in METRICS:
        check_metric(name)
    with pytest.raises(InputError, match=r"metric: there is no 'mean_acu'; did you mean mean_auc\?"):
        check_metric("mean_acu")
    with pytest.raises(InputError, match="there are top1, mean_per_class, voc2007_map, mean_auc"):
        check_metric("zzz")
