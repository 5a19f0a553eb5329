"""Fitting a law: least squares of logarithms from several starts, intervals by the bootstrap, points held out.

N points, P unknowns, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simclr_scale.errors import InputError
from simclr_scale.scaling.error_laws.forms import FORMS, Array, Form, Frame
from simclr_scale.scaling.error_laws.solving import noise_like, solve, solve_each

FEWEST_POINTS = 5
RESAMPLES = 500
_SHARE_HELD_OUT = 0.2


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Extrapolation:
    """How well the law of the smaller points foresaw the largest ones.

    Attributes:
        held_out: x of those left out of that fit.
        measured, predicted: their y.
        error: mean of |predicted / measured - 1|.
        line_error: the same of a straight line of logarithms, which is what a law has to beat.
    """

    held_out: tuple[float, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    error: float
    line_error: float


@dataclass(frozen=True)
class LawFit:
    """A law fitted to points.

    Attributes:
        form: of the law.
        x, y: the points, in the order of x.
        parameters: of the form's formula, each with its interval.
        rms: root mean square of log(y / law), near the relative distance of a point.
        level: of the intervals.
        extrapolation: None where too few points are left for it.
        notes: what a reader of the numbers must know.
    """

    form: Form
    x: tuple[float, ...]
    y: tuple[float, ...]
    parameters: dict[str, Estimate]
    rms: float
    level: float
    extrapolation: Extrapolation | None
    notes: tuple[str, ...]
    frame: Frame
    unknown: Array
    resamples: Array
    """(R, P): the unknowns of each resample."""

    def predict(self, x: Sequence[float] | Array) -> list[Estimate]:
        """y at each x by the law, with the interval of the law (that of a further measurement is wider)."""
        logs = np.log(np.asarray(x, float)) - np.log(self.frame.scale)
        values = np.exp(self.form.log_error(self.unknown, logs, self.frame))
        drawn = np.array([np.exp(self.form.log_error(row, logs, self.frame)) for row in self.resamples])
        low, high = _interval(drawn, self.level)
        return [Estimate(*map(float, each)) for each in zip(values, low, high, strict=True)]


def fit_law(
    x: Sequence[float],
    y: Sequence[float],
    form: str = "power",
    *,
    ceiling: float | None = None,
    hold_out: int | None = None,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> LawFit:
    """The law of a form that is nearest to points, by least squares of log y.

    The bootstrap is a parametric one: y anew around the law, with normal errors of log y. Their standard deviation is
    itself uncertain with few points, so each resample draws it too: that of the residuals, times sqrt(F / chi^2_F) with
    F = N - P. Intervals are percentiles of the resamples' fits.

    Args:
        x: (N,) sizes above 0.
        y: (N,) errors or losses above 0.
        form: a name in `FORMS`.
        ceiling: y of an encoder of no size, as the error of guessing; for ``m4``. Else it is fitted.
        hold_out: how many of the largest x are left out for the extrapolation; a fifth of the different x, at least
            one, where None.
        resamples: R.
        level: of confidence.
        seed: of the resamples.

    Raises:
        InputError: fewer than 5 different x, or fewer than the unknowns and one more; a value that is not above 0; a
            setting out of range.
    """
    law = _form(form)
    _check_settings(ceiling, hold_out, resamples, level)
    sizes, errors = _checked(law, x, y, ceiling)
    frame = Frame.of(sizes, errors, ceiling)
    logs = np.log(sizes) - np.log(frame.scale)
    found = solve(law, logs, np.log(errors), frame, law.starts(logs, errors, frame))
    unknown = found[0]
    curve = law.log_error(unknown, logs, frame)
    residuals = np.log(errors) - curve
    noise = noise_like(residuals, law.unknowns(frame), resamples, np.random.default_rng(seed))
    draws = solve_each(law, logs, curve + noise, frame, found)
    parameters = _estimates(law, unknown, draws, frame, level)
    extrapolation = _extrapolate(law, sizes, errors, ceiling, hold_out)
    return LawFit(
        form=law,
        x=tuple(map(float, sizes)),
        y=tuple(map(float, errors)),
        parameters=parameters,
        rms=float(np.sqrt(np.mean(residuals**2))),
        level=level,
        extrapolation=extrapolation,
        notes=_notes(law, parameters, frame, extrapolation),
        frame=frame,
        unknown=unknown,
        resamples=draws,
    )


def _form(name: str) -> Form:
    if name not in FORMS:
        raise InputError(f"form: {name!r}, wanted one of {', '.join(FORMS)}")
    return FORMS[name]


def _check_settings(ceiling: float | None, hold_out: int | None, resamples: int, level: float) -> None:
    if ceiling is not None and not 0 < ceiling < np.inf:
        raise InputError(f"ceiling: {ceiling}, wanted above 0, such as 0.9 for ten classes")
    if hold_out is not None and hold_out < 1:
        raise InputError(f"hold_out: {hold_out}, wanted at least 1")
    if resamples < 20:
        raise InputError(f"resamples: {resamples}, wanted at least 20; an interval has few on either side of it")
    if not 0 < level < 1:
        raise InputError(f"level: {level}, wanted between 0 and 1, such as 0.95")


def _checked(law: Form, x: Sequence[float], y: Sequence[float], ceiling: float | None) -> tuple[Array, Array]:
    sizes, errors = np.asarray(x, float), np.asarray(y, float)
    if sizes.ndim != 1 or sizes.shape != errors.shape:
        raise InputError(f"x and y: shapes {sizes.shape} and {errors.shape}, wanted (N,) twice")
    for name, values in (("x", sizes), ("y", errors)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise InputError(f"{name}: a law of powers needs finite values above 0")
    different = len(np.unique(sizes))
    if different < FEWEST_POINTS:
        raise InputError(f"a scaling law needs points of at least {FEWEST_POINTS} sizes, got {different}")
    if ceiling is not None and not errors.max() < ceiling:
        raise InputError(f"ceiling: {ceiling}, but an error of {errors.max():.4g} was measured: wanted one above it")
    wanted = law.unknowns(Frame.of(sizes, errors, ceiling)) + 1
    if different < wanted:
        hint = "; --ceiling takes one away" if law.name == "m4" and ceiling is None else "; form power has 3"
        raise InputError(
            f"form {law.name} has {wanted - 1} unknowns, so it needs points of {wanted} sizes, got {different}{hint}"
        )
    order = np.argsort(sizes, kind="stable")
    return sizes[order], errors[order]


def _interval(drawn: Array, level: float) -> Array:
    """(2, ...): low and high ends over the resamples (R, ...)."""
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _estimates(law: Form, unknown: Array, draws: Array, frame: Frame, level: float) -> dict[str, Estimate]:
    value = law.natural(unknown, frame)
    drawn = [law.natural(draw, frame) for draw in draws]
    return {
        name: Estimate(value[name], *map(float, _interval(np.array([each[name] for each in drawn]), level)))
        for name in law.parameters
    }


def _extrapolate(
    law: Form, sizes: Array, errors: Array, ceiling: float | None, hold_out: int | None
) -> Extrapolation | None:
    different = np.unique(sizes)
    count = hold_out or max(1, int(_SHARE_HELD_OUT * len(different)))
    if count >= len(different):
        raise InputError(f"hold_out: {count}, but there are {len(different)} sizes")
    near = sizes < different[-count]
    frame = Frame.of(sizes[near], errors[near], ceiling)
    if len(different) - count < law.unknowns(frame):
        return None
    logs = np.log(sizes) - np.log(frame.scale)
    fitted = solve(law, logs[near], np.log(errors[near]), frame, law.starts(logs[near], errors[near], frame))[0]
    predicted = np.exp(law.log_error(fitted, logs[~near], frame))
    slope, level = np.polyfit(logs[near], np.log(errors[near]), 1)
    line = np.exp(level + slope * logs[~near])
    measured = errors[~near]
    return Extrapolation(
        held_out=tuple(map(float, sizes[~near])),
        measured=tuple(map(float, measured)),
        predicted=tuple(map(float, predicted)),
        error=float(np.mean(np.abs(predicted / measured - 1))),
        line_error=float(np.mean(np.abs(line / measured - 1))),
    )


def _notes(
    law: Form, parameters: dict[str, Estimate], frame: Frame, extrapolation: Extrapolation | None
) -> tuple[str, ...]:
    notes = []
    floor = parameters["E"]
    if floor.high - floor.low > 0.5 * frame.lowest:
        notes.append(
            "the floor E is not determined: its interval is most of what lies between 0 and the smallest error, and "
            "the exponent moves with it"
        )
    if frame.lowest > 0.9 * frame.highest:
        notes.append("the errors differ by less than a tenth: hardly any law is told from another by them")
    if extrapolation is None:
        notes.append(
            f"no extrapolation was tried: without the largest sizes fewer are left than form {law.name} has unknowns"
        )
    return tuple(notes)
