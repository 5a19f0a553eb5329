"""NT-Xent against the paper's formula, in values and gradients, on 1, 2 and 4 processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.distributed import all_gather
from simclr_scale.losses import NTXentLoss, contrastive_accuracy, nt_xent

SIZES = [(1, 3), (2, 1), (3, 5), (17, 16), (64, 33)]


def paper_loss(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Equation 1 of the paper, term by term in float64."""
    views = [row / math.sqrt(float(row @ row)) for row in np.concatenate([z1, z2]).astype(np.float64)]
    n = len(z1)
    total = 0.0
    for i in range(2 * n):
        j = i + n if i < n else i - n
        denominator = sum(math.exp(float(views[i] @ views[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(float(views[i] @ views[j]) / temperature) / denominator)
    return total / (2 * n)


def masked_cross_entropy(z: Tensor, temperature: float) -> Tensor:
    """The loss as torch's own operations give it; autograd differentiates it."""
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_value_is_the_papers_formula(n: int, d: int, temperature: float) -> None:
    z1, z2 = np.random.default_rng(n).normal(size=(2, n, d))
    loss = nt_xent(torch.from_numpy(np.concatenate([z1, z2])), temperature)
    assert loss.item() == pytest.approx(paper_loss(z1, z2, temperature), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SIZES[1:])
def test_gradient_is_autograds(n: int, d: int) -> None:
    z = torch.randn(2 * n, d, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(3 * masked_cross_entropy(z, 0.2), z)
    (actual,) = torch.autograd.grad(3 * nt_xent(z, 0.2), z)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, 0.2), z)


def test_one_image_has_no_negatives() -> None:
    z = torch.randn(2, 4, requires_grad=True)
    loss = nt_xent(z)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_precise_near_convergence_in_float32() -> None:
    """Loss below 1e-4 at temperature .05, where cross-entropy in float32 is off by about a hundredth."""
    torch.manual_seed(0)
    base = torch.eye(24, 32, dtype=torch.float64) + 0.02 * torch.randn(24, 32, dtype=torch.float64)
    z = torch.cat([base, base + 0.05 * torch.randn_like(base)]).requires_grad_()
    exact = masked_cross_entropy(z, 0.05)
    (exact_gradient,) = torch.autograd.grad(exact, z)
    narrow = z.detach().float().requires_grad_()
    loss = nt_xent(narrow, 0.05)
    (gradient,) = torch.autograd.grad(loss, narrow)
    assert exact.item() < 1e-4
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 1e-5


def test_half_precision_input_is_computed_in_float32() -> None:
    z = torch.randn(16, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(masked_cross_entropy(z.double(), 0.1).item(), rel=1e-6)


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
        (torch.ones(4, 2), {"engine": "fast"}, "engine 'fast'"),
    ],
)
def test_bad_arguments(z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(z, **options)


def test_contrastive_accuracy() -> None:
    z = torch.eye(4)
    assert contrastive_accuracy(torch.cat([z, z])).item() == 1.0
    assert contrastive_accuracy(torch.cat([z, z.roll(1, 0)])).item() == 0.0


def test_contrastive_accuracy_of_close_rows_under_autocast() -> None:
    torch.manual_seed(0)
    z1 = torch.randn(64) + 0.05 * torch.randn(64, 64)
    z = torch.cat([z1, z1 + 0.01 * torch.randn(64, 64)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_accuracy(z).item() == 1.0


# --- several ranks ----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def images(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x1 = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x1, x1 + 0.3 * torch.randn(n, 6, generator=generator, dtype=torch.float64)


def share(rank: int, world_size: int, n: int) -> Tensor:
    """This rank's images, rows [view 1; view 2]."""
    x1, x2 = (x.chunk(world_size)[rank] for x in images(n))
    return torch.cat([x1, x2])


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


SCHEMES = {
    "ours": nt_xent,
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
def test_gradient_on_several_ranks_is_that_of_one(gloo, world_size: int, n: int) -> None:
    assert_exact(gloo(world_size, step, n, "ours", 1.0), n, 1.0)
    assert_exact(gloo(world_size, step, n, "ours", 2.5), n, 2.5)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "ours"])
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


def accuracy(rank: int, world_size: int) -> float:
    return contrastive_accuracy(share(rank, world_size, 8).float()).item()


def test_contrastive_accuracy_sees_all_ranks(gloo) -> None:
    everything = contrastive_accuracy(torch.cat(images(8)).float()).item()
    assert sum(gloo(2, accuracy)) / 2 == pytest.approx(everything)
