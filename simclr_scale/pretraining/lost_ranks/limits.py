"""How long a rank may be silent or stand still, and a clock for it that a suspended job does not run down."""

import math
import time
from typing import NamedTuple

from simclr_scale.errors import InputError

# That of torch for collectives on gloo: what is stopped by this limit was stopped before, by an error of many lines.
DEFAULT_TIMEOUT = 1800.0
_SHORTEST = 10.0
_LONGEST = 1e7


class Limits(NamedTuple):
    """Seconds, all derived from the one number that a user gives.

    ``silence`` is shorter than ``standstill``: a thread of its own beats whatever the training does, so a rank that
    says nothing at all is stopped, dead or cut off, while one that stands still may be writing a checkpoint.
    """

    timeout: float
    interval: float  # between two beats
    silence: float  # without a beat
    standstill: float  # without progress on any rank
    grace: float  # for an error of one rank to appear on the others by itself

    @classmethod
    def of(cls, timeout: float) -> "Limits":
        """From ``--timeout``.

        Raises:
            InputError: it is below 10 seconds, which healthy processes can differ by, or no finite number.
        """
        if not (math.isfinite(timeout) and _SHORTEST <= timeout <= _LONGEST):
            raise InputError(f"--timeout must be from {_SHORTEST:g} to {_LONGEST:g} seconds, got {timeout:g}")
        silence = max(timeout / 10, min(timeout / 2, 10.0))
        interval = min(5.0, silence / 5)
        # What it takes at most from a standstill to the end of the last process: beats and verdict have to travel.
        standstill = max(timeout / 2, timeout - 6 * interval)
        return cls(timeout, interval, silence, standstill, min(10.0, timeout / 4))


class AwakeClock:
    """Seconds in which this process ran.

    Whoever suspends a whole job (``scontrol suspend``, Ctrl-Z) stops its ranks; afterwards none has been silent.

    Args:
        longest: that can lie between two calls of :meth:`tick`; of a longer gap no more is counted.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._last = time.monotonic()
        self.now = 0.0

    def tick(self) -> float:
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self._longest)
        return self.now
