"""Linear evaluation: multinomial logistic regression on frozen features, to its optimum.

The objective, with n images, weight W (C, D) and bias b (C,), is

    mean cross-entropy + (l2 / 2) ||W||^2,        b not penalised,

so scikit-learn's `C` is 1 / (n l2). It is convex: the answer does not depend on how it is found. (Of two classes
scikit-learn fits the difference w = W_1 - W_0 alone; the same classifier then has C = 2 / (n l2).)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features, as_labels
from simclr_scale.evaluation.classifier import LinearClassifier
from simclr_scale.evaluation.logistic import LogisticRegression
from simclr_scale.evaluation.metrics import METRICS, check_metric
from simclr_scale.evaluation.strength import (
    L2_VALUES,
    ValidationScore,
    as_mask,
    best_strength,
    check_linear_settings,
    strength_warnings,
    try_strengths,
)


@dataclass(frozen=True)
class LinearProbe(LinearClassifier):
    """A linear classifier fitted to the optimum of the objective above."""

    l2: float
    train_loss: float
    """The objective at the solution, penalty included."""
    iterations: int
    converged: bool
    validation: tuple[ValidationScore, ...] = ()
    """Of every strength tried, in the order tried; empty where `l2` was given."""
    test_accuracy: float | None = None
    warnings: tuple[str, ...] = ()
    """One line each on what may have cost accuracy: a fit short of its optimum, the weakest `l2` chosen."""


def linear_probe(
    train_features: Array,
    train_labels: Array,
    test_features: Array | None = None,
    test_labels: Array | None = None,
    *,
    l2: float | None = None,
    l2_values: tuple[float, ...] = L2_VALUES,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_iterations: int = 5000,
    metric: str = "top1",
    validation_rows: np.ndarray | None = None,
    progress: Callable[[int], object] | None = None,
) -> LinearProbe:
    """Fits a linear classifier to frozen features and scores it once on the test features, where they are given.

    With `l2` there is one fit. Without it, the strength is chosen without the test images (Chen et al. 2020, appendix
    B.8): each of `l2_values` is fitted to a part of the training images, from the strongest to the weakest, each from
    the solution before; the one with the best `metric` on the other part wins, the strongest among equals; and it is
    fitted anew to all training images.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers >= 0, of at least two classes, in any numbering.
        test_features: (M, D).
        test_labels: (M,).
        l2: strength of the penalty in the objective above.
        l2_values: the strengths to choose from.
        validation_fraction: the share of every class that the choice is made on.
        seed: of the draw of that share.
        max_iterations: of L-BFGS, in each fit; a fit that needs more is reported in `converged` and `warnings`.
        metric: that the choice goes by, a name of `METRICS`; the test accuracy is top-1 whatever it is.
        validation_rows: the training images that the choice is made on, (V,) row numbers, where the data set says which
            they are; instead of the drawn share.
        progress: is told how many fits are done; there are `len(l2_values) + 1`, or 1 with `l2`.

    Raises:
        InputError: shapes do not fit, features are not finite, an image is unlabelled, there are fewer than two
            classes, a strength is not above 0, or no class has the two images that choosing a strength takes.
    """
    check_linear_settings(l2, l2_values, validation_fraction, max_iterations)
    check_metric(metric)
    features = as_features(train_features, "train_features", torch.float64)
    labels = as_labels(train_labels, "train_labels", rows=len(features))
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"train_labels: all are of class {int(classes[0])}; a classifier needs at least two classes")
    if (test_features is None) != (test_labels is None):
        raise InputError("test_features, test_labels: one is given without the other")
    report = progress or (lambda _done: None)
    validation: tuple[ValidationScore, ...] = ()
    if l2 is None:
        if validation_rows is None:
            held_out = _held_out(targets, validation_fraction, seed)
        else:
            held_out = as_mask(validation_rows, len(targets))
        validation = _validate(features, targets, classes, held_out, l2_values, metric, max_iterations, report)
        l2 = best_strength(validation)
    fit = LogisticRegression(features, targets, len(classes)).fit(l2, max_iterations=max_iterations)
    report(len(validation) + 1)

    probe = LinearProbe(
        weight=fit.weight,
        bias=fit.bias,
        classes=classes,
        l2=l2,
        train_loss=fit.loss,
        iterations=fit.iterations,
        converged=fit.converged,
        validation=validation,
        warnings=strength_warnings(fit, l2, validation, max_iterations),
    )
    if test_features is None or test_labels is None:
        return probe
    return replace(probe, test_accuracy=probe.accuracy(test_features, test_labels))


def _validate(
    features: torch.Tensor,
    targets: torch.Tensor,
    classes: torch.Tensor,
    held_out: torch.Tensor,
    l2_values: tuple[float, ...],
    metric: str,
    max_iterations: int,
    report: Callable[[int], object],
) -> tuple[ValidationScore, ...]:
    """`held_out`: (N,) bool, the validation images, of classes that the others have too or that count as errors."""
    kept = ~held_out
    present = targets[kept].unique()
    if len(present) < 2:
        raise InputError("train_labels: without the validation images all are of one class, so l2 cannot be chosen")
    problem = LogisticRegression(features[kept], torch.searchsorted(present, targets[kept]), len(present))

    def score(weight: torch.Tensor, bias: torch.Tensor) -> float:
        classifier = LinearClassifier(weight, bias, present)
        return METRICS[metric](classifier.answers(features[held_out], metric, len(classes)), targets[held_out])

    return try_strengths(problem, l2_values, score, max_iterations, report)


def _held_out(targets: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    _, rows = stratified_split(targets.numpy(), 1 - fraction, seed)
    if not len(rows):
        raise InputError("train_labels: one image in each class, none left to choose l2 by; give l2 itself")
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[torch.from_numpy(rows)] = True
    return held_out
