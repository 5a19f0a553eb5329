"""The clock on the time that batches are waited for."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from simclr_scale.data.waiting import TimedLoader, WaitClock

SLEEP = 0.05


class Slow(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(SLEEP)
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_are_timed(workers: int) -> None:
    loader = TimedLoader(Slow(), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    loader.clock = WaitClock()
    for epoch in (1, 2):
        assert torch.cat(list(loader)).tolist() == list(range(6))
        # Two workers sleep side by side, so that at least half of it is waited for.
        assert loader.clock.seconds >= epoch * 6 * SLEEP / max(1, workers)


def test_time_between_batches_is_not_waiting() -> None:
    def batches() -> Iterator[int]:
        yield from range(3)

    clock, iterator = WaitClock(), batches()
    start = time.perf_counter()
    for _ in range(3):
        clock.next(iterator)
        time.sleep(SLEEP)
    elapsed = time.perf_counter() - start
    assert 0 < clock.seconds < elapsed - 3 * SLEEP + 1e-3
    with pytest.raises(StopIteration):
        clock.next(iterator)
