"""Euclidean norms of many tensors, sharded ones among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from simclr_scale.optim.lars_sharded import Shards, is_sharded


def local_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) float32, float64 where any is of that: the norm of each, of a sharded one that of this rank's part."""
    parts = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.stack(torch._foreach_norm(parts, 2, wide))


def whole_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(P,), the norm of each. Every rank must call it with the same tensors, where any of them is sharded."""
    squares = local_norms(tensors).square_()
    rows: dict[Shards, list[int]] = {}
    for row, tensor in enumerate(tensors):
        if is_sharded(tensor):
            rows.setdefault(Shards(tensor), []).append(row)
    for shards, of_those in rows.items():
        sums = squares[of_those]
        shards.sum_over(sums)
        squares[of_those] = sums
    return squares.sqrt_()
