from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from simclr_scale.errors import InputError
from simclr_scale.evaluation import mean_per_class_accuracy, top1


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (7, 3), (1000, 13)])
def test_equal_scikit_learn(n: int, classes: int) -> None:
    rng = np.random.default_rng(n)
    labels, predictions = rng.integers(classes, size=n) * 5, rng.integers(classes + 1, size=n) * 5
    seen = np.unique(labels)
    assert top1(predictions, labels) == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    by_class = recall_score(labels, predictions, labels=seen, average="macro")
    assert mean_per_class_accuracy(torch.from_numpy(predictions), labels) == pytest.approx(by_class, abs=1e-12)


def test_rare_classes_weigh_the_same_in_the_mean_per_class() -> None:
    predictions, labels = torch.zeros(10, dtype=torch.long), torch.tensor([0] * 9 + [1])
    assert top1(predictions, labels) == pytest.approx(0.9)
    assert mean_per_class_accuracy(predictions, labels) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", [top1, mean_per_class_accuracy])
@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1, 2], [0, -1, 2], "labels: 1 of 3 are negative"),
        ([0, 1, 2], [0, 1], "labels: 2 labels for 3"),
        ([], [], "none given"),
        ([[0, 1]], [0, 1], "predictions: shape"),
    ],
)
def test_bad_input_is_named(
    metric: Callable[..., float], predictions: list[int], labels: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metric(torch.tensor(predictions).long(), torch.tensor(labels))
