"""How the work of the Triton kernels is cut into programs and steps, on which device, for which width."""

from dataclasses import dataclass
from functools import cache

import torch

# Of a split of the columns: its least steps, so that its start does not count, and the most numbers (64 MiB) that all
# splits together keep before they are added.
LEAST_STEPS = 4
PARTIAL_SUMS = 1 << 24


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: for tuning, and for tests that want many blocks of few rows.

    Attributes:
        rows: rows a program holds (a power of two, at least 16).
        columns: columns of S a step (a power of two, at least 16).
        depth: how much of the width a product of S takes at once; the whole width keeps the program's rows on chip.
        width: columns of the gradient a program accumulates; each further block computes S anew.
        warps: warps of 32 threads a program.
        stages: depth of the software pipeline, in tiles of columns.
        splits: programs that share the columns of one block of rows; None fills the device.
    """

    rows: int
    columns: int
    depth: int
    width: int
    warps: int
    stages: int
    splits: int | None = None


def _blocks(size: int, of: int) -> int:
    return -(-size // of)


def grid(rows: int, columns: int, width: int, chunks: int, tiles: Tiles, device: torch.device) -> tuple[int, int, int]:
    """Blocks of rows, splits of the columns, and steps (tiles of columns) in a split.

    Few blocks of rows would leave most of a device idle; then several programs share the columns of one block, and
    their sums, `width` numbers a row, are added afterwards, in an order that is always the same.
    """
    blocks, steps = _blocks(rows, tiles.rows), _blocks(columns, tiles.columns)
    splits = tiles.splits
    if splits is None:
        programs, places = blocks * chunks, 2 * _multiprocessors(device)
        most = max(1, min(steps // LEAST_STEPS, PARTIAL_SUMS // (rows * width), 4 * places // programs))

        def occupied(splits: int) -> float:
            steps_each = _blocks(steps, splits)
            rounds = _blocks(programs * _blocks(steps, steps_each), places)
            return programs * steps / (rounds * steps_each * places)

        splits = max(range(1, most + 1), key=lambda splits: (min(occupied(splits), 0.9), -splits))
    steps_each = _blocks(steps, min(splits, steps))
    return blocks, _blocks(steps, steps_each), steps_each


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def roomy(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory of an H100 (227 KiB), not of a smaller device (99 to 163)."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 200 << 10


# The tables below are chosen for H100 and H200 by what the compiler reports (tests/losses/test_triton_kernels.py prints
# it), not by a measurement on one: no tile of sums is spilled from the registers, and at width 128 two programs of the
# first kernel fit a multiprocessor, so that one's exponentials can overlap the other's products. Fewer than 128 rows a
# block would read more from the second-level cache, where 128 already read 8.6 GB at N = 65,536, width 128, bfloat16.


def log_negatives_tiles(dtype: torch.dtype, width: int, roomy: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(rows=128, columns=128, depth=16, width=16, warps=8, stages=2)
    if not roomy:
        return Tiles(rows=64, columns=64, depth=128, width=128, warps=4, stages=2)
    if width <= 256:
        return Tiles(rows=128, columns=128, depth=256, width=256, warps=8, stages=2)
    return Tiles(rows=128, columns=128, depth=64, width=64, warps=8, stages=3)


def repulsion_tiles(dtype: torch.dtype, width: int, roomy: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(rows=128, columns=32, depth=16, width=128, warps=8, stages=2)
    if not roomy:
        return Tiles(rows=64, columns=64, depth=128, width=128, warps=4, stages=2)
    if width <= 128:
        return Tiles(rows=128, columns=128, depth=128, width=128, warps=8, stages=3)
    if width <= 256:
        return Tiles(rows=128, columns=64, depth=256, width=256, warps=8, stages=3)
    return Tiles(rows=128, columns=64, depth=64, width=256, warps=8, stages=3)
