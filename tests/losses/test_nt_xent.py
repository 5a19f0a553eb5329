"""NT-Xent against the paper's formula, in values and gradients, on 1, 2 and 4 processes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.distributed import all_gather
from simclr_scale.losses import NTXentLoss, nt_xent, tiled
from tests.losses.oracles import images, masked_cross_entropy, network, paper_loss, share

SIZES = [(1, 3), (2, 1), (3, 5), (17, 16), (64, 33)]


@pytest.fixture(params=["dense", "tiled", "tiled, small tiles"])
def engine(request, monkeypatch) -> str:
    if request.param == "tiled, small tiles":
        monkeypatch.setitem(tiled._TILE, "cpu", 6)
    return request.param.split(",")[0]


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_value_is_the_papers_formula(n: int, d: int, temperature: float, engine) -> None:
    z1, z2 = np.random.default_rng(n).normal(size=(2, n, d))
    loss = nt_xent(torch.from_numpy(np.concatenate([z1, z2])), temperature, engine=engine)
    assert loss.item() == pytest.approx(paper_loss(z1, z2, temperature), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SIZES[1:])
@pytest.mark.parametrize("temperature", [0.002, 0.2])
def test_gradient_is_autograds(n: int, d: int, temperature: float, engine) -> None:
    z = torch.randn(2 * n, d, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(3 * masked_cross_entropy(z, temperature), z)
    (actual,) = torch.autograd.grad(3 * nt_xent(z, temperature, engine=engine), z)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13 / temperature)


def test_gradient_is_that_of_finite_differences(engine) -> None:
    z = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, 0.2, engine=engine), z)


def test_one_image_has_no_negatives(engine) -> None:
    z = torch.randn(2, 4, requires_grad=True)
    loss = nt_xent(z, engine=engine)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_a_row_of_zeros_has_a_finite_gradient(engine) -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    z[2] = 0
    ours, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    nt_xent(ours, engine=engine).backward()
    masked_cross_entropy(plain, 0.1).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-13)


def test_twice_in_one_graph_with_factors(engine) -> None:
    z = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)

    def twice(loss) -> Tensor:
        return 2 * loss(z, 0.2) * loss(z.flip(0) + z, 0.1) - loss(z[:6], 0.3)

    (expected,) = torch.autograd.grad(twice(masked_cross_entropy), z)
    (actual,) = torch.autograd.grad(twice(partial(nt_xent, engine=engine)), z)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_backward_again_over_a_kept_graph_gives_the_same(engine) -> None:
    z = torch.randn(10, 4, requires_grad=True)
    loss = nt_xent(z, engine=engine)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)


def test_second_derivatives_are_a_clear_error(engine) -> None:
    z = torch.randn(10, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(nt_xent(z, engine=engine), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def near_convergence() -> Tensor:
    """Rows whose loss is below 1e-4 at temperature .05, where cross-entropy in float32 is off by a hundredth."""
    torch.manual_seed(0)
    base = torch.eye(24, 32, dtype=torch.float64) + 0.02 * torch.randn(24, 32, dtype=torch.float64)
    return torch.cat([base, base + 0.05 * torch.randn_like(base)])


def errors_near_convergence(loss) -> tuple[float, float]:
    """Relative, of the loss and of its gradient in float32."""
    z = near_convergence().requires_grad_()
    exact = masked_cross_entropy(z, 0.05)
    assert exact.item() < 1e-4
    (exact_gradient,) = torch.autograd.grad(exact, z)
    narrow = z.detach().float().requires_grad_()
    value = loss(narrow, 0.05)
    (gradient,) = torch.autograd.grad(value, narrow)
    relative = (gradient - exact_gradient).norm() / exact_gradient.norm()
    return abs(value.item() / exact.item() - 1), relative.item()


def test_precise_near_convergence_in_float32(engine) -> None:
    assert max(errors_near_convergence(partial(nt_xent, engine=engine))) <= 1e-5
    assert min(errors_near_convergence(masked_cross_entropy)) > 1e-3, "the plain form is not, so this is a test"


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(temperature: float, dtype: torch.dtype, engine) -> None:
    torch.manual_seed(0)
    z1 = torch.randn(64, 32)
    z = torch.cat([z1, z1 + 0.5 * torch.randn_like(z1)]).to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    masked_cross_entropy(exact, temperature).backward()
    loss = nt_xent(z, temperature, engine=engine)
    loss.backward()
    assert loss.dtype == torch.float32
    assert z.grad.dtype == dtype
    assert F.cosine_similarity(z.grad.double().flatten(), exact.grad.flatten(), 0) >= 0.9999


@pytest.mark.parametrize("backward_within", [True, False])
def test_autocast_changes_nothing(backward_within: bool, engine) -> None:
    z = torch.randn(40, 8)
    plain, cast = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = nt_xent(plain, engine=engine)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = nt_xent(cast, engine=engine)
        if backward_within:
            under.backward()
    if not backward_within:
        under.backward()
    assert torch.equal(loss, under)
    assert torch.equal(plain.grad, cast.grad)


def test_compiled_without_a_break_in_the_graph(engine) -> None:
    def training(z: Tensor) -> Tensor:
        return 3 * nt_xent(2 * z, 0.2, engine=engine)

    compiled = torch.compile(training, fullgraph=True, backend="aot_eager")
    for rows in (12, 20):
        z = torch.randn(rows, 5, requires_grad=True)
        (expected,) = torch.autograd.grad(training(z), z)
        (actual,) = torch.autograd.grad(compiled(z), z)
        torch.testing.assert_close(actual, expected)


def test_module_takes_one_or_two_tensors() -> None:
    z1, z2 = torch.randn(2, 5, 7)
    loss = NTXentLoss(0.3)
    assert torch.equal(loss(z1, z2), loss(torch.cat([z1, z2])))
    with pytest.raises(ValueError, match="one shape"):
        loss(z1, z2[:3])


@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.zeros(3, 4), {}, "2n, d"),
        (torch.zeros(0, 4), {}, "2n, d"),
        (torch.zeros(4), {}, "2n, d"),
        (torch.ones(4, 2), {"temperature": 0.0}, "temperature"),
        (torch.ones(4, 2, dtype=torch.int64), {}, "floating point, got torch.int64"),
    ],
)
def test_bad_arguments(z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(z, **options)


# --- several ranks ----------------------------------------------------------------------------------------------------


def _local_rows_own_slice(z: Tensor, gathered: Tensor, temperature: float) -> Tensor:
    rank, rows = dist.get_rank(), len(z)
    own = torch.arange(rows)
    unit, unit_all = F.normalize(z, dim=1), F.normalize(gathered, dim=1)
    logits = unit @ unit_all.T / temperature
    logits[own, own + rank * rows] = -math.inf
    return F.cross_entropy(logits, own.roll(rows // 2) + rank * rows)


def full_matrix_own_slice(z: Tensor, temperature: float) -> Tensor:
    gathered = list(all_gather(z.detach()).chunk(dist.get_world_size()))
    gathered[dist.get_rank()] = z
    z1, z2 = zip(*(part.chunk(2) for part in gathered), strict=True)
    return masked_cross_entropy(torch.cat([*z1, *z2]), temperature)


def local_rows_own_slice(z: Tensor, temperature: float) -> Tensor:
    gathered = list(all_gather(z.detach()).chunk(dist.get_world_size()))
    gathered[dist.get_rank()] = z
    return _local_rows_own_slice(z, torch.cat(gathered), temperature)


def detached_gather(z: Tensor, temperature: float) -> Tensor:
    return _local_rows_own_slice(z, all_gather(z.detach()), temperature)


def no_gather(z: Tensor, temperature: float) -> Tensor:
    return masked_cross_entropy(z, temperature)


def small_tiles(z: Tensor, temperature: float) -> Tensor:
    tile, tiled._TILE["cpu"] = tiled._TILE["cpu"], 5
    try:
        return nt_xent(z, temperature, engine="tiled")
    finally:
        tiled._TILE["cpu"] = tile


OURS = {
    "dense": partial(nt_xent, engine="dense"),
    "tiled": partial(nt_xent, engine="tiled"),
    "small tiles": small_tiles,
}
SCHEMES = {
    **OURS,
    "full matrix + own slice": full_matrix_own_slice,
    "local rows + own slice": local_rows_own_slice,
    "detached gather": detached_gather,
    "no gather": no_gather,
}


def step(rank: int, world_size: int, n: int, scheme: str, factor: float) -> tuple[float, list[Tensor]]:
    """Loss and the gradient of every parameter, averaged over ranks by DistributedDataParallel itself."""
    model = nn.parallel.DistributedDataParallel(network())
    loss = SCHEMES[scheme](model(share(rank, world_size, n)), 0.2)
    (factor * loss).backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


def assert_exact(results: list[tuple[float, list[Tensor]]], n: int, factor: float) -> None:
    model = network()
    expected = masked_cross_entropy(model(torch.cat(images(n))), 0.2)
    (factor * expected).backward()
    for value, gradients in results:
        assert value == pytest.approx(expected.item(), rel=1e-12)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert (gradient - parameter.grad).norm() <= 1e-10 * parameter.grad.norm()
    assert len({value for value, _ in results}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("n", [4, 36])
@pytest.mark.parametrize("scheme", OURS)
def test_gradient_on_several_ranks_is_that_of_one(gloo, world_size: int, n: int, scheme: str) -> None:
    assert_exact(gloo(world_size, step, n, scheme, 1.0), n, 1.0)
    assert_exact(gloo(world_size, step, n, scheme, 2.5), n, 2.5)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in OURS])
def test_the_check_catches_the_faulty_schemes(gloo, scheme: str) -> None:
    with pytest.raises(AssertionError):
        assert_exact(gloo(4, step, 36, scheme, 1.0), 36, 1.0)


def local_negatives(rank: int, world_size: int) -> tuple[float, Tensor]:
    z = share(rank, world_size, 8).requires_grad_()
    loss = nt_xent(z, 0.2, gather=False)
    loss.backward()
    return loss.item(), z.grad


def test_without_gather_the_value_is_the_mean_of_the_ranks(gloo) -> None:
    results = gloo(2, local_negatives)
    parts = []
    for rank, (_, gradient) in enumerate(results):
        z = share(rank, 2, 8).requires_grad_()
        loss = masked_cross_entropy(z, 0.2)
        loss.backward()
        parts.append(loss.item())
        torch.testing.assert_close(gradient, z.grad, rtol=1e-10, atol=1e-14)
    assert [value for value, _ in results] == pytest.approx([sum(parts) / 2] * 2, rel=1e-12)


def unequal(rank: int, world_size: int) -> str:
    try:
        nt_xent(torch.randn(2 + 2 * rank, 4))
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_of_different_size_fail_everywhere(gloo) -> None:
    messages = gloo(4, unequal)
    assert all("ranks 0 to 3 have [2, 4, 6, 8]" in message for message in messages), messages


def subgroup(rank: int, world_size: int) -> tuple[float, Tensor]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    z = share(rank % 2, 2, 8).requires_grad_()
    loss = nt_xent(z, 0.2, group=groups[rank // 2])
    loss.backward()
    return loss.item(), z.grad


def test_a_subgroup_is_a_world_of_its_own(gloo) -> None:
    results = gloo(4, subgroup)
    z = torch.cat(images(8)).requires_grad_()
    expected = masked_cross_entropy(z, 0.2)
    expected.backward()
    assert [value for value, _ in results] == pytest.approx([expected.item()] * 4, rel=1e-12)
    first, second = z.grad.chunk(2)
    for rank, (_, gradient) in enumerate(results):
        own = torch.cat([first.chunk(2)[rank % 2], second.chunk(2)[rank % 2]])
        # each of two ranks carries twice its share, which DDP's average over them takes back
        torch.testing.assert_close(gradient, 2 * own, rtol=1e-10, atol=1e-14)
