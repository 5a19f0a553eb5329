"""The same seed gives the same views for 0, 1 and 4 workers on 1 and 2 ranks, in real processes of both kinds."""

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from simclr_scale.data.augmentation import resolve
from simclr_scale.data.sampler import GlobalBatchSampler, Position
from simclr_scale.data.views import ViewsDataset, keep
from tests.data.generated import GradientSource

WORKERS = (0, 1, 4)
# Image -> digest of its cropped views, its draws and its label.
Epoch = list[dict[int, str]]


def epoch_of_this_rank(workers: int, seed: int = 3) -> Epoch:
    """What this rank reads in an epoch, batch by batch."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sampler = GlobalBatchSampler(
        20, 6, seed=seed, rank=rank, world_size=world_size, position=lambda: Position(epoch=1, batch=0)
    )
    dataset = ViewsDataset(GradientSource(20, (31, 40), (25, 20)), resolve("natural", {"blur_per": "batch"}), 16, seed)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=keep)
    return [
        {
            int(index): hashlib.sha256(
                b"".join(np.ascontiguousarray(batch[part][row]).tobytes() for part in ("views", "draws", "label"))
            ).hexdigest()
            for row, index in enumerate(batch["index"])
        }
        for batch in loader
    ]


def run_rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put((rank, {workers: epoch_of_this_rank(workers) for workers in WORKERS}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_workers_and_ranks_do_not_change_a_view(tmp_path: Path) -> None:
    """Not in the shared pool: its processes may have no children, and here each rank has workers of its own."""
    whole = epoch_of_this_rank(0)
    assert [len(batch) for batch in whole] == [6, 6, 6]
    assert len({digest for batch in whole for digest in batch.values()}) == 18
    assert epoch_of_this_rank(0, seed=4) != whole
    for workers in WORKERS[1:]:
        assert epoch_of_this_rank(workers) == whole

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    try:
        shares = dict(results.get(timeout=300) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=60)
            process.kill()
    for workers in WORKERS:
        first, second = shares[0][workers], shares[1][workers]
        assert all(len(batch) == 3 for batch in first + second)
        assert [one | other for one, other in zip(first, second, strict=True)] == whole
