"""Linear evaluation: multinomial logistic regression on frozen features, to its optimum.

The objective, with n images, weight W (C, D) and bias b (C,), is

    mean cross-entropy + (l2 / 2) ||W||^2,        b not penalised,

so scikit-learn's `C` is 1 / (n l2). It is convex: the answer does not depend on how it is found. (Of two classes
scikit-learn fits the difference w = W_1 - W_0 alone; the same classifier then has C = 2 / (n l2).)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features, as_labels
from simclr_scale.evaluation.classifier import LinearClassifier
from simclr_scale.evaluation.logistic import Fit, LogisticRegression
from simclr_scale.evaluation.metrics import top1

# Chen et al. 2020, appendix B.8: 45 logarithmically spaced values between 1e-6 and 1e5.
L2_VALUES = tuple(float(value) for value in np.logspace(-6, 5, 45))


@dataclass(frozen=True)
class ValidationScore:
    """How one strength of regularisation did on the validation part of the training images."""

    l2: float
    accuracy: float
    iterations: int
    converged: bool


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
    progress: Callable[[int], object] | None = None,
) -> LinearProbe:
    """Fits a linear classifier to frozen features and scores it once on the test features, where they are given.

    With `l2` there is one fit. Without it, the strength is chosen without the test images (Chen et al. 2020, appendix
    B.8): each of `l2_values` is fitted to a part of the training images, from the strongest to the weakest, each from
    the solution before; the one with the best top-1 on the other part wins, the strongest among equals; and it is
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
        progress: is told how many fits are done; there are `len(l2_values) + 1`, or 1 with `l2`.

    Raises:
        InputError: shapes do not fit, features are not finite, an image is unlabelled, there are fewer than two
            classes, a strength is not above 0, or no class has the two images that choosing a strength takes.
    """
    check_linear_settings(l2, l2_values, validation_fraction, max_iterations)
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
        validation = _validate(features, targets, l2_values, validation_fraction, seed, max_iterations, report)
        l2 = max(validation, key=lambda score: (score.accuracy, score.l2)).l2
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
        warnings=_warnings(fit, l2, validation, max_iterations),
    )
    if test_features is None or test_labels is None:
        return probe
    return replace(probe, test_accuracy=probe.accuracy(test_features, test_labels))


def check_linear_settings(
    l2: float | None, l2_values: tuple[float, ...], validation_fraction: float, max_iterations: int
) -> None:
    """Raises InputError for settings out of range; for a command to call before it computes features."""
    if l2 is None and not l2_values:
        raise InputError("l2_values: none given to choose from")
    for value in l2_values if l2 is None else (l2,):
        if not 0 < value < math.inf:
            raise InputError(f"l2: {value}, wanted a finite number above 0")
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction: {validation_fraction}, wanted between 0 and 1")
    if max_iterations < 1:
        raise InputError(f"max_iterations: {max_iterations}, wanted at least 1")


def _validate(
    features: torch.Tensor,
    targets: torch.Tensor,
    l2_values: tuple[float, ...],
    fraction: float,
    seed: int,
    max_iterations: int,
    report: Callable[[int], object],
) -> tuple[ValidationScore, ...]:
    kept, held_out = (torch.from_numpy(part) for part in stratified_split(targets.numpy(), 1 - fraction, seed))
    if not len(held_out):
        raise InputError("train_labels: one image in each class, none left to choose l2 by; give l2 itself")
    problem = LogisticRegression(features[kept], targets[kept], int(targets.max()) + 1)
    scores: list[ValidationScore] = []
    fit: Fit | None = None
    for l2 in sorted(l2_values, reverse=True):
        fit = problem.fit(l2, start=fit, max_iterations=max_iterations)
        predictions = (features[held_out] @ fit.weight.T + fit.bias).argmax(dim=1)
        scores.append(ValidationScore(l2, top1(predictions, targets[held_out]), fit.iterations, fit.converged))
        report(len(scores))
    return tuple(scores)


def _warnings(fit: Fit, l2: float, validation: tuple[ValidationScore, ...], max_iterations: int) -> tuple[str, ...]:
    warnings = []
    stopped = [score.l2 for score in validation if not score.converged]
    if stopped:
        warnings.append(
            f"{len(stopped)} of the {len(validation)} fits that chose l2 stopped short of their optimum within "
            f"{max_iterations} iterations, the first at l2 = {stopped[0]:.2g}"
        )
    if not fit.converged:
        warnings.append(f"the fit stopped short of its optimum after {fit.iterations} iterations")
    # Beyond the strongest the classifier hardly changes: its weights only shrink.
    if len(validation) > 1 and l2 == validation[-1].l2:
        warnings.append(f"the l2 chosen, {l2:.2g}, is the weakest of those tried: a better one may lie below")
    return tuple(warnings)
