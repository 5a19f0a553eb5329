"""Accuracy, as plain functions of predicted and true classes, and all metrics by name."""

from collections.abc import Callable
from difflib import get_close_matches

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_classes, as_labels
from simclr_scale.evaluation.ranking import mean_auc, voc2007_map


def top1(predictions: Array, labels: Array) -> float:
    """Share of images whose predicted class is the true one.

    predictions, labels: (N,) integers. Raises InputError for lengths that differ, none at all, or a label of -1
    (unlabelled), which could only ever count as an error.
    """
    return float(_hits(predictions, labels)[0].double().mean())


def mean_per_class_accuracy(predictions: Array, labels: Array) -> float:
    """Mean over the classes in `labels` of the accuracy within the class: every class weighs the same.

    The metric of Aircraft, Pets, Caltech-101 and Flowers in SimCLR's transfer results (Chen et al. 2020, appendix
    B.8). Arguments and errors as for `top1`.
    """
    hits, truth = _hits(predictions, labels)
    _, position = truth.unique(return_inverse=True)
    return float((torch.bincount(position, weights=hits.double()) / torch.bincount(position)).mean())


# By the name that a manifest gives: from answers and targets, as `Outcome` holds them, to the value.
METRICS: dict[str, Callable[[Array, Array], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class_accuracy,
    "voc2007_map": voc2007_map,
    "mean_auc": mean_auc,
}
OF_SCORES = ("voc2007_map", "mean_auc")
"""Those whose answers are scores (M, C); the others take predicted classes, and so one label an image."""


def check_metric(name: str) -> None:
    """Raises InputError, naming those there are, where there is no metric `name`."""
    if name not in METRICS:
        close = get_close_matches(name, METRICS, n=1)
        raise InputError(
            f"metric: there is no {name!r}; "
            + (f"did you mean {close[0]}?" if close else f"there are {', '.join(METRICS)}")
        )


def _hits(predictions: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = as_classes(predictions, "predictions")
    if not len(predicted):
        raise InputError("predictions: none given, so there is no accuracy")
    truth = as_labels(labels, "labels", rows=len(predicted))
    return predicted == truth, truth
