"""Counter-based random numbers: a pure function of what they are for, whoever asks and whenever.

Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a key and a counter into random bits
without any state, so a worker, a rank or a restarted run that asks for image 17 of epoch 3 gets the same numbers.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Keeps streams of different uses apart; the numbers are part of what makes runs reproducible."""

    AUGMENTATION = 0
    ORDER = 1
    TEXTURE = 2
    SUBSET = 3
    BLUR_OF_BATCH = 4
    VALUES = 5
    BLOCKS = 6
    REPLACEMENT = 7


def generator(purpose: Purpose, seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator of its own for ``(purpose, seed, epoch, index)``, each 0 or above.

    Streams do not overlap: a stream counts in the lowest of four 64-bit words, image and purpose sit in the upper ones.
    """
    counter = np.array([0, 0, index, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter))
