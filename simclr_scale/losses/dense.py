"""The dense engine: the whole (rows, N) matrix of similarities at once. Short, and the one to read first.

Rows and arguments are those of :mod:`simclr_scale.losses.engines`.
"""

import torch
from torch import Tensor


def log_negatives(z: Tensor, z_all: Tensor, first: int, temperature: float) -> Tensor:
    """See :func:`simclr_scale.losses.engines.log_negatives`."""
    return _negatives(z, z_all, first, temperature).logsumexp(1)


def repulsion(z: Tensor, z_all: Tensor, first: int, temperature: float, log_sum: Tensor, log_sum_all: Tensor) -> Tensor:
    """See :func:`simclr_scale.losses.engines.repulsion`."""
    similarity = _negatives(z, z_all, first, temperature)
    return ((similarity - log_sum[:, None]).exp_() + (similarity - log_sum_all).exp_()) @ z_all


def _negatives(z: Tensor, z_all: Tensor, first: int, temperature: float) -> Tensor:
    """Similarities (rows, N), minus infinity where a row meets itself or its other view."""
    similarity = z @ z_all.T / temperature
    row = torch.arange(len(z), device=z.device)
    similarity.scatter_(1, torch.stack([row, row.roll(len(z) // 2)], 1) + first, -torch.inf)
    return similarity
