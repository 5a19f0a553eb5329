"""VICReg, Barlow Twins, spectral contrastive and sigmoid losses against their formulas, on 1, 2 and 4 processes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.losses import (
    BarlowTwinsLoss,
    SigmoidLoss,
    SpectralContrastiveLoss,
    VICRegLoss,
    barlow_twins,
    sigmoid_pairs,
    spectral_contrastive,
    vicreg,
)
from tests.gloo_pool import GlooPool
from tests.losses.oracles import images, network, share

SIZES = [(2, 1), (3, 5), (17, 16), (33, 40)]
SCALE, BIAS = torch.tensor(4.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)


def sigmoid(z: Tensor) -> Tensor:
    return sigmoid_pairs(z, SCALE, BIAS)


def unbounded(z: Tensor) -> Tensor:
    return spectral_contrastive(z, None)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "vicreg": vicreg,
    "barlow_twins": barlow_twins,
    "spectral": spectral_contrastive,
    "spectral, no bound": unbounded,
    "sigmoid": sigmoid,
}


def by_formula(name: str, z1: np.ndarray, z2: np.ndarray) -> float:
    """Term by term, in float64."""
    n, d = z1.shape
    if name == "vicreg":
        total = 25 * sum(float((z1[i, j] - z2[i, j]) ** 2) for i in range(n) for j in range(d)) / (n * d)
        for z in (z1, z2):
            covariance = np.atleast_2d(np.cov(z, rowvar=False))
            total += 25 / 2 * sum(max(0.0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(d)) / d
            total += sum(covariance[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
        return total
    if name == "barlow_twins":
        y1, y2 = ((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (z1, z2))
        total = 0.0
        for i in range(d):
            for j in range(d):
                correlation = sum(float(y1[k, i] * y2[k, j]) for k in range(n)) / n
                total += (1 - correlation) ** 2 if i == j else 0.0051 * correlation**2
        return total
    if name.startswith("spectral"):
        if name == "spectral":
            z1, z2 = ([row / max(1.0, math.sqrt(sum(row**2))) for row in z] for z in (z1, z2))
        pull = sum(float(z1[i] @ z2[i]) for i in range(n)) / n
        push = sum(float(z1[i] @ z2[j]) ** 2 for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return -2 * pull + push
    u1, u2 = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
    total = 0.0
    for i in range(n):
        for j in range(n):
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (4 * float(u1[i] @ u2[j]) - 3)))
    return total / n


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_value_is_the_formula(name: str, n: int, d: int) -> None:
    z1, z2 = np.random.default_rng(n).normal(1, 2, size=(2, n, d))
    value = LOSSES[name](torch.from_numpy(np.concatenate([z1, z2])))
    assert value.item() == pytest.approx(by_formula(name, z1, z2), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("n", "d"), [(5, 4), (9, 3)])
def test_gradient_is_that_of_finite_differences(name: str, n: int, d: int) -> None:
    z = torch.randn(2 * n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n), requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], z)


def test_gradient_of_scale_and_bias_is_that_of_finite_differences() -> None:
    z = torch.randn(10, 4, dtype=torch.float64)
    scale, bias = (one.clone().requires_grad_() for one in (SCALE, BIAS))
    assert torch.autograd.gradcheck(lambda s, b: sigmoid_pairs(z, s, b), (scale, bias))


def test_blocks_of_pairs_are_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(26, 6, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(sigmoid(z), z)
    value = sigmoid(z).item()
    monkeypatch.setattr("simclr_scale.losses.sigmoid._BLOCK", 5)
    (blocks,) = torch.autograd.grad(sigmoid(z), z)
    assert sigmoid(z).item() == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-15)


def test_closed_forms() -> None:
    n = 6
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    # Each image has one pair at similarity 1 and n - 1 at 0.
    expected = math.log1p(math.exp(-1.0)) + (n - 1) * math.log1p(math.exp(-3.0))
    assert sigmoid(z).item() == pytest.approx(expected, rel=1e-13)
    for mu, scale, expected in ((None, 3, -18), (1.0, 3, -2), (1.0, 0.5, -0.5), (10.0, 9, -2), (10.0, 2, -0.8)):
        # Only rows longer than sqrt(mu) are shortened, and the whole is divided by mu.
        assert spectral_contrastive(scale * z, mu).item() == pytest.approx(expected, rel=1e-13)
    # Equal views, features that are uncorrelated and of variance 4 (n - 1 in the denominator).
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) * math.sqrt(3.0)
    assert vicreg(z.repeat(2, 1)).item() == pytest.approx(0, abs=1e-12)
    # The correlation is 1 but for the eps of the variance, which is 3.
    assert barlow_twins(z.repeat(2, 1)).item() == pytest.approx(2 * (1 - 3 / (3 + 1e-5)) ** 2, rel=1e-6)
    # Collapsed features: only the hinge is left, at sqrt(eps) = .01.
    assert vicreg(torch.ones(8, 3, dtype=torch.float64)).item() == pytest.approx(25 * 0.99, rel=1e-12)


def test_spectral_loss_is_unbiased_at_any_batch_size() -> None:
    """Its mean over all batches of 3 of 5 images is its value on all 5."""
    from itertools import combinations

    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small = [unbounded(torch.cat([z1[list(some)], z2[list(some)]])) for some in combinations(range(5), 3)]
    assert torch.stack(small).mean().item() == pytest.approx(unbounded(torch.cat([z1, z2])).item(), rel=1e-12)


def test_rows_of_no_length_have_a_gradient() -> None:
    z = torch.cat([torch.zeros(1, 4), torch.randn(7, 4)]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(spectral_contrastive(z), z)
    assert torch.isfinite(gradient).all()
    assert gradient[0].norm() > 0


@pytest.mark.parametrize("mu", [0.0, -1.0, math.inf, math.nan])
def test_a_ball_of_no_radius_is_refused(mu: float) -> None:
    for make in (lambda: SpectralContrastiveLoss(mu), lambda: spectral_contrastive(torch.randn(4, 2), mu)):
        with pytest.raises(InputError, match="mu must be above 0"):
            make()


def test_large_means_do_not_cost_digits() -> None:
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    shifted = z + 300
    for loss in (vicreg, barlow_twins):
        assert loss(shifted).item() == pytest.approx(loss(shifted.double()).item(), rel=1e-3)


def test_modules() -> None:
    z1, z2 = torch.randn(2, 6, 7)
    z = torch.cat([z1, z2])
    assert torch.equal(VICRegLoss(10.0, 5.0, 2.0)(z1, z2), vicreg(z, 10.0, 5.0, 2.0))
    assert torch.equal(BarlowTwinsLoss(0.1)(z), barlow_twins(z, 0.1))
    assert torch.equal(SpectralContrastiveLoss()(z1, z2), spectral_contrastive(z))
    assert torch.equal(SpectralContrastiveLoss(None)(z1, z2), spectral_contrastive(z, None))
    assert "mu=1.0" in repr(SpectralContrastiveLoss())
    loss = SigmoidLoss()
    assert torch.equal(loss(z), sigmoid_pairs(z, torch.tensor(10.0), torch.tensor(-10.0)))
    assert {name for name, _ in loss.named_parameters()} == {"log_scale", "bias"}
    assert "scale=10" in repr(loss)
    assert "redundancy=0.1" in repr(BarlowTwinsLoss(0.1))
    assert "invariance=25.0" in repr(VICRegLoss())


def test_half_precision_is_computed_in_single() -> None:
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in ("vicreg", "barlow_twins", "spectral"):
        value = LOSSES[name](z)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(LOSSES[name](z.float()).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["vicreg", "barlow_twins", "spectral"])
def test_a_single_image_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        LOSSES[name](torch.randn(2, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_bad_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="rows"):
        LOSSES[name](torch.randn(3, 4))
    with pytest.raises(ValueError, match="floating point"):
        LOSSES[name](torch.ones(4, 4, dtype=torch.int64))


def test_views_of_different_shape_and_a_scale_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        VICRegLoss()(torch.randn(3, 4), torch.randn(4, 4))
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        SigmoidLoss(0)


class Learned(nn.Module):
    """A network with the sigmoid loss's scale and bias, so that DDP averages their gradients too."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.loss = network(), SigmoidLoss(4.0, -3.0).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.network(x))


class Fixed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.network, self.name = network(), name

    def forward(self, x: Tensor) -> Tensor:
        return LOSSES[self.name](self.network(x))


def model(name: str) -> nn.Module:
    return Learned() if name == "sigmoid" else Fixed(name)


def step(rank: int, world_size: int, n: int, name: str) -> tuple[float, list[Tensor]]:
    parallel = nn.parallel.DistributedDataParallel(model(name))
    loss = parallel(share(rank, world_size, n))
    (2.5 * loss).backward()
    return loss.item(), [parameter.grad for parameter in parallel.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [4, 36])
def test_several_ranks_are_one(gloo: GlooPool, world_size: int, name: str, n: int) -> None:
    alone = model(name)
    expected = alone(torch.cat(images(n)))
    (2.5 * expected).backward()
    results = gloo(world_size, step, n, name)
    assert len({value for value, _ in results}) == 1
    # A shift of all features changes no centred moment: the last bias has a gradient of zero, but for rounding.
    largest = max(parameter.grad.norm() for parameter in alone.parameters())
    for value, gradients in results:
        assert value == pytest.approx(expected.item(), rel=1e-10)
        for gradient, parameter in zip(gradients, alone.parameters(), strict=True):
            assert (gradient - parameter.grad).norm() <= 1e-10 * max(parameter.grad.norm(), 1e-3 * largest)


def uneven(rank: int, world_size: int, name: str) -> str:
    with pytest.raises(ValueError, match="every rank must have the same") as error:
        LOSSES[name](torch.randn(2 * (3 + rank), 4, dtype=torch.float64))
    return str(error.value)


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_of_different_size_are_refused_on_each(gloo: GlooPool, name: str) -> None:
    assert len(set(gloo(2, uneven, name))) == 1


@pytest.mark.parametrize("local", ["vicreg", "barlow_twins", "spectral"])
def test_the_moments_are_of_all_ranks(gloo: GlooPool, local: str) -> None:
    """The mean of the losses of each rank alone is another number: this could fail."""
    parts = [LOSSES[local](network()(share(rank, 2, 36))).item() for rank in range(2)]
    (whole, _), *_ = gloo(2, step, 36, local)
    assert whole != pytest.approx(np.mean(parts), rel=1e-3)


def test_sigmoid_is_binary_cross_entropy_of_all_pairs() -> None:
    z = torch.randn(14, 5, dtype=torch.float64)
    u1, u2 = F.normalize(z, dim=1).chunk(2)
    expected = F.binary_cross_entropy_with_logits(
        SCALE * u1 @ u2.T + BIAS, torch.eye(7, dtype=torch.float64), reduction="sum"
    )
    assert sigmoid(z).item() == pytest.approx(expected.item() / 7, rel=1e-12)
