"""The processes of torchrun or SLURM, for commands that run without a trainer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from simclr_scale.distributed import World, world
from simclr_scale.errors import InputError


@contextmanager
def launched_ranks() -> Iterator[World]:
    """Joins the processes that torchrun has started, for as long as the context lasts; of one process, does nothing.

    Each takes the GPU of its local rank, where there are GPUs.

    Raises:
        InputError: there are more processes on this machine than GPUs.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield world()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        backend = "nccl"
    dist.init_process_group(backend)
    try:
        yield world()
    finally:
        dist.destroy_process_group()
