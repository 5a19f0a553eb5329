"""Curves of known parameters, by the definitions written out anew."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq


class Curve(NamedTuple):
    """y of x, with the parameters by the names of the form."""

    truth: dict[str, float]
    sizes: np.ndarray
    y: Callable[[np.ndarray], np.ndarray]


def _power(x: np.ndarray) -> np.ndarray:
    return np.array([0.12 + 3.0 / value**0.35 for value in x])


def _saturating(x: np.ndarray) -> np.ndarray:
    def miss(y: float, size: float) -> float:
        return (y - 0.1) / (0.9 - y) ** 1.6 - 200.0 * size**-0.5

    return np.array([brentq(miss, 0.1, 0.9 - 1e-12, args=(size,), xtol=1e-15) for size in x])


def _broken(x: np.ndarray) -> np.ndarray:
    return np.array([0.05 + 2.0 * size**-0.1 * (1 + (size / 1e5) ** (1 / 0.4)) ** (-0.3 * 0.4) for size in x])


CURVES = {
    "power": Curve({"E": 0.12, "A": 3.0, "alpha": 0.35}, np.geomspace(1e3, 1e6, 8), _power),
    "m4": Curve({"E": 0.1, "y0": 0.9, "a": 1.6, "b": 200.0, "c": 0.5}, np.geomspace(1e2, 1e6, 12), _saturating),
    "bnsl": Curve({"E": 0.05, "b": 2.0, "c0": 0.1, "c1": 0.3, "d": 1e5, "f": 0.4}, np.geomspace(1e3, 1e7, 12), _broken),
}
