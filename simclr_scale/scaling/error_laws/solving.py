"""The unknowns of a form that are nearest to points, for the points themselves and for their resamples.

N points, P unknowns, R resamples.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from simclr_scale.scaling.error_laws.batched import minimise
from simclr_scale.scaling.error_laws.forms import Array, Form, Frame

# What the rough search finds best is solved to the end: the fit, and its best rival; resamples start near both. From
# where a bounded parameter has run against its end no slope leads back, so they start within this of the middle.
_SOLUTIONS = 2
_MOST_OFF_MIDDLE = 2.0
_TOLERANCE = 1e-10
_MOST_EVALUATIONS = 300


def solve(law: Form, logs: Array, log_errors: Array, frame: Frame, starts: Sequence[Array]) -> list[Array]:
    """The best few solutions from all starts, the best first."""

    def curve(unknown: Array) -> Array:
        return law.log_error(unknown.T[:, :, None], logs, frame)

    def residuals(unknown: Array) -> Array:
        return law.log_error(unknown, logs, frame) - log_errors

    roughly, costs = minimise(curve, np.tile(log_errors, (len(starts), 1)), np.array(starts))
    settings = {"xtol": _TOLERANCE, "ftol": _TOLERANCE, "gtol": _TOLERANCE, "max_nfev": _MOST_EVALUATIONS}
    best = np.argsort(costs, kind="stable")[:_SOLUTIONS]
    solutions = [least_squares(residuals, roughly[row], method="lm", **settings) for row in best]
    return [solution.x for solution in sorted(solutions, key=lambda solution: solution.cost)]


def solve_each(law: Form, logs: Array, log_errors: Array, frame: Frame, solutions: Sequence[Array]) -> Array:
    """(R, P): the best fit to each row of (R, N) from where the points' own solutions lie."""

    def curve(unknown: Array) -> Array:
        return law.log_error(unknown.T[:, :, None], logs, frame)

    tried = []
    for solution in solutions:
        start = solution.copy()
        ends = [place for place in law.bounded if place < len(start)]
        start[ends] = np.clip(start[ends], -_MOST_OFF_MIDDLE, _MOST_OFF_MIDDLE)
        tried.append(minimise(curve, log_errors, np.tile(start, (len(log_errors), 1))))
    best = np.argmin([costs for _, costs in tried], axis=0)
    return np.array([unknown for unknown, _ in tried])[best, np.arange(len(log_errors))]


def noise_like(residuals: Array, unknowns: int, resamples: int, generator: np.random.Generator) -> Array:
    """(R, N) errors of log y."""
    freedom = len(residuals) - unknowns
    spread = np.sqrt(residuals @ residuals / generator.chisquare(freedom, size=(resamples, 1)))
    return spread * generator.standard_normal((resamples, len(residuals)))
