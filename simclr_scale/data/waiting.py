"""How long training stands still for want of a batch."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class WaitClock:
    """Adds up the seconds in which a batch was asked for and there was none, nor any other work to do.

    On the CPU that is the time from asking to getting. A GPU works on while the next batch is asked for; there it is
    the time by which the device's work was done before the batch came, from events in its stream. They are read once
    the device has passed them, so that nothing waits for the measurement.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_cuda = device is not None and device.type == "cuda"
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """Up to the last batch that the device has begun."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.pop(0)
            self._seconds += start.elapsed_time(end) / 1e3
        return self._seconds

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch, timed."""
        if not self._on_cuda:
            start = time.perf_counter()
            try:
                return next(batches)
            finally:
                self._seconds += time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        batch = next(batches)
        after.record()
        self._pending.append((before, after))
        return batch


class TimedLoader(DataLoader[Any]):
    """A DataLoader with a clock on how long its batches are waited for."""

    clock: WaitClock

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _Timed(super().__iter__(), self.clock)


class _Timed:
    def __init__(self, batches: Iterator[Any], clock: WaitClock) -> None:
        self._batches, self._clock = batches, clock

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._clock.next(self._batches)
