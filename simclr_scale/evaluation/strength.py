"""The strength of the penalty of a linear classifier: the values to choose from, and how they are tried."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.logistic import BinaryRegressions, Fit, LogisticRegression

# Chen et al. 2020, appendix B.8: 45 logarithmically spaced values between 1e-6 and 1e5.
L2_VALUES = tuple(float(value) for value in np.logspace(-6, 5, 45))


@dataclass(frozen=True)
class ValidationScore:
    """How one strength of regularisation did on the validation images."""

    l2: float
    accuracy: float
    """The metric that the choice goes by: top-1, or the metric of the data set."""
    iterations: int
    converged: bool


def try_strengths(
    problem: LogisticRegression | BinaryRegressions,
    l2_values: tuple[float, ...],
    score: Callable[[torch.Tensor, torch.Tensor], float],
    max_iterations: int,
    report: Callable[[int], object],
) -> tuple[ValidationScore, ...]:
    """Fits `problem` at each strength, from the strongest to the weakest, each from the solution before.

    Args:
        problem: the training images without the validation images.
        l2_values: the strengths.
        score: from weight (C, D) and bias (C,) to the metric on the validation images.
        max_iterations: of each fit.
        report: is told how many fits are done.
    """
    scores: list[ValidationScore] = []
    fit: Fit | None = None
    for l2 in sorted(l2_values, reverse=True):
        fit = problem.fit(l2, start=fit, max_iterations=max_iterations)
        scores.append(ValidationScore(l2, score(fit.weight, fit.bias), fit.iterations, fit.converged))
        report(len(scores))
    return tuple(scores)


def best_strength(validation: tuple[ValidationScore, ...]) -> float:
    """The one of the highest metric, the strongest among equals."""
    return max(validation, key=lambda score: (score.accuracy, score.l2)).l2


def as_mask(rows: np.ndarray, length: int) -> torch.Tensor:
    """(length,) bool, True at `rows`. Raises InputError where that leaves nothing, or nothing beside it."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[torch.as_tensor(rows, dtype=torch.int64)] = True
    if mask.all() or not mask.any():
        raise InputError(
            f"validation_rows: {int(mask.sum())} of {length} images, wanted some for training and some here"
        )
    return mask


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


def strength_warnings(
    fit: Fit, l2: float, validation: tuple[ValidationScore, ...], max_iterations: int
) -> tuple[str, ...]:
    """One line each on what may have cost accuracy: a fit short of its optimum, the weakest `l2` chosen."""
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
