"""The forms of a scaling law: error y > 0 as a function of size x > 0.

- ``power``: y = E + A x^-alpha (Hestness et al. 2017, arXiv:1712.00409; the floor E as in Kaplan et al. 2020).
- ``m4``: (y - E) / (y0 - y)^a = b x^-c (Alabdulmohsin, Neyshabur and Zhai 2022, arXiv:2209.06640, section 3.2, where
  c < 0 has the sign): saturates at y0 for small x and at E for large x.
- ``bnsl``: y = E + b x^-c0 (1 + (x / d)^(1 / f))^(-c1 f) (Caballero et al. 2023, arXiv:2210.14891, equation 1, with one
  break): the slope turns from c0 to c0 + c1 around x = d, the more sharply the smaller f.

A solver works on numbers without bounds. Within a fit x is therefore divided by its geometric mean, and each parameter
is a function of such a number that keeps it within its range: E from 0 to the smallest y, y0 from the largest y to
`ceiling`, d within the points.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

Array = NDArray[np.float64]

# Which no exponent and no amplitude at the middle of the points leaves.
_LOG_RANGE = (np.log(1e-4), np.log(1e3))
_SHARPNESS = (np.log(0.05), np.log(3.0))
_BEND = (np.log(0.05), np.log(20.0))
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Frame:
    """The points that a fit is made in.

    Attributes:
        scale: geometric mean of x.
        span: of log(x / scale), the smallest and the largest.
        lowest, highest: of y.
        ceiling: the largest that y0 of ``m4`` may be; where `fixed`, what it is.
        fixed: whether the error of an encoder of no size is known.
    """

    scale: float
    span: tuple[float, float]
    lowest: float
    highest: float
    ceiling: float
    fixed: bool = False

    @classmethod
    def of(cls, x: Array, y: Array, ceiling: float | None) -> "Frame":
        logs = np.log(x)
        scale = float(np.exp(logs.mean()))
        # Errors end at 1, and losses have no end.
        open_end = 1.0 if y.max() < 1 else 3 * float(y.max())
        span = float(logs.min() - np.log(scale)), float(logs.max() - np.log(scale))
        return cls(scale, span, float(y.min()), float(y.max()), ceiling or open_end, ceiling is not None)


class Form(ABC):
    """One law. Its unknowns are an array (P,) of numbers without bounds."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    bounded: tuple[int, ...]
    """Which unknowns stand for parameters between two ends, the middle at 0."""

    def unknowns(self, frame: Frame) -> int:
        """P, of numbers that are fitted."""
        return len(self.parameters)

    @abstractmethod
    def log_error(self, unknown: Array, logs: Array, frame: Frame) -> Array:
        """log y at log(x / scale)."""

    @abstractmethod
    def natural(self, unknown: Array, frame: Frame) -> dict[str, float]:
        """The parameters of the formula, of x itself."""

    @abstractmethod
    def starts(self, logs: Array, y: Array, frame: Frame) -> list[Array]:
        """Unknowns to start a fit from."""


class PowerLaw(Form):
    name, formula, parameters = "power", "E + A x^-alpha", ("E", "A", "alpha")
    bounded = (0,)

    def log_error(self, unknown: Array, logs: Array, frame: Frame) -> Array:
        floor, amplitude, exponent = unknown
        decay = _bounded(amplitude) - np.exp(_bounded(exponent)) * logs
        return np.logaddexp(np.log(frame.lowest) + log_expit(floor), decay)

    def natural(self, unknown: Array, frame: Frame) -> dict[str, float]:
        floor, amplitude, exponent = unknown
        alpha = np.exp(_bounded(exponent))
        return {
            "E": float(frame.lowest * expit(floor)),
            "A": float(np.exp(_bounded(amplitude) + alpha * np.log(frame.scale))),
            "alpha": float(alpha),
        }

    def starts(self, logs: Array, y: Array, frame: Frame) -> list[Array]:
        return [
            np.array([logit(share), np.log(amplitude), np.log(alpha)])
            for share, alpha, amplitude in _lines(logs, y, frame)
        ]


class SaturatingLaw(Form):
    name, formula = "m4", "(y - E) / (y0 - y)^a = b x^-c"
    parameters = ("E", "y0", "a", "b", "c")
    bounded = (0, 1, 4)

    def unknowns(self, frame: Frame) -> int:
        return 4 if frame.fixed else 5

    def _ends(self, unknown: Array, frame: Frame) -> tuple[Array, Array]:
        floor = frame.lowest * expit(unknown[0])
        if frame.fixed:
            return floor, np.full_like(floor, frame.ceiling)
        return floor, frame.highest + (frame.ceiling - frame.highest) * expit(unknown[4])

    def log_error(self, unknown: Array, logs: Array, frame: Frame) -> Array:
        floor, top = self._ends(unknown, frame)
        a = np.exp(_within(unknown[1], _BEND))
        # With u = (y - E) / (y0 - E) = sigmoid(t), and b taken times (y0 - E) ^ (a - 1): log u - a log(1 - u) = right.
        right = _bounded(unknown[2]) - np.exp(_bounded(unknown[3])) * logs
        return np.log(floor + (top - floor) * expit(_solve(right, a)))

    def natural(self, unknown: Array, frame: Frame) -> dict[str, float]:
        floor, top = self._ends(unknown, frame)
        a, c = np.exp(_within(unknown[1], _BEND)), np.exp(_bounded(unknown[3]))
        log_b = _bounded(unknown[2]) + (1 - a) * np.log(top - floor) + c * np.log(frame.scale)
        return {"E": float(floor), "y0": float(top), "a": float(a), "b": float(np.exp(log_b)), "c": float(c)}

    def starts(self, logs: Array, y: Array, frame: Frame) -> list[Array]:
        starts = []
        for share, _, _ in _lines(logs, y, frame, exponents=1):
            for a in (0.3, 1.0):
                for height in (0.1, 0.7):
                    unknown = np.array([logit(share), _middle(np.log(a), _BEND), 0.0, 0.0, logit(height)])
                    floor, top = self._ends(unknown, frame)
                    u = np.clip((y - floor) / (top - floor), 1e-6, 1 - 1e-6)
                    slope, level = np.polyfit(logs, np.log(u) - a * np.log1p(-u), 1)
                    unknown[2:4] = level, np.log(max(-slope, 0.01))
                    starts.append(unknown[: self.unknowns(frame)])
        return starts


class BrokenLaw(Form):
    name, formula = "bnsl", "E + b x^-c0 (1 + (x / d)^(1/f))^(-c1 f)"
    parameters = ("E", "b", "c0", "c1", "d", "f")
    bounded = (0, 4, 5)

    def _break(self, unknown: Array, frame: Frame) -> tuple[Array, Array]:
        low, high = frame.span
        return low + (high - low) * expit(unknown[4]), np.exp(_within(unknown[5], _SHARPNESS))

    def log_error(self, unknown: Array, logs: Array, frame: Frame) -> Array:
        where, f = self._break(unknown, frame)
        turn = unknown[3] * f * np.logaddexp(0, (logs - where) / f)
        decay = _bounded(unknown[1]) - np.exp(_bounded(unknown[2])) * logs - turn
        return np.logaddexp(np.log(frame.lowest) + log_expit(unknown[0]), decay)

    def natural(self, unknown: Array, frame: Frame) -> dict[str, float]:
        where, f = self._break(unknown, frame)
        c0 = np.exp(_bounded(unknown[2]))
        return {
            "E": float(frame.lowest * expit(unknown[0])),
            "b": float(np.exp(_bounded(unknown[1]) + c0 * np.log(frame.scale))),
            "c0": float(c0),
            "c1": float(unknown[3]),
            "d": float(np.exp(where) * frame.scale),
            "f": float(f),
        }

    def starts(self, logs: Array, y: Array, frame: Frame) -> list[Array]:
        return [
            np.array([logit(share), np.log(amplitude), np.log(alpha), change * alpha, logit(where), 0.0])
            for share, alpha, amplitude in _lines(logs, y, frame, exponents=1)
            for change in (-0.5, 1.0)
            for where in (0.3, 0.7)
        ]


FORMS: dict[str, Form] = {form.name: form for form in (PowerLaw(), SaturatingLaw(), BrokenLaw())}


def _lines(logs: Array, y: Array, frame: Frame, exponents: int = 3) -> list[tuple[float, float, float]]:
    """Share of the smallest y that the floor is, exponent, amplitude: straight lines of log(y - floor).

    Beside the slope itself, by powers of 2, others: where the points bend, the line's is far off.
    """
    found = []
    for share in (0.02, 0.5, 0.9, 0.99):
        rest = np.log(y - share * frame.lowest * (1 - 1e-9))
        slope, level = np.polyfit(logs, rest, 1)
        found += [
            (share, max(-float(slope), 0.01) * 2.0**power, float(np.exp(level))) for power in (0, -1, 1)[:exponents]
        ]
    return found


def _bounded(value: Array) -> Array:
    """Finite, whatever a solver tries."""
    return np.clip(value, *_LOG_RANGE)


def _within(value: Array, ends: Sequence[float]) -> Array:
    return ends[0] + (ends[1] - ends[0]) * expit(value)


def _middle(value: float, ends: Sequence[float]) -> float:
    """The number that `_within` makes `value` of."""
    return float(logit((value - ends[0]) / (ends[1] - ends[0])))


def _solve(right: Array, a: Array) -> Array:
    """t with log sigmoid(t) + a log(1 + e^t) = right.

    The left side rises, with a slope from 1 to a and without a turn in its bend, so that Newton's steps reach t from
    anywhere; from where the two straight ends of the curve lie, a few of them do.
    """
    t = np.where(right < 0, right, right / a)
    for _ in range(_NEWTON_STEPS):
        step = (log_expit(t) - a * log_expit(-t) - right) / (expit(-t) + a * expit(t))
        t = t - step
        # Each step squares the error: after one this small nothing is left of it.
        if np.abs(step).max() < 1e-6 * (1 + np.abs(t).max()):
            break
    return t
