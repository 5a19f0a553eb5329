"""Laws of parallel speed, and the serial fraction that fits measured times best.

With s the serial fraction and n devices:

- Amdahl 1967, one piece of work on more devices (strong scaling): T(n) = T(1) (s + (1 - s) / n).
- Gustafson 1988, work that grows with the devices (weak scaling): images a second X(n) = X(1) (s + (1 - s) n).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from simclr_scale.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A law with its two unknowns.

    Attributes:
        serial_fraction: s, from 0 to 1. At 0 the devices lose nothing (or gain more than their number).
        of_one: T(1) in seconds, or X(1) in images a second.
        error: standard error of s; None from two numbers of devices, which a law always meets.
        worst: largest relative distance of a point from the law.
    """

    serial_fraction: float
    of_one: float
    error: float | None
    worst: float


def amdahl(devices: Array, serial_fraction: float) -> Array:
    """T(n) / T(1)."""
    return serial_fraction + (1 - serial_fraction) / devices


def gustafson(devices: Array, serial_fraction: float) -> Array:
    """X(n) / X(1)."""
    return serial_fraction + (1 - serial_fraction) * devices


def fit_serial_fraction(devices: Sequence[int], values: Sequence[float], law: Callable[[Array, float], Array]) -> Fit:
    """Least squares of relative errors (differences of logarithms), with s kept within 0 and 1.

    Args:
        devices: n of each point, at least two different ones.
        values: seconds (`amdahl`) or images a second (`gustafson`), above 0.

    Raises:
        InputError: too few numbers of devices, or a value that is not above 0.
    """
    n, y = np.asarray(devices, float), np.asarray(values, float)
    if len(set(devices)) < 2:
        raise InputError(f"a serial fraction needs runs on two numbers of devices at least, got {len(set(devices))}")
    if not (np.isfinite(y) & (y > 0)).all():
        raise InputError("a serial fraction needs times or rates above 0")

    def residuals(unknown: Array) -> Array:
        return unknown[0] + np.log(law(n, unknown[1])) - np.log(y)

    # Where one start is far off, the slope of the logarithm is flat.
    starts = ((float(np.mean(np.log(y) - np.log(law(n, s)))), s) for s in (1e-4, 1e-2, 0.1, 0.5, 0.9))
    # At s = 0 exactly the logarithm stays finite, so the bounds may be reached.
    bounds = ([-np.inf, 0.0], [np.inf, 1.0])
    best = min(
        (least_squares(residuals, start, bounds=bounds, xtol=1e-15, ftol=1e-15, gtol=1e-15) for start in starts),
        key=lambda solution: solution.cost,
    )
    freedom = len(y) - 2
    error = None
    if freedom > 0 and len(set(devices)) > 2:
        covariance = np.linalg.pinv(best.jac.T @ best.jac) * 2 * best.cost / freedom
        error = float(math.sqrt(covariance[1, 1]))
    worst = float(np.expm1(np.abs(residuals(best.x)).max()))
    return Fit(float(best.x[1]), float(np.exp(best.x[0])), error, worst)
