"""From the loss curves of branches to a critical batch.

Steps S and images E = B S to reach one loss follow, in the model of McCandlish et al. 2018 (section 2.3),

    (S / S_min - 1)(E / E_min - 1) = 1,   that is S = S_min + E_min / B,

with the critical batch E_min / S_min, at which both are twice their least. Merrill et al. 2025 compare instead the
smoothed loss of branches after the same number of images: up to the critical batch it is that of the smallest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

from simclr_scale.errors import InputError
from simclr_scale.scaling.studies.lr_rules import MeanOfSeeds

Array = NDArray[np.float64]
_WINDOW = 3


@dataclass(frozen=True)
class Hyperbola:
    """Least steps and least images, and the batch between them.

    Attributes:
        interval: 95%, of the critical batch, from the scatter of the points around the curve; None of two points.
        worst: largest relative distance of a point from the curve.
    """

    least_steps: float
    least_images: float
    interval: tuple[float, float] | None
    worst: float

    @property
    def critical_batch(self) -> float:
        return self.least_images / self.least_steps

    def steps(self, batch: Array) -> Array:
        return self.least_steps + self.least_images / batch


def fit_hyperbola(batches: Sequence[float], steps: Sequence[float]) -> Hyperbola:
    """By least squares of relative errors of S.

    Args:
        batches: B of each point, in images; points of several seeds at one B are welcome.
        steps: S of each point, above 0.

    Raises:
        InputError: fewer than three batch sizes, which any hyperbola of two unknowns meets, or a value not above 0.
    """
    b, s = np.asarray(batches, float), np.asarray(steps, float)
    if len(set(batches)) < 3:
        raise InputError(
            f"the hyperbola needs three batch sizes that reach the target at least, got {len(set(batches))}"
        )
    if not (np.isfinite(s) & (s > 0)).all():
        raise InputError("steps to the target must be above 0: it is met before the first step")

    def residuals(logs: Array) -> Array:
        return np.logaddexp(logs[0], logs[1] - np.log(b)) - np.log(s)

    # From no use of larger batches at all to perfect use.
    starts = [(np.log(s.min()) - near, np.log((b * s).min()) - far) for near, far in ((0.7, 0.7), (5, 0.1), (0.1, 5))]
    best = min((least_squares(residuals, start) for start in starts), key=lambda solution: solution.cost)
    interval = None
    freedom = len(b) - 2
    if freedom > 0:
        covariance = np.linalg.pinv(best.jac.T @ best.jac) * 2 * best.cost / freedom
        toward = np.array([-1.0, 1.0])  # log B_crit = log E_min - log S_min
        half = float(student.ppf(0.975, freedom)) * math.sqrt(max(0.0, float(toward @ covariance @ toward)))
        centre = float(best.x[1] - best.x[0])
        # An end that nothing bounds would be no number in JSON.
        interval = (math.exp(max(centre - half, -700.0)), math.exp(min(centre + half, 700.0)))
    least_steps, least_images = (float(value) for value in np.exp(best.x))
    return Hyperbola(least_steps, least_images, interval, float(np.expm1(np.abs(best.fun)).max()))


def smoothed(points: Sequence[dict[str, float]]) -> tuple[Array, Array]:
    """Steps and loss of a curve, each value the mean of itself and its neighbours; the ends of what there is of them.

    A weight on both sides, so that a falling curve is not shifted.
    """
    steps = np.array([point["step"] for point in points], float)
    loss = np.array([point["loss"] for point in points], float)
    reach = _WINDOW // 2
    # As many to one side as to the other: at the ends none.
    out = [
        loss[place - (r := min(reach, place, len(loss) - 1 - place)) : place + r + 1].mean()
        for place in range(len(loss))
    ]
    return steps, np.array(out)


def steps_to(points: Sequence[dict[str, float]], target: float) -> float | None:
    """Steps after which the smoothed loss first is at the target, between two points by a straight line."""
    steps, loss = smoothed(points)
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return 0.0
    share = (loss[at - 1] - target) / (loss[at - 1] - loss[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


@dataclass(frozen=True)
class Criterion:
    """What a branch is measured by.

    Attributes:
        target: loss to be reached; None: the highest of the lowest losses of all branches of as many negatives, which
            is the lowest that all of them reach.
        tolerance: by which a branch's loss after all images may exceed the lowest of smaller batches.
    """

    target: float | None = None
    tolerance: float = 0.01


def compare_branches(results: Sequence[dict[str, Any]], criterion: Criterion) -> list[dict[str, Any]]:
    """One entry for each number of negatives: its branches by batch, the fit, and the batch that still loses nothing.

    Raises:
        InputError: there is nothing to compare.
    """
    if not results:
        raise InputError("no branch of this study is done")
    return [
        _of_one_task([r for r in results if r["negatives"] == negatives], negatives, criterion)
        for negatives in sorted({r["negatives"] for r in results})
    ]


def _of_one_task(results: Sequence[dict[str, Any]], negatives: int, criterion: Criterion) -> dict[str, Any]:
    whole = [r for r in results if not r["diverged"]]
    target = criterion.target
    if target is None and whole:
        target = max(float(smoothed(r["curve"])[1].min()) for r in whole)
    rows, fitted = [], []
    for batch in sorted({r["batch"] for r in results}):
        own = [r for r in whole if r["batch"] == batch]
        steps = [steps_to(r["curve"], target) for r in own] if target is not None else []
        reached = [value for value in steps if value is not None]
        fitted += [(batch, value) for value in reached]
        linear = [r["linear_top1"] for r in own if r["linear_top1"] is not None]
        last = [float(smoothed(r["curve"])[1][-1]) for r in own]
        rows.append(
            {
                "batch": batch,
                "negatives": negatives,
                "negatives_per_view": 2 * (negatives - 1),
                "rate": next(r["rate"] for r in results if r["batch"] == batch),
                "seeds": sum(r["batch"] == batch for r in results),
                "diverged": sum(r["batch"] == batch and r["diverged"] for r in results),
                "reached": len(reached),
                "steps_to_target": vars(MeanOfSeeds.of(reached)) if reached else None,
                "images_to_target": batch * float(np.mean(reached)) if reached else None,
                "final_loss": vars(MeanOfSeeds.of(last)) if last else None,
                "linear_top1": vars(MeanOfSeeds.of(linear)) if linear else None,
            }
        )
    return {
        "negatives": negatives,
        "target": target,
        "rows": rows,
        "largest_without_loss": _largest(rows, criterion),
    } | _fit(fitted)


def _largest(rows: Sequence[dict[str, Any]], criterion: Criterion) -> int | None:
    """The largest batch up to which no branch ends above the lowest of smaller ones by more than the tolerance."""
    best, largest = math.inf, None
    for row in rows:
        if row["final_loss"] is None or row["final_loss"]["mean"] > best + criterion.tolerance:
            break
        best, largest = min(best, row["final_loss"]["mean"]), row["batch"]
    return largest


def _fit(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    try:
        hyperbola = fit_hyperbola(*zip(*points, strict=True)) if points else None
    except InputError as error:
        return {"hyperbola": None, "why_no_hyperbola": str(error)}
    if hyperbola is None:
        return {"hyperbola": None, "why_no_hyperbola": "no branch reaches the target"}
    return {
        "hyperbola": {
            "least_steps": hyperbola.least_steps,
            "least_images": hyperbola.least_images,
            "critical_batch": hyperbola.critical_batch,
            "interval": list(hyperbola.interval) if hyperbola.interval else None,
            "worst_relative_error": hyperbola.worst,
        }
    }
