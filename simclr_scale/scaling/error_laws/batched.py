"""Many small least-squares problems at once, by Levenberg and Marquardt's method.

SciPy's solver takes one problem at a time, and its own overhead is most of what a fit of ten points costs: a bootstrap
of hundreds takes minutes by it and seconds so. R problems of N residuals and P unknowns.
"""

from collections.abc import Callable

import numpy as np

from simclr_scale.scaling.error_laws.forms import Array

_STEPS = 60
_DIFFERENCE = 1e-6
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-2, 1e-9, 1e9
_TIGHTER, _LOOSER = 0.2, 4.0
_CONVERGED = 1e-5


def minimise(curve: Callable[[Array], Array], targets: Array, start: Array) -> tuple[Array, Array]:
    """Unknowns (R, P) that bring `curve` near to `targets`, and half the sums of squares (R,) that are left.

    Args:
        curve: (M, P) -> (M, N), row by row, for any M.
        targets: (R, N).
        start: (R, P).
    """
    found = start.astype(float)
    rest = curve(found) - targets
    costs = 0.5 * (rest**2).sum(1)
    damping = np.full(len(found), _FIRST_DAMPING)
    active = np.arange(len(found))
    for _ in range(_STEPS):
        here = found[active]
        slopes = _slopes(curve, here, rest[active] + targets[active])
        gradient = np.einsum("rnp,rn->rp", slopes, rest[active])
        bend = np.einsum("rnp,rnq->rpq", slopes, slopes)
        # A parameter at the end of its range has no slope at all: the bit of 1 keeps the matrix regular.
        stiffness = damping[active, None] * (np.einsum("rpp->rp", bend) + 1e-8)
        bend[:, range(bend.shape[1]), range(bend.shape[1])] += stiffness
        there = here - np.linalg.solve(bend, gradient[..., None])[..., 0]
        rest_there = curve(there) - targets[active]
        cost_there = 0.5 * (rest_there**2).sum(1)
        better = cost_there < costs[active]
        gain = 1 - cost_there / np.maximum(costs[active], 1e-300)
        taken = active[better]
        found[taken], rest[taken], costs[taken] = there[better], rest_there[better], cost_there[better]
        damping[active] = np.clip(damping[active] * np.where(better, _TIGHTER, _LOOSER), _LEAST_DAMPING, np.inf)
        # A small gain of a damped step is no sign of the end.
        free = damping[active] <= _FIRST_DAMPING
        ended = (better & free & (gain < _CONVERGED)) | (damping[active] > _MOST_DAMPING)
        active = active[~ended]
        if not len(active):
            break
    return found, costs


def _slopes(curve: Callable[[Array], Array], here: Array, values: Array) -> Array:
    """(M, N, P) by differences."""
    columns = []
    for place in range(here.shape[1]):
        moved = here.copy()
        moved[:, place] += _DIFFERENCE
        columns.append((curve(moved) - values) / _DIFFERENCE)
    return np.stack(columns, axis=-1)
