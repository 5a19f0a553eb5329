"""The Triton engine of NT-Xent: two kernels, the sum over negatives and the gradient, in memory linear in the batch.

Shapes: rows = 2n unit rows of this rank, [view 1 of n images; view 2 of the same]; N rows over all ranks, in rank-major
order; d the width of an embedding. S_ij = <z_i, z_j> / temperature, and p(i) is the other view of row i.

Both kernels hold a block of rows, walk over the N columns tile by tile, and keep nothing of S. A row's own index and
that of its other view never enter a sum: what is added in a rounded product and subtracted later does not cancel (at
temperature .05 a gradient that subtracts the positive from a bfloat16 product has cosine .19 to the true one).

Of unit rows S <= c = 1/temperature, so exp(S - c) needs no running maximum, and with w = exp(c - log_sum)

    exp(S_ij - log_sum_i) + exp(S_ij - log_sum_j) = exp(S_ij - c) (w_i + w_j)

takes one exponential an element. That holds while exp(-2c) is a normal float32; at lower temperatures the kernels turn
to a running maximum and to two exponentials.

S is symmetric, and on one rank half of its tiles would do. The kernels do not use this: the tile's share in the other
half's rows would have to be added atomically, in an order that changes from run to run, or be reduced across the
threads of a block, by our count at about the cost of the exponentials it saves. Equal input gives equal bits here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.errors import InputError
from simclr_scale.losses.triton_tiles import Tiles, grid, log_negatives_tiles, repulsion_tiles, roomy

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for the CPU come without it
    triton = None

LOG2E = math.log2(math.e)
# exp(-85) is a normal float32, with room for rows whose rounding to bfloat16 made them longer than 1.
LARGEST_SPREAD = 85.0
# float32 must stay float32. The tensor cores' form in three products ("tf32x3") is faster and nearly as exact, but a
# cosine's error is multiplied by 1/temperature, and the interpreter cannot show how large theirs is.
FLOAT32_PRODUCTS = "ieee"


def require_triton(device: torch.device | str) -> None:
    """Raises InputError unless the kernels can run on `device`: Triton, and CUDA or Triton's interpreter."""
    if triton is None:
        raise InputError(
            "engine 'triton' needs the package triton, which is not installed; "
            "install a CUDA build of torch, or use engine 'tiled'"
        )
    if torch.device(device).type != "cuda" and not _interpreted():
        raise InputError(
            f"engine 'triton' needs tensors on a CUDA device, got {torch.device(device)}; "
            "move them there, or use engine 'tiled'"
        )


def log_negatives(z: Tensor, z_all: Tensor, first: int, temperature: float, *, tiles: Tiles | None = None) -> Tensor:
    """Log of the sum over the negatives: log sum over j not in {i, p(i)} of exp(S_ij).

    Args:
        z: (rows, d) unit rows of this rank, bfloat16 or float32.
        z_all: (N, d) unit rows of all ranks, rank-major, of the same type.
        first: index in z_all of this rank's first row.
        temperature: tau > 0.
        tiles: how to cut the work; None takes the table's.

    Returns:
        (rows,) float32; -inf where there are no negatives (N = 2).

    Raises:
        InputError: without Triton, on a device other than CUDA, or for another type of number.
    """
    rows, columns = z.shape[0], z_all.shape[0]
    tiles = tiles or log_negatives_tiles(z.dtype, z.shape[1], roomy(z.device))
    z, z_all = _prepared(z, z_all, tiles)
    blocks, splits, steps = grid(rows, columns, 1, 1, tiles, z.device)

    online = not _spread_fits(temperature)
    total = torch.empty(splits, rows, device=z.device, dtype=torch.float32)
    peak = torch.empty(splits if online else 0, rows, device=z.device, dtype=torch.float32)
    with torch.cuda.device_of(z):
        _log_negatives_kernel[blocks, splits](
            z,
            z_all,
            total,
            peak,
            rows,
            columns,
            first,
            steps,
            LOG2E / temperature,
            WIDTH=z.shape[1],
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=min(tiles.depth, z.shape[1]),
            ONLINE=online,
            **_compiled_as(tiles),
        )
    if not online:
        return total.sum(0).log_().add_(1 / temperature)
    # The products are at most about 1, so that a peak is exact and the temperature's rounding enters only here.
    logs = total.double().log_().add_(peak.double(), alpha=1 / temperature)
    return logs.logsumexp(0).float()


def repulsion(
    z: Tensor,
    z_all: Tensor,
    first: int,
    temperature: float,
    log_sum: Tensor,
    log_sum_all: Tensor,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """The negatives' share of the gradient: sum over j not in {i, p(i)} of
    (exp(S_ij - log_sum_i) + exp(S_ij - log_sum_j)) z_j.

    Args:
        z, z_all, first, temperature, tiles: as for :func:`log_negatives`.
        log_sum: (rows,) float32, log-sum-exp of each of this rank's rows over all j != i.
        log_sum_all: (N,) the same of all ranks.

    Returns:
        (rows, d) float32.

    Raises:
        InputError: as :func:`log_negatives`.
    """
    rows, width, columns = *z.shape, z_all.shape[0]
    tiles = tiles or repulsion_tiles(z.dtype, width, roomy(z.device))
    z, z_all = _prepared(z, z_all, tiles)
    chunk = min(tiles.width, z.shape[1])
    chunks = triton.cdiv(width, chunk)
    blocks, splits, steps = grid(rows, columns, width, chunks, tiles, z.device)

    scale = 1 / temperature
    one_exponential = _spread_fits(temperature)
    if one_exponential:
        # Once a row here, not once a tile in every program.
        row_terms, column_terms = ((scale - x.double()).exp().float() for x in (log_sum, log_sum_all))
        scale *= LOG2E
    else:
        row_terms, column_terms = log_sum.float().contiguous(), log_sum_all.float()
    column_terms = F.pad(column_terms, (0, -columns % tiles.columns))
    out = torch.empty(splits, rows, width, device=z.device, dtype=torch.float32)
    with torch.cuda.device_of(z):
        _repulsion_kernel[blocks, splits, chunks](
            z,
            z_all,
            row_terms,
            column_terms,
            out,
            rows,
            columns,
            width,
            first,
            steps,
            scale,
            WIDTH=z.shape[1],
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=min(tiles.depth, z.shape[1]),
            CHUNK=chunk,
            ONE_EXPONENTIAL=one_exponential,
            **_compiled_as(tiles),
        )
    return out[0] if splits == 1 else out.sum(0)


def _spread_fits(temperature: float) -> bool:
    """Whether exp(S - 1/temperature) stays a normal float32 over S in [-1/temperature, 1/temperature]."""
    return 2 / temperature < LARGEST_SPREAD


def _interpreted() -> bool:
    """Whether the kernels below run in Triton's interpreter, which is settled when they are defined."""
    return triton is not None and not isinstance(_log_negatives_kernel, triton.JITFunction)


def _compiled_as(tiles: Tiles) -> dict[str, Any]:
    return {
        "PRODUCTS": FLOAT32_PRODUCTS,
        # The interpreter multiplies the bit patterns of bfloat16 as integers. Widened to float32 they give the products
        # that a tensor core gives: those of two bfloat16 are exact.
        "WIDEN": _interpreted(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # Triton's default, which changes in 3.10
    }


def _prepared(z: Tensor, z_all: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Both contiguous and widened by zeros, which change no product, to a width that the tiles divide.

    So the kernels know the width when they are compiled, every row starts on a whole vector, and no load is masked in
    that direction. Where the width is right and the memory contiguous, nothing is copied.
    """
    require_triton(z.device)
    if z.dtype != z_all.dtype or z.dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"engine 'triton' takes bfloat16 or float32 rows, got {z.dtype} and {z_all.dtype}")
    width = z.shape[1]
    step = max(tiles.depth, tiles.width)
    padded = max(16, triton.next_power_of_2(width)) if width <= step else triton.cdiv(width, step) * step
    if padded == width:
        return z.contiguous(), z_all.contiguous()
    same = z.data_ptr() == z_all.data_ptr() and z.shape == z_all.shape and z.stride() == z_all.stride()
    z_all = F.pad(z_all, (0, padded - width))
    return (z_all if same else F.pad(z, (0, padded - width))), z_all


if triton is not None:

    @triton.jit
    def _meets(low, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Whether the columns [tile, tile + COLUMNS) have some of [low, low + ROWS)."""
        return (tile < low + ROWS) & (low < tile + COLUMNS)

    @triton.jit
    def _load_rows(  # type: ignore[no-untyped-def]
        base, start, limit, offset, WIDTH: tl.constexpr, COUNT: tl.constexpr, LENGTH: tl.constexpr
    ):
        """COUNT rows from `start` on, LENGTH elements of each from `offset` on; zeros from the row `limit` on."""
        row = tl.arange(0, COUNT)
        base += start.to(tl.int64) * WIDTH + offset  # the product may pass 2^31; what is inside a tile does not
        places = row[:, None] * WIDTH + tl.arange(0, LENGTH)[None, :]
        return tl.load(base + places, mask=(start + row < limit)[:, None], other=0.0)

    @triton.jit
    def _dot(a, b, accumulator, PRODUCTS: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, accumulator, input_precision=PRODUCTS)

    @triton.jit
    def _cosines(  # type: ignore[no-untyped-def]
        z,
        z_all,
        row,
        rows,
        tile,
        columns,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        PRODUCTS: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        """Products of the rows [row, row + ROWS) with the columns [tile, tile + COLUMNS), over the width in steps."""
        cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
        for offset in range(0, WIDTH, DEPTH):
            a = _load_rows(z, row, rows, offset, WIDTH, ROWS, DEPTH)
            b = _load_rows(z_all, tile, columns, offset, WIDTH, COLUMNS, DEPTH)
            cosine = _dot(a, tl.trans(b), cosine, PRODUCTS, WIDEN)
        return cosine

    @triton.jit(do_not_specialize=["rows", "columns", "first", "steps"])
    def _log_negatives_kernel(  # type: ignore[no-untyped-def]
        z,
        z_all,
        total,
        peak,
        rows,
        columns,
        first,
        steps,
        scale,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        ONLINE: tl.constexpr,
        PRODUCTS: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS
        split = tl.program_id(1)
        i = row + tl.arange(0, ROWS)
        half = rows // 2
        own = first + i
        partner = tl.where(i < half, own + half, own - half)

        if WIDTH == DEPTH:
            held = _load_rows(z, row, rows, 0, WIDTH, ROWS, WIDTH)
        sums = tl.zeros((ROWS,), tl.float32)
        if ONLINE:
            # Below every product of unit rows, and finite: no difference of infinities arises.
            peaks = tl.full((ROWS,), -4.0, tl.float32)
        for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(columns, COLUMNS))):
            tile = step * COLUMNS
            if WIDTH == DEPTH:
                b = _load_rows(z_all, tile, columns, 0, WIDTH, COLUMNS, WIDTH)
                cosine = _dot(held, tl.trans(b), tl.zeros((ROWS, COLUMNS), tl.float32), PRODUCTS, WIDEN)
            else:
                cosine = _cosines(z, z_all, row, rows, tile, columns, WIDTH, ROWS, COLUMNS, DEPTH, PRODUCTS, WIDEN)
            # Few tiles hold a row's own index or its partner's, or reach past the end: the others need no mask.
            low = first + row
            masked = (
                _meets(low, tile, ROWS, COLUMNS)
                | _meets(low + half, tile, ROWS, COLUMNS)
                | _meets(low - half, tile, ROWS, COLUMNS)
                | (tile + COLUMNS > columns)
            )
            if masked:
                j = tile + tl.arange(0, COLUMNS)
                drop = (j[None, :] == own[:, None]) | (j[None, :] == partner[:, None]) | (j >= columns)[None, :]
                cosine = tl.where(drop, float("-inf"), cosine)
            if ONLINE:
                highest = tl.maximum(peaks, tl.max(cosine, 1))
                sums = sums * tl.exp2((peaks - highest) * scale)
                sums += tl.sum(tl.exp2((cosine - highest[:, None]) * scale), 1)
                peaks = highest
            else:
                sums += tl.sum(tl.exp2(tl.fma(cosine, scale, -scale)), 1)
        place = split.to(tl.int64) * rows + i
        tl.store(total + place, sums, mask=i < rows)
        if ONLINE:
            tl.store(peak + place, peaks, mask=i < rows)

    @triton.jit(do_not_specialize=["rows", "columns", "width", "first", "steps"])
    def _repulsion_kernel(  # type: ignore[no-untyped-def]
        z,
        z_all,
        row_terms,
        column_terms,
        out,
        rows,
        columns,
        width,
        first,
        steps,
        scale,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        CHUNK: tl.constexpr,
        ONE_EXPONENTIAL: tl.constexpr,
        PRODUCTS: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS
        split = tl.program_id(1)
        offset = tl.program_id(2) * CHUNK
        i = row + tl.arange(0, ROWS)
        half = rows // 2
        own = first + i
        partner = tl.where(i < half, own + half, own - half)
        row_term = tl.load(row_terms + i, mask=i < rows, other=0.0)

        WHOLE: tl.constexpr = WIDTH == DEPTH
        if WHOLE:
            held = _load_rows(z, row, rows, 0, WIDTH, ROWS, WIDTH)
        gradient = tl.zeros((ROWS, CHUNK), tl.float32)
        for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(columns, COLUMNS))):
            tile = step * COLUMNS
            j = tile + tl.arange(0, COLUMNS)
            if WHOLE:
                b = _load_rows(z_all, tile, columns, 0, WIDTH, COLUMNS, WIDTH)
                cosine = _dot(held, tl.trans(b), tl.zeros((ROWS, COLUMNS), tl.float32), PRODUCTS, WIDEN)
            else:
                cosine = _cosines(z, z_all, row, rows, tile, columns, WIDTH, ROWS, COLUMNS, DEPTH, PRODUCTS, WIDEN)
            column_term = tl.load(column_terms + j)  # as long as the tiles
            if ONE_EXPONENTIAL:
                weight = tl.exp2(tl.fma(cosine, scale, -scale)) * (row_term[:, None] + column_term[None, :])
            else:
                # S - log_sum in one rounding, since S and log_sum are large here and their difference is not; hence in
                # natural units, and only the difference is turned to powers of two.
                by_row = tl.fma(cosine, scale, -row_term[:, None]) * 1.4426950408889634
                by_column = tl.fma(cosine, scale, -column_term[None, :]) * 1.4426950408889634
                weight = tl.exp2(by_row) + tl.exp2(by_column)
            low = first + row
            masked = (
                _meets(low, tile, ROWS, COLUMNS)
                | _meets(low + half, tile, ROWS, COLUMNS)
                | _meets(low - half, tile, ROWS, COLUMNS)
                | (tile + COLUMNS > columns)
            )
            if masked:
                # Past the end stand rows of zeros; but the weight there may be infinite, and 0 times that is no number.
                drop = (j[None, :] == own[:, None]) | (j[None, :] == partner[:, None]) | (j >= columns)[None, :]
                weight = tl.where(drop, 0.0, weight)
            if WHOLE and CHUNK == WIDTH:
                gradient = _dot(weight.to(z.dtype.element_ty), b, gradient, PRODUCTS, WIDEN)
            else:
                b = _load_rows(z_all, tile, columns, offset, WIDTH, COLUMNS, CHUNK)
                gradient = _dot(weight.to(z.dtype.element_ty), b, gradient, PRODUCTS, WIDEN)
        d = offset + tl.arange(0, CHUNK)
        out += split.to(tl.int64) * rows * width
        tl.store(
            out + i.to(tl.int64)[:, None] * width + d[None, :],
            gradient,
            mask=(i < rows)[:, None] & (d < width)[None, :],
        )
