"""What an engine computes, and which one runs where.

A contrastive loss compares each row with all others. Two functions do all the work that grows with the square of the
batch; engines differ in nothing else:

- ``dense``: the whole matrix of similarities in memory;
- ``tiled``: a tile at a time, memory linear in the batch, on every device;
- ``triton``: the same in two kernels for CUDA devices.

Rows: n images on this rank make ``rows = 2n`` unit rows, [view 1 of all; view 2 of all], and the other view of row i is
p(i) = (i + n) mod 2n. W ranks hold N = 2nW rows, rank after rank, this rank's from row ``first`` on. Similarities are
S_ij = <z_i, z_j> / temperature.

Both functions are operators of torch, so that ``torch.compile`` calls them as they are and does not look inside.
"""

from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from simclr_scale.losses import dense, tiled, triton_kernels

Engine = Literal["auto", "dense", "tiled", "triton"]

_ENGINES: dict[str, ModuleType] = {"dense": dense, "tiled": tiled, "triton": triton_kernels}


def choose(engine: Engine, device: torch.device) -> str:
    """The engine that runs: "auto" is "triton" on CUDA devices where Triton is installed, and "tiled" elsewhere.

    Raises:
        InputError: "triton" was asked for where it cannot run.
        ValueError: there is no engine of that name.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"there is no engine {engine!r}; it is one of {', '.join(map(repr, get_args(Engine)))}")
    if engine == "auto":
        return "triton" if device.type == "cuda" and triton_kernels.triton is not None else "tiled"
    if engine == "triton":
        triton_kernels.require_triton(device)
    return engine


@torch.library.custom_op("simclr_scale::log_negatives", mutates_args=())
def log_negatives(z: Tensor, z_all: Tensor, first: int, temperature: float, engine: str) -> Tensor:
    """Logarithm of the sum over the negatives of each row: log of sum over j not in {i, p(i)} of exp(S_ij).

    Args:
        z: (rows, d) unit rows of this rank.
        z_all: (N, d) unit rows of all ranks.
        first: index of this rank's first row in z_all.
        temperature: above 0.
        engine: as `choose` gives it.

    Returns:
        (rows,), in float32 at least; minus infinity where there is no negative.
    """
    return _ENGINES[engine].log_negatives(z, z_all, first, temperature)


@torch.library.custom_op("simclr_scale::repulsion", mutates_args=())
def repulsion(
    z: Tensor, z_all: Tensor, first: int, temperature: float, log_sum: Tensor, log_sum_all: Tensor, engine: str
) -> Tensor:
    """What pushes each row away from its negatives, both as a row and as a negative of the others.

    The sum over j not in {i, p(i)} of (exp(S_ij - log_sum_i) + exp(S_ij - log_sum_j)) z_j.

    Args:
        log_sum: (rows,) logarithms of the denominators of this rank's rows.
        log_sum_all: (N,) those of all ranks.

    Returns:
        (rows, d), in float32 at least.
    """
    return _ENGINES[engine].repulsion(z, z_all, first, temperature, log_sum, log_sum_all)


@log_negatives.register_fake
def _(z: Tensor, *_: object) -> Tensor:
    return z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32))


@repulsion.register_fake
def _(z: Tensor, *_: object) -> Tensor:
    return z.new_empty(z.shape, dtype=torch.promote_types(z.dtype, torch.float32))
