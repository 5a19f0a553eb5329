import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.gloo_pool import GlooPool

REAL_DATA = "SIMCLR_SCALE_TEST_DATA"


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Lightning keeps its process group until the process ends, and a later test would take itself for a rank."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """``gloo(world_size, function, *args)``: results of real gloo processes, by rank."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images. Without it the tests that need them skip and say so; CI sets it and so runs them all."""
    folder = os.environ.get(REAL_DATA)
    if folder is None:
        pytest.skip(f"set {REAL_DATA} to the folder of real images (cifar10/, clothing/, chest_xray/) to run this")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{REAL_DATA} names {folder}, which is not a folder")
    return Path(folder)
