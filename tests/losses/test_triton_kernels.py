"""The Triton engine against the formula in float64: compiled where there is a CUDA device, else by the interpreter.

Triton decides as it is imported whether it interprets, so that the interpreter has a process of its own.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.errors import InputError
from simclr_scale.losses import triton_kernels
from simclr_scale.losses.triton_kernels import Tiles, log_negatives, repulsion, require_triton
from tests.gloo_pool import GlooPool

DEVICE = "cuda" if torch.cuda.is_available() else "interpreter"
ON_DEVICE = "cuda" if DEVICE == "cuda" else "cpu"
TYPES = [torch.float32, torch.bfloat16]

# Several blocks of rows, tiles of columns, steps over the width and chunks of the gradient at the sizes below.
SMALL = Tiles(rows=32, columns=16, depth=32, width=32, warps=4, stages=2, splits=2)
# Products over the whole width, as in the table's tiles up to 256.
WHOLE = Tiles(rows=16, columns=32, depth=256, width=256, warps=4, stages=2, splits=3)
# Blocks of rows far taller than a tile is wide: most tiles with a row's own index begin inside the block.
TALL = Tiles(rows=64, columns=32, depth=16, width=16, warps=4, stages=2)
WIDE = Tiles(rows=32, columns=64, depth=128, width=256, warps=4, stages=2, splits=1)

Run = Callable[..., Any]


@pytest.fixture(scope="module", params=[DEVICE])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """``run(function, *args)``: the result of ``function(0, 1, *args)`` where the kernels can run."""
    if request.param == "cuda":
        yield lambda function, *args: function(0, 1, *args)
        return
    pool = GlooPool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool(1, _nothing)  # the process starts here, and keeps this environment
    yield lambda function, *args: pool(1, function, *args)[0]
    pool.close()


def _nothing(rank: int, world_size: int) -> None:
    pass


def _both(
    rank: int,
    world_size: int,
    z_all: np.ndarray,
    log_sum_all: np.ndarray,
    first: int,
    rows: int,
    dtype: torch.dtype,
    temperature: float,
    tiles: Tiles | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Both kernels on rows [first, first + rows) of z_all, as arrays, which any two processes can exchange."""
    z_all = torch.from_numpy(z_all).to(ON_DEVICE, dtype)
    log_sum_all = torch.from_numpy(log_sum_all).to(ON_DEVICE)
    own = slice(first, first + rows)
    z = z_all[own]
    negatives = log_negatives(z, z_all, first, temperature, tiles=tiles)
    pushed = repulsion(z, z_all, first, temperature, log_sum_all[own], log_sum_all, tiles=tiles)
    assert negatives.dtype == pushed.dtype == torch.float32
    assert negatives.shape == (rows,)
    assert pushed.shape == z.shape
    return negatives.cpu().numpy(), pushed.cpu().numpy()


def unit_rows(rows: int, ranks: int, width: int, dtype: torch.dtype, temperature: float = 0.1) -> Tensor:
    """(ranks * rows, width) unit rows in float64, exact in `dtype`; the two views of an image are alike.

    All rows share a direction, the more so the lower the temperature: cosines differ by about twice the temperature,
    so that negatives have weights worth comparing. With independent rows they would vanish at .005.
    """
    generator = torch.Generator().manual_seed(rows + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, width, generator=generator, dtype=torch.float64)

    spread = math.sqrt(2 * temperature)
    image = normal(ranks, 1, rows // 2)
    views = normal(1, 1, 1) + spread * (image + 0.3 * normal(ranks, 2, rows // 2))
    return F.normalize(views.reshape(-1, width), dim=1).to(dtype).double()


def negatives_of(row: int, rows: int, columns: int) -> list[int]:
    """Indices of all rows but `row` and its other view, in batches of `rows` = [view 1; view 2] a rank."""
    rank, place = divmod(row, rows)
    partner = rank * rows + (place + rows // 2) % rows
    return [j for j in range(columns) if j not in (row, partner)]


def log_sums(z_all: Tensor, temperature: float) -> Tensor:
    """Log-sum-exp of every row over all others, as the loss hands it to the second kernel: rounded to float32."""
    similarity = z_all @ z_all.T / temperature
    return similarity.fill_diagonal_(-torch.inf).logsumexp(1).float()


def naive(
    z_all: Tensor, log_sum_all: Tensor, first: int, rows: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels are for, row by row in float64, and the sum of each row's weights, the scale of its errors."""
    similarity = z_all @ z_all.T / temperature
    log_sum = log_sum_all.double()
    negatives, pushed, scale = [], [], []
    for i in range(first, first + rows):
        others = negatives_of(i, rows, len(z_all))
        s = similarity[i, others]
        weights = (s - log_sum[i]).exp() + (s - log_sum[others]).exp()
        negatives.append(s.logsumexp(0))
        pushed.append(weights @ z_all[others])
        scale.append(weights.sum())
    return torch.stack(negatives), torch.stack(pushed), torch.stack(scale)


def check(
    run: Run,
    rows: int,
    ranks: int,
    rank: int,
    width: int,
    dtype: torch.dtype,
    temperature: float,
    tiles: Tiles | None,
) -> None:
    z_all = unit_rows(rows, ranks, width, dtype, temperature)
    log_sum_all = log_sums(z_all, temperature)
    first = rank * rows
    want, pushed, scale = naive(z_all, log_sum_all, first, rows, temperature)
    got = run(_both, z_all.float().numpy(), log_sum_all.numpy(), first, rows, dtype, temperature, tiles)
    got_negatives, got_pushed = (torch.from_numpy(x).double() for x in got)

    # The products of bfloat16 numbers are exact in float32, so that here both types keep float32's precision.
    assert ((got_negatives - want).abs() / want.abs().clamp(min=1)).max() < 3e-6
    # A cosine has the rounding of float32, which 1/temperature multiplies and exp makes relative.
    tolerance = 1e-6 + 3e-7 / temperature
    if dtype == torch.bfloat16:
        # Each weight is rounded for the second product: by 2^-8 at most, or cut off by 2^-7 in the interpreter.
        tolerance += 2**-7
        together = F.cosine_similarity(got_pushed.flatten(), pushed.flatten(), dim=0)
        assert together > 1 - 1e-5
    assert ((got_pushed - pushed).norm(dim=1) / scale).max() < tolerance


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "ranks", "rank", "width", "tiles"),
    [
        (2, 4, 0, 3, SMALL),
        (2, 4, 2, 16, WHOLE),
        (6, 1, 0, 1, SMALL),
        (6, 3, 1, 16, WHOLE),
        (34, 1, 0, 33, SMALL),
        (34, 3, 1, 33, WHOLE),
        (70, 1, 0, 128, WHOLE),
        (70, 2, 1, 16, SMALL),
        (134, 1, 0, 3, TALL),
        (34, 3, 2, 300, WIDE),
        (70, 2, 0, 128, None),
        (34, 3, 1, 33, None),
        (6, 3, 2, 200, None),
        (6, 1, 0, 300, None),
    ],
)
def test_equal_to_the_formula_at_awkward_sizes(
    run: Run, rows: int, ranks: int, rank: int, width: int, tiles: Tiles | None, dtype: torch.dtype
) -> None:
    check(run, rows, ranks, rank, width, dtype, 0.1, tiles)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("temperature", "tiles"),
    [
        (0.005, SMALL),
        (0.005, WHOLE),
        (0.0234, SMALL),
        (0.0234, WHOLE),
        (0.0236, SMALL),
        (0.0236, WHOLE),
        (0.05, WHOLE),
        (0.5, SMALL),
        (1.0, WHOLE),
    ],
)
def test_equal_to_the_formula_at_any_temperature(
    run: Run, temperature: float, tiles: Tiles, dtype: torch.dtype
) -> None:
    check(run, 34, 2, 1, 33, dtype, temperature, tiles)


def test_equal_to_the_formula_at_the_largest_width(run: Run) -> None:
    wide = Tiles(rows=64, columns=64, depth=512, width=1024, warps=8, stages=1)
    check(run, 34, 2, 1, 2048, torch.float32, 0.05, wide if DEVICE == "interpreter" else None)


@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.1])
def test_a_single_image_has_no_negatives(run: Run, temperature: float, dtype: torch.dtype, width: int) -> None:
    z = unit_rows(2, 1, width, dtype)
    got = run(_both, z.float().numpy(), log_sums(z, temperature).numpy(), 0, 2, dtype, temperature, None)
    assert np.array_equal(got[0], np.full(2, -np.inf, np.float32))
    assert np.array_equal(got[1], np.zeros((2, width), np.float32))


@pytest.mark.parametrize("temperature", [0.005, 0.0234, 0.0236, 0.1])
def test_a_row_opposite_to_all_others(run: Run, temperature: float) -> None:
    """exp(S - 1/temperature) of all its pairs is 0 in float32 at low temperatures; its sum and its gradient are not."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    log_sum = log_sums(z.double(), temperature)
    want, want_pushed, _ = naive(z.double(), log_sum, 0, 4, temperature)
    negatives, pushed = run(_both, z.numpy(), log_sum.numpy(), 0, 4, torch.float32, temperature, SMALL)
    assert want[0] == pytest.approx(math.log(2) - 1 / temperature)
    assert negatives == pytest.approx(want.numpy(), rel=1e-6)
    assert pushed == pytest.approx(want_pushed.numpy(), rel=1e-5)


def test_two_calls_give_the_same_bits(run: Run) -> None:
    z_all = unit_rows(34, 2, 33, torch.float32)
    given = (z_all.float().numpy(), log_sums(z_all, 0.1).numpy(), 34, 34)
    for dtype in TYPES:
        for tiles in (SMALL, None):
            one, two = (run(_both, *given, dtype, 0.1, tiles) for _ in range(2))
            assert one[0].tobytes() == two[0].tobytes()
            assert one[1].tobytes() == two[1].tobytes()


def _strided(rank: int, world_size: int, width: int) -> list[bool]:
    z_all = unit_rows(18, 2, width, torch.float32).float().to(ON_DEVICE)
    log_sum_all = log_sums(z_all.double().cpu(), 0.1).to(ON_DEVICE)
    columns_first = z_all.T.contiguous().T
    spread_terms = torch.stack([log_sum_all, log_sum_all + 1], 1)[:, 0]
    every_second = torch.stack([z_all, -z_all], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (spread_terms, every_second, columns_first))
    own = slice(18, 36)

    def both(z: Tensor, z_all: Tensor, log_sum: Tensor, log_sum_all: Tensor, temperature: float) -> tuple[Tensor, ...]:
        return (
            log_negatives(z, z_all, 18, temperature, tiles=WHOLE),
            repulsion(z, z_all, 18, temperature, log_sum, log_sum_all, tiles=WHOLE),
        )

    equal = []
    for temperature in (0.01, 0.1):
        plain = both(z_all[own], z_all, log_sum_all[own], log_sum_all, temperature)
        for a, b in ((columns_first, every_second), (every_second, columns_first)):
            strided = both(a[own], b, spread_terms[own], spread_terms, temperature)
            equal += [torch.equal(x, y) for x, y in zip(plain, strided, strict=True)]
    return equal


@pytest.mark.parametrize("width", [16, 33])
def test_memory_need_not_be_contiguous(run: Run, width: int) -> None:
    assert run(_strided, width) == [True] * 8


def _whole_batch(rank: int, world_size: int, width: int) -> tuple[bool, list[tuple[int, ...]]]:
    z = unit_rows(6, 1, width, torch.float32).float().to(ON_DEVICE)
    before = z.clone()
    shapes = [tuple(log_negatives(z, z, 0, 0.1).shape), tuple(repulsion(z, z, 0, 0.1, z[:, 0], z[:, 0]).shape)]
    return torch.equal(z, before), shapes


@pytest.mark.parametrize("width", [3, 16])
def test_one_tensor_may_be_both_and_is_not_written_to(run: Run, width: int) -> None:
    assert run(_whole_batch, width) == (True, [(6,), (6, width)])


def _refusal(rank: int, world_size: int, dtype: torch.dtype, dtype_all: torch.dtype) -> list[str]:
    z, z_all = torch.ones(2, 3, dtype=dtype, device=ON_DEVICE), torch.ones(4, 3, dtype=dtype_all, device=ON_DEVICE)
    messages = []
    for call in (
        lambda: log_negatives(z, z_all, 0, 0.1),
        lambda: repulsion(z, z_all, 0, 0.1, z[:, 0], z_all[:, 0]),
    ):
        try:
            call()
        except InputError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize(
    ("dtype", "dtype_all"),
    [(torch.float64, torch.float64), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_other_types_of_number_are_refused(run: Run, dtype: torch.dtype, dtype_all: torch.dtype) -> None:
    messages = run(_refusal, dtype, dtype_all)
    assert len(messages) == 2
    assert all(f"takes bfloat16 or float32 rows, got {dtype} and {dtype_all}" in message for message in messages)


def test_the_interpreter_needs_no_cuda(run: Run) -> None:
    assert run(_requirement, ON_DEVICE) is None


def _requirement(rank: int, world_size: int, device: str) -> None:
    require_triton(device)


def test_without_cuda_the_error_says_what_would_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_interpreted", lambda: False)
    z = torch.ones(2, 3)
    for call in (
        lambda: require_triton("cpu"),
        lambda: require_triton(torch.device("cpu")),
        lambda: log_negatives(z, z, 0, 0.1),
        lambda: repulsion(z, z, 0, 0.1, z[:, 0], z[:, 0]),
    ):
        with pytest.raises(InputError, match=r"^engine 'triton' needs tensors on a CUDA device, got cpu; .*'tiled'$"):
            call()


def test_without_triton_the_module_imports_and_its_use_says_what_is_missing() -> None:
    script = """
import sys
sys.modules["triton"] = None  # what Python does on import of a name so marked is to say that it is not there
import torch
from simclr_scale.errors import InputError
from simclr_scale.losses import triton_kernels as kernels
z = torch.ones(2, 3)
for call in (
    lambda: kernels.require_triton("cpu"),
    lambda: kernels.require_triton("cuda"),
    lambda: kernels.log_negatives(z, z, 0, .1),
    lambda: kernels.repulsion(z, z, 0, .1, z[:, 0], z[:, 0]),
):
    try:
        call()
    except InputError as error:
        print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("engine 'triton' needs the package triton, which is not installed; ") for line in lines)
