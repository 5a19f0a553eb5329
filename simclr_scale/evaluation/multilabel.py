"""Linear evaluation with several labels an image: one logistic regression for each class against the rest.

The protocol of VOC2007 in SimCLR's transfer results (Chen et al. 2020, appendix B.8), which scores by 11-point mAP. The
objective of each class is that of `linear.py` with two outcomes, the strength `l2` one for all classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features
from simclr_scale.evaluation.classifier import LinearClassifier
from simclr_scale.evaluation.logistic import BinaryRegressions
from simclr_scale.evaluation.metrics import METRICS, OF_SCORES, check_metric
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
class MultiLabelProbe(LinearClassifier):
    """C classifiers, each of its class against the rest; `logits` are their scores."""

    l2: float
    train_loss: float
    """The objective at the solution, penalty included, summed over classes."""
    iterations: int
    converged: bool
    validation: tuple[ValidationScore, ...] = ()
    """Of every strength tried, in the order tried; empty where `l2` was given."""
    warnings: tuple[str, ...] = ()


def multilabel_probe(
    train_features: Array,
    train_targets: Array,
    *,
    validation_rows: np.ndarray | None = None,
    l2: float | None = None,
    l2_values: tuple[float, ...] = L2_VALUES,
    metric: str = "voc2007_map",
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_iterations: int = 5000,
    progress: Callable[[int], object] | None = None,
) -> MultiLabelProbe:
    """Fits one logistic regression a class to frozen features, its strength chosen as `linear_probe` does.

    Args:
        train_features: (N, D).
        train_targets: (N, C): 1 where the image has the class, 0 where not, -1 where that is unsaid.
        validation_rows: the images that the choice is made on, (V,) row numbers; None draws them.
        l2: strength of the penalty, which then is not chosen.
        l2_values: the strengths to choose from.
        metric: that the choice goes by, voc2007_map or mean_auc.
        validation_fraction: the share of the images that is drawn.
        seed: of the draw.
        max_iterations: of L-BFGS, in each fit.
        progress: is told how many fits are done; there are `len(l2_values) + 1`, or 1 with `l2`.

    Raises:
        InputError: shapes do not fit, features are not finite, a class is said of no training image, a setting is out
            of range, or the metric is not one of scores.
    """
    check_linear_settings(l2, l2_values, validation_fraction, max_iterations)
    check_several_labels(metric)
    features = as_features(train_features, "train_features", torch.float64)
    targets = torch.as_tensor(train_targets).cpu()
    if targets.ndim != 2 or len(targets) != len(features) or targets.is_floating_point():
        raise InputError(f"train_targets: {targets.dtype} {tuple(targets.shape)}, wanted integers ({len(features)}, C)")
    if not torch.isin(targets, torch.tensor([-1, 0, 1])).all():
        raise InputError("train_targets: wanted 1, 0 or -1")
    _require_said(targets, "training images")
    report = progress or (lambda _done: None)
    validation: tuple[ValidationScore, ...] = ()
    if l2 is None:
        held_out = as_mask(
            _drawn(len(targets), validation_fraction, seed) if validation_rows is None else validation_rows,
            len(targets),
        )
        _require_said(targets[~held_out], "training images without the validation images")

        def score(weight: torch.Tensor, bias: torch.Tensor) -> float:
            return METRICS[metric](features[held_out] @ weight.T + bias, targets[held_out])

        problem = BinaryRegressions(features[~held_out], targets[~held_out])
        validation = try_strengths(problem, l2_values, score, max_iterations, report)
        l2 = best_strength(validation)
    fit = BinaryRegressions(features, targets).fit(l2, max_iterations=max_iterations)
    report(len(validation) + 1)
    return MultiLabelProbe(
        weight=fit.weight,
        bias=fit.bias,
        classes=torch.arange(targets.shape[1]),
        l2=l2,
        train_loss=fit.loss,
        iterations=fit.iterations,
        converged=fit.converged,
        validation=validation,
        warnings=strength_warnings(fit, l2, validation, max_iterations),
    )


def check_several_labels(metric: str) -> None:
    """Raises InputError where `metric` is not one of images that have several labels each."""
    check_metric(metric)
    if metric not in OF_SCORES:
        raise InputError(
            f"metric: {metric} takes one label an image, and these have several; wanted {' or '.join(OF_SCORES)}"
        )


def _require_said(targets: torch.Tensor, which: str) -> None:
    unsaid = (targets < 0).all(dim=0)
    if unsaid.any():
        raise InputError(f"train_targets: class {int(unsaid.nonzero()[0])} is said of none of the {which}")


def _drawn(images: int, fraction: float, seed: int) -> np.ndarray:
    # The raw stream, which NumPy promises to keep; its permutation() may change between releases.
    order = np.argsort(np.random.Philox(key=[seed, images]).random_raw(images), kind="stable")
    return order[: max(1, int(fraction * images + 0.5))]
