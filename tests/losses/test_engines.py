"""What every engine computes, against the definition; what differs between them is how."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_memory
from simclr_scale.errors import InputError
from simclr_scale.losses import engines, nt_xent, tiled

ENGINES = ["dense", "tiled"]
# Rows of this rank, of the ranks before it and of those after.
PLACES = [(2, 0, 0), (2, 2, 0), (6, 0, 6), (10, 20, 10), (34, 34, 68)]


@pytest.fixture(params=[3, 8, 512])
def tile(request, monkeypatch) -> int:
    """Tiles smaller than the rows, dividing them and not, and larger."""
    monkeypatch.setitem(tiled._TILE, "cpu", request.param)
    return request.param


def unit_rows(count: int, d: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(count * d)
    return F.normalize(torch.randn(count, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def naive(z_all: Tensor, rows: int, first: int, temperature: float, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Both functions of an engine, row by row in float64."""
    z_all, log_sum = z_all.double(), log_sum.double()
    sums, pushes = [], []
    for i in range(rows):
        partner = first + (i + rows // 2) % rows
        others = [j for j in range(len(z_all)) if j not in (first + i, partner)]
        s = z_all[others] @ z_all[first + i] / temperature
        sums.append(s.logsumexp(0) if others else torch.tensor(-torch.inf, dtype=torch.float64))
        pushes.append(((s - log_sum[first + i]).exp() + (s - log_sum[others]).exp()) @ z_all[others])
    return torch.stack(sums), torch.stack(pushes)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rows", "before", "after"), PLACES)
@pytest.mark.parametrize("temperature", [0.002, 0.02, 0.05, 0.1, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_both_functions_are_the_definition(
    engine: str, rows: int, before: int, after: int, temperature: float, dtype: torch.dtype, tolerance: float, tile: int
) -> None:
    z_all = unit_rows(before + rows + after, 7, dtype)
    z = z_all[before : before + rows]
    # Any denominators will do, so those of real rows: a row's own and one that differs from it.
    log_sum = torch.randn(len(z_all), dtype=dtype) + 1 / temperature
    expected, expected_push = naive(z_all, rows, before, temperature, log_sum)

    actual = engines.log_negatives(z, z_all, before, temperature, engine)
    assert actual.dtype == dtype
    scale = max(1, 1 / temperature / 10)  # similarities of this size are themselves rounded
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale)

    push = engines.repulsion(z, z_all, before, temperature, log_sum[before : before + rows], log_sum, engine)
    assert push.shape == z.shape
    assert push.isfinite().all()
    assert (push.double() - expected_push).norm() <= tolerance * scale * (expected_push.norm() + 1e-30)


@pytest.mark.parametrize("temperature", [0.024, 0.026])
def test_the_limit_of_plain_exponentials_makes_no_step(temperature: float) -> None:
    """Opposite and equal rows are the extremes of a similarity."""
    z = F.normalize(torch.randn(1, 4), dim=1)
    z = torch.cat([z, -z, z, -z, z, z])
    expected, _ = naive(z, 6, 0, temperature, torch.zeros(6))
    torch.testing.assert_close(
        engines.log_negatives(z, z, 0, temperature, "tiled").double(), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("rows", "before", "after"), PLACES)
def test_tiles_cover_each_pair_once(rows: int, before: int, after: int, tile: int) -> None:
    seen = torch.zeros(rows, before + rows + after, dtype=torch.int)
    for t in tiled._tiles(rows, before + rows + after, before, tile):
        assert t.rows.stop - t.rows.start <= tile
        assert t.columns.stop - t.columns.start <= tile
        seen[t.rows, t.columns] += 1
        if t.mirror is not None:
            seen[t.mirror, before + t.rows.start : before + t.rows.stop] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("rows", [510, 512, 2050])
def test_one_rank_multiplies_half_the_matrix(rows: int) -> None:
    tiles = list(tiled._tiles(rows, rows, 0, 512))
    area = sum((t.rows.stop - t.rows.start) * (t.columns.stop - t.columns.start) for t in tiles)
    blocks = -(-rows // 512)
    assert area == pytest.approx(rows**2 * (blocks + 1) / (2 * blocks), rel=1e-2)


def test_memory_of_the_tiled_engine_is_linear_in_the_rows() -> None:
    def peak(count: int, engine: engines.Engine) -> int:
        z = torch.randn(count, 32, requires_grad=True)
        return peak_memory(lambda: nt_xent(z, engine=engine).backward())

    small, large = peak(2048, "tiled"), peak(8192, "tiled")
    tiles = 2 * 4 * 512**2
    assert large - tiles <= 4 * (small - tiles) * 1.1
    assert large < 10 * 4 * 8192 * 32 + 1.1 * tiles
    assert peak(2048, "dense") > 4 * 2048**2, "the measure sees the matrix that the dense engine holds"


def test_the_engine_that_auto_chooses() -> None:
    assert engines.choose("auto", torch.device("cpu")) == "tiled"
    assert engines.choose("dense", torch.device("cpu")) == "dense"


def test_an_engine_that_cannot_run_or_does_not_exist() -> None:
    with pytest.raises(InputError, match="CUDA"):
        nt_xent(torch.randn(4, 3), engine="triton")
    with pytest.raises(ValueError, match="engine 'fast'; it is one of 'auto', 'dense', 'tiled', 'triton'"):
        nt_xent(torch.randn(4, 3), engine="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ENGINES)
def test_operators_pass_torchs_own_checks(engine: str) -> None:
    z = unit_rows(6, 4, torch.float32)
    torch.library.opcheck(engines.log_negatives, (z, z.clone(), 0, 0.1, engine))
    torch.library.opcheck(engines.repulsion, (z, z.clone(), 0, 0.1, torch.randn(6), torch.randn(6), engine))


def test_every_pair_of_engines_agrees_on_a_large_batch() -> None:
    z = torch.randn(1030, 33)
    results = []
    for engine in ENGINES:
        x = z.clone().requires_grad_()
        loss = nt_xent(x, 0.07, engine=engine)  # type: ignore[arg-type]
        loss.backward()
        results.append((loss.item(), x.grad))
    for (a, ga), (b, gb) in itertools.combinations(results, 2):
        assert a == pytest.approx(b, rel=1e-6)
        assert (ga - gb).norm() <= 2e-6 * gb.norm()
