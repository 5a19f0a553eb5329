"""The tiled engine: similarities one tile at a time, so that memory is linear in the batch.

Rows and arguments are those of :mod:`simclr_scale.losses.engines`. With n images on each of W ranks, N = 2nW:

- Nothing of size (rows, N) is ever held: one tile of similarities and one of weights are, beside vectors of N numbers
  and matrices of (N, d).
- Similarities are symmetric. Of a rank's own rows against each other only the tiles on and above the diagonal are
  computed, and each serves both its rows and its columns: on one rank that is 4 N^2 d operations where a forward and a
  backward pass with the whole matrix take 6 N^2 d, and half the exponentials.
- A unit row is nowhere more similar than 1 / temperature. While exp(1 / temperature) fits the number format, no maximum
  has to be found and one exponential an entry serves both of its weights:
  exp(S_ij - log_sum_i) + exp(S_ij - log_sum_j) = exp(S_ij) (exp(-log_sum_i) + exp(-log_sum_j)).
  Below that temperature the same tiles run with a maximum for each row and two exponentials.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# A tile of the CPU's and the operands of its products stay in the caches of one core; an accelerator is kept busy by
# far larger ones.
_TILE = {"cpu": 512}
_TILE_OF_ACCELERATORS = 2048

# exp(S) and sums of up to 2^40 of them are then in range, and so are exp(-log_sum) and products of the two.
_LARGEST_PLAIN_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}


class _Tile(NamedTuple):
    """Rows `rows` of this rank against columns `columns` of all ranks."""

    rows: slice
    columns: slice
    # The columns as rows of this rank, where the transposed tile stands for them as well; None elsewhere.
    mirror: slice | None
    # Offsets of the tile's diagonals on which a row meets itself or its other view.
    masked: list[int]


def log_negatives(z: Tensor, z_all: Tensor, first: int, temperature: float) -> Tensor:
    """See :func:`simclr_scale.losses.engines.log_negatives`."""
    if 1 / temperature > _LARGEST_PLAIN_EXPONENT[z.dtype]:
        return _log_negatives_by_maximum(z, z_all, first, temperature)
    scaled_all = z_all * _root_of_exponent(temperature)
    scaled = scaled_all[first : first + len(z)]
    size = _tile_size(z)
    negatives = z.new_zeros(len(z))
    exponential = z.new_empty(size * size)
    for tile in _tiles(len(z), len(z_all), first, size):
        e = _exponentials(scaled[tile.rows], scaled_all[tile.columns], exponential, tile)
        negatives[tile.rows] += e.sum(1)
        if tile.mirror is not None:
            negatives[tile.mirror] += e.sum(0)
    return negatives.log_()


def repulsion(z: Tensor, z_all: Tensor, first: int, temperature: float, log_sum: Tensor, log_sum_all: Tensor) -> Tensor:
    """See :func:`simclr_scale.losses.engines.repulsion`."""
    if 1 / temperature > _LARGEST_PLAIN_EXPONENT[z.dtype]:
        return _repulsion_by_maximum(z, z_all, first, temperature, log_sum, log_sum_all)
    root = _root_of_exponent(temperature)
    scaled_all = z_all * root
    scaled = scaled_all[first : first + len(z)]
    inverse, inverse_all = (-log_sum).exp(), (-log_sum_all).exp()
    size = _tile_size(z)
    result = torch.zeros_like(z)
    exponential, weight = z.new_empty(size * size), z.new_empty(size * size)
    for tile in _tiles(len(z), len(z_all), first, size):
        e = _exponentials(scaled[tile.rows], scaled_all[tile.columns], exponential, tile)
        w = weight[: e.numel()].view_as(e)
        torch.add(inverse[tile.rows, None], inverse_all[tile.columns], out=w)
        _accumulate(result, e.mul_(w), scaled, scaled_all, tile)
    return result.div_(root)


def _log_negatives_by_maximum(z: Tensor, z_all: Tensor, first: int, temperature: float) -> Tensor:
    result = z.new_full((len(z),), -torch.inf)
    for tile in _tiles(len(z), len(z_all), first, _tile_size(z)):
        s = _similarities(z, z_all, temperature, tile)
        result[tile.rows] = torch.logaddexp(result[tile.rows], s.logsumexp(1))
        if tile.mirror is not None:
            result[tile.mirror] = torch.logaddexp(result[tile.mirror], s.logsumexp(0))
    return result


def _repulsion_by_maximum(
    z: Tensor, z_all: Tensor, first: int, temperature: float, log_sum: Tensor, log_sum_all: Tensor
) -> Tensor:
    result = torch.zeros_like(z)
    for tile in _tiles(len(z), len(z_all), first, _tile_size(z)):
        s = _similarities(z, z_all, temperature, tile)
        w = (s - log_sum[tile.rows, None]).exp_() + (s - log_sum_all[tile.columns]).exp_()
        _accumulate(result, w, z, z_all, tile)
    return result


def _root_of_exponent(temperature: float) -> float:
    """Rows times this have products whose power of 2 is exp(similarity). On the CPU exp2 is twice as fast as exp."""
    return math.sqrt(math.log2(math.e) / temperature)


def _exponentials(rows: Tensor, columns: Tensor, memory: Tensor, tile: _Tile) -> Tensor:
    e = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
    torch.mm(rows, columns.T, out=e)
    torch.exp2(e, out=e)
    for offset in tile.masked:
        # Left out of the sum, not subtracted from it: near convergence the positive is nearly all there is.
        e.diagonal(offset).zero_()
    return e


def _similarities(z: Tensor, z_all: Tensor, temperature: float, tile: _Tile) -> Tensor:
    s = z[tile.rows] @ z_all[tile.columns].T / temperature
    for offset in tile.masked:
        s.diagonal(offset).fill_(-torch.inf)
    return s


def _accumulate(result: Tensor, weights: Tensor, z: Tensor, z_all: Tensor, tile: _Tile) -> None:
    result[tile.rows].addmm_(weights, z_all[tile.columns])
    if tile.mirror is not None:
        result[tile.mirror].addmm_(weights.T, z[tile.rows])


def _tile_size(z: Tensor) -> int:
    return _TILE.get(z.device.type, _TILE_OF_ACCELERATORS)


def _tiles(rows: int, total: int, first: int, size: int) -> Iterator[_Tile]:
    """All pairs of this rank's rows with all columns, each once, itself or mirrored."""
    own = list(_blocks(0, rows, size))
    others = [*_blocks(0, first, size), *_blocks(first + rows, total, size)]
    for index, block in enumerate(own):
        for column in own[index:]:
            height, width = block.stop - block.start, column.stop - column.start
            diagonals = (block.start + shift - column.start for shift in (0, rows // 2, -(rows // 2)))
            masked = [offset for offset in diagonals if -height < offset < width]
            columns = slice(first + column.start, first + column.stop)
            yield _Tile(block, columns, column if column != block else None, masked)
        for column in others:
            yield _Tile(block, column, None, [])


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cuts into blocks of nearly equal length, none above `size`."""
    length = stop - start
    count = -(-length // size)
    for k in range(count):
        yield slice(start + length * k // count, start + length * (k + 1) // count)
