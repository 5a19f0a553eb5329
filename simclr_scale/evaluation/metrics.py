"""Accuracy, as plain functions of predicted and true classes."""

from collections.abc import Callable

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_classes, as_labels


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
METRICS: dict[str, Callable[[Array, Array], float]] = {"top1": top1, "mean_per_class": mean_per_class_accuracy}


def _hits(predictions: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    predicted = as_classes(predictions, "predictions")
    if not len(predicted):
        raise InputError("predictions: none given, so there is no accuracy")
    truth = as_labels(labels, "labels", rows=len(predicted))
    return predicted == truth, truth
