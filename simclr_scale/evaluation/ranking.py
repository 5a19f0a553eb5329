"""Metrics of how the images are ranked for each class: 11-point average precision and the area under the ROC curve.

Both take scores (M, C), larger for images more likely of the class, and targets: (M, C) of several labels an image (1
where it has the class, 0 where not, -1 where that is unsaid and the image is left out for this class), or (M,), the
one class of each image. Only the order of the scores within a class counts. Images of equal score are taken together,
so the order in which they come does not matter.

A class without a positive test image has no value of either metric, and one without a negative none of the second.
Such classes are left out of the mean; `classes_counted` names those that are in it, for a note. With none left it is
an error.
"""

import numpy as np
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features

_RECALL_POINTS = 11


def voc2007_map(scores: Array, targets: Array) -> float:
    """Mean over classes of the 11-point interpolated average precision of Pascal VOC 2007.

    The mean over recalls 0, .1, ..., 1 of the best precision at that recall or a higher one (Everingham et al. 2010,
    "The Pascal Visual Object Classes (VOC) Challenge", section 4.2; `VOCevalcls.m` of the development kit, which leaves
    "difficult" images out as targets of -1 are here). Raises InputError as the module says, and for shapes that do not
    fit.
    """
    matrix, truth = _checked(scores, targets)
    counted = classes_counted(truth, matrix.shape[1], negatives=False)
    return float(np.mean([_average_precision(*_said(matrix, truth, column)) for column in counted]))


def mean_auc(scores: Array, targets: Array) -> float:
    """Mean over classes of the area under the ROC curve of the class against the rest.

    The share of pairs, one image of the class and one not, in which the first has the higher score; a tie counts half
    (Mann-Whitney). Raises InputError as the module says, and for shapes that do not fit.
    """
    matrix, truth = _checked(scores, targets)
    counted = classes_counted(truth, matrix.shape[1], negatives=True)
    return float(np.mean([_area_under_curve(*_said(matrix, truth, column)) for column in counted]))


def classes_counted(targets: Array, num_classes: int, *, negatives: bool) -> list[int]:
    """The classes that a mean is over: those with a positive test image and, with `negatives`, a negative one.

    Raises InputError where there is none.
    """
    truth = _as_columns(np.asarray(targets), num_classes)
    counted = (truth == 1).any(axis=0) & ((truth == 0).any(axis=0) | (not negatives))
    if not counted.any():
        raise InputError(f"targets: no class has {'both positive and negative' if negatives else 'positive'} images")
    return np.flatnonzero(counted).tolist()


def _checked(scores: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
    """Scores (M, C) float64 and targets (M, C)."""
    matrix = as_features(scores, "scores", torch.float64).numpy()
    truth = np.asarray(targets)
    if truth.dtype.kind not in "iu":
        raise InputError(f"targets: {truth.dtype}, wanted integers")
    if truth.ndim not in (1, 2) or len(truth) != len(matrix) or (truth.ndim == 2 and truth.shape != matrix.shape):
        raise InputError(f"targets: shape {truth.shape} for scores {matrix.shape}")
    if truth.ndim == 2 and not np.isin(truth, (-1, 0, 1)).all():
        raise InputError("targets: those of several labels an image are 1, 0 or -1")
    if truth.ndim == 1 and truth.min() < 0:
        raise InputError(f"targets: {int((truth < 0).sum())} of {len(truth)} are negative (unlabelled)")
    return matrix, _as_columns(truth, matrix.shape[1])


def _as_columns(truth: np.ndarray, num_classes: int) -> np.ndarray:
    return truth if truth.ndim == 2 else (truth[:, None] == np.arange(num_classes)).astype(np.int64)


def _said(matrix: np.ndarray, truth: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and whether they are of the class, of the images of which that is said."""
    said = truth[:, column] >= 0
    return matrix[said, column], truth[said, column] == 1


def _average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    # Only after the last of several images with one score.
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found, precision = found[ends], found[ends] / (ends + 1)
    # Whole numbers: .1 is no binary fraction, and a recall of 3 in 10 must count as .3.
    reached = (found[:, None] * (_RECALL_POINTS - 1)) >= np.arange(_RECALL_POINTS) * found[-1]
    return float(np.where(reached, precision[:, None], 0).max(axis=0).mean())


def _area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    from scipy.stats import rankdata

    count = int(positive.sum())
    excess = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(excess / (count * (len(scores) - count)))
