"""What an encoder answered for every test image: what intervals, and tests between encoders, are computed from."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """The answers behind the values of a manifest, for M test images; `metrics.METRICS` makes the values of them."""

    indices: np.ndarray
    """(M,) int64, ascending: the images, by their index in the test source."""
    targets: np.ndarray
    """(M,) classes; or (M, C) of several labels an image: 1 where it has the class, 0 where not, -1 where unsaid."""
    answers: tuple[np.ndarray, ...]
    """Once for each value of the manifest: the classes predicted, (M,), or scores, (M, C)."""
