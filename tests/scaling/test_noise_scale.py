"""The noise scale against closed forms and against thousands of independent batches."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.losses import NTXentLoss, nt_xent
from simclr_scale.scaling.noise_scale import NoiseScale
from simclr_scale.scaling.noise_scale.estimates import (
    gram_of,
    jackknife_estimate,
    mean_of,
    per_rank_estimate,
    probe_estimate,
)
from simclr_scale.scaling.noise_scale.gradients import own_gradient, unchanged_buffers
from simclr_scale.scaling.noise_scale.measuring import check_mode, jackknife, per_rank, probe
from tests.gloo_pool import GlooPool

DEVIATIONS = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
OFFSET = torch.linspace(-0.6, 1.0, 12, dtype=torch.float64)
NOISE = 0.7


def regression(images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images, 12) per-image gradients of 1/2 (x (w - w*) - noise)^2, x ~ N(0, diag(s^2))."""
    x = torch.randn(images, 12, generator=generator, dtype=torch.float64) * DEVIATIONS
    error = x @ OFFSET - NOISE * torch.randn(images, generator=generator, dtype=torch.float64)
    return x, error


def truth_of_regression() -> NoiseScale:
    """By Isserlis: cov(x x'd) = C (d'Cd) + C d d'C for x ~ N(0, C)."""
    covariance = DEVIATIONS**2
    gradient = covariance * OFFSET
    quadratic = (covariance * OFFSET**2).sum()
    trace = covariance.sum() * quadratic + gradient.square().sum() + NOISE**2 * covariance.sum()
    return NoiseScale(float(gradient.square().sum()), float(trace))


def test_linear_regression_by_all_three_ways() -> None:
    generator, truth = torch.Generator().manual_seed(0), truth_of_regression()
    batch, parts = 32, 8
    gradients, by_ranks, by_jackknife = [], [], []
    for _ in range(3000):
        x, error = regression(batch, generator)
        each = (x * error[:, None]).view(parts, -1, 12).mean(1)
        whole = each.mean(0)
        gradients.append(whole)
        by_ranks.append(per_rank_estimate(each.square().sum(1).tolist(), float(whole.square().sum()), batch))
        without = (each.sum(0) - each) / (parts - 1)
        by_jackknife.append(jackknife_estimate(float(whole.square().sum()), gram_of(list(without)), batch))
    for estimate in (probe_estimate(gram_of(gradients), batch), mean_of(by_ranks), mean_of(by_jackknife)):
        assert estimate.noise == pytest.approx(truth.noise, rel=0.05)
        assert estimate.signal == pytest.approx(truth.signal, rel=0.05)
        assert estimate.simple == pytest.approx(truth.simple, rel=0.05)


def test_formulas_by_hand() -> None:
    rng = np.random.default_rng(0)
    g = rng.normal(size=(5, 7))
    total = g.sum(0)
    estimate = probe_estimate(g @ g.T, 16)
    assert estimate.signal == pytest.approx((total @ total - (g * g).sum()) / 20)
    assert estimate.noise == pytest.approx(16 * ((g - g.mean(0)) ** 2).sum() / 4)
    # B = 40 on 5 ranks of 8
    local, whole = [float(v @ v) for v in g], float((total / 5) @ (total / 5))
    estimate = per_rank_estimate(local, whole, 40)
    assert estimate.signal == pytest.approx((40 * whole - 8 * np.mean(local)) / 32)
    assert estimate.noise == pytest.approx((np.mean(local) - whole) / (1 / 8 - 1 / 40))
    torch.testing.assert_close(torch.from_numpy(gram_of(list(torch.from_numpy(g)))), torch.from_numpy(g @ g.T))


def test_no_signal_is_no_number_and_the_interval_covers() -> None:
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert probe_estimate(opposite, 4).simple is None
    assert probe_estimate(opposite, 4).as_json()["noise_scale"] is None
    # 200 probes of a known Gaussian gradient: its interval holds the truth about as often as it says
    rng = np.random.default_rng(1)
    dimension, n, batch, held = 30, 12, 64, 0
    truth = batch * dimension * 0.5**2 / dimension
    for _ in range(200):
        g = 1 + 0.5 * rng.normal(size=(n, dimension))
        low, high = probe_estimate(g @ g.T, batch).as_json()["interval"]
        held += low <= truth <= high
    assert 0.85 <= held / 200 <= 1


class Toy(nn.Module):
    """Views of clustered points through a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()

    def forward(self, views: Tensor) -> Tensor:
        return self.layers(views)


RANKS, SHARE = 8, 4
BATCH = RANKS * SHARE


def toy_views(generator: torch.Generator, images: int = BATCH) -> Tensor:
    """(2 images, 6): two noisy views of each point."""
    points = torch.randn(images, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, images, 6, generator=generator, dtype=torch.float64)
    return (points + 0.5 * noise).view(2 * images, 6)


def toy_network(steps: int, temperature: float) -> Toy:
    torch.manual_seed(0)
    network, generator = Toy(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nt_xent(network(toy_views(generator)), temperature, engine="dense").backward()
        optimizer.step()
    return network


def gradients_of_ranks(network: Toy, views: Tensor, temperature: float) -> Tensor:
    """(ranks, P): what each rank's backward pass gives, negatives from all; their mean is the gradient of the loss."""
    parameters = list(network.parameters())
    z = network(views)
    (dz,) = torch.autograd.grad(nt_xent(z, temperature, engine="dense"), z, retain_graph=True)
    rows = []
    for rank in range(RANKS):
        own = torch.zeros(2, BATCH, 1, dtype=torch.float64)
        own[:, rank * SHARE : (rank + 1) * SHARE] = RANKS
        grads = torch.autograd.grad(z, parameters, dz * own.view(-1, 1), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize(("steps", "temperature"), [(30, 0.5), (100, 0.2)])
def test_the_toy_study_of_nt_xent(steps: int, temperature: float) -> None:
    """With gathered negatives the per-rank estimate is off by more than twice, the probe by less than 15%."""
    network, generator = toy_network(steps, temperature), torch.Generator().manual_seed(2)
    parameters = list(network.parameters())

    def gradient_of(views: Tensor) -> Tensor:
        return own_gradient(lambda: nt_xent(network(views), temperature, engine="dense"), parameters)

    def many(count: int) -> list[Tensor]:
        return [toy_views(generator) for _ in range(count)]

    truth = probe_estimate(gram_of([gradient_of(views) for views in many(2500)]), BATCH)
    assert truth.simple is not None
    by_ranks = []
    for views in many(150):
        each = gradients_of_ranks(network, views, temperature)
        assert torch.allclose(each.mean(0).float(), gradient_of(views), atol=1e-6)
        by_ranks.append(per_rank_estimate(each.square().sum(1).tolist(), float(each.mean(0).square().sum()), BATCH))
    wrong = mean_of(by_ranks)
    assert wrong.simple is None or not 0.5 < wrong.simple / truth.simple < 2
    right = mean_of([probe(gradient_of, many(16), BATCH) for _ in range(40)])
    assert right.simple == pytest.approx(truth.simple, rel=0.15)


def share_of_linear(rank: int, world_size: int) -> list[NoiseScale]:
    torch.manual_seed(0)
    layer = nn.Linear(12, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(OFFSET[None])
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(6):
        x, _ = regression(8 * world_size, generator)
        batches.append(x[rank * 8 : (rank + 1) * 8])

    def own(x: Tensor) -> Tensor:
        return own_gradient(lambda: (layer(x).square() / 2).mean(), list(layer.parameters()))

    from simclr_scale.scaling.noise_scale.gradients import mean_over_ranks

    batch = 8 * world_size
    return [
        per_rank(own, batches, batch),
        probe(lambda x: mean_over_ranks(own(x)), batches, batch),
        jackknife(lambda x: mean_over_ranks(own(x)), batches, batch, 4),
    ]


def test_ranks_measure_what_one_process_does(gloo: GlooPool) -> None:
    outcomes = gloo(2, share_of_linear)
    for mine, other in zip(*outcomes, strict=True):
        assert mine.signal == pytest.approx(other.signal, rel=1e-12)
        assert mine.noise == pytest.approx(other.noise, rel=1e-12)
    # by hand, of all 16 images of each batch at once
    generator, by_ranks, gradients = torch.Generator().manual_seed(5), [], []
    for _ in range(6):
        x, _ = regression(16, generator)
        each = (x * (x @ OFFSET)[:, None]).view(2, 8, 12).mean(1)
        gradients.append(each.mean(0))
        by_ranks.append(per_rank_estimate(each.square().sum(1).tolist(), float(each.mean(0).square().sum()), 16))
    expected = [mean_of(by_ranks), probe_estimate(gram_of(gradients), 16)]
    for found, right in zip(outcomes[0], expected, strict=False):
        assert found.signal == pytest.approx(right.signal, rel=1e-5)
        assert found.noise == pytest.approx(right.noise, rel=1e-5)


def test_a_gradient_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(8, 4)
    with unchanged_buffers(network):
        flat = own_gradient(lambda: network(x).square().sum(), list(network.parameters()), scale=1024.0)
        assert not torch.equal(network[1].running_mean, before["1.running_mean"])
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in network.parameters())
    network(x).square().sum().backward()
    torch.testing.assert_close(flat, torch.cat([p.grad.flatten() for p in network.parameters()]))


def test_modes_that_cannot_be_trusted() -> None:
    loss: Any = NTXentLoss()
    with pytest.raises(InputError, match=r"there is no 'free'; there are probe, per_rank, jackknife"):
        check_mode("free", loss)
    with pytest.raises(InputError, match="mode per_rank is wrong for NTXentLoss with negatives from all ranks"):
        check_mode("per_rank", loss, ranks=2)
    with pytest.raises(InputError, match="there is one"):
        check_mode("per_rank", loss, ranks=1, force=True)
    check_mode("per_rank", loss, ranks=2, force=True)
    check_mode("per_rank", NTXentLoss(gather=False), ranks=2)
    check_mode("per_rank", None, ranks=2)
    with pytest.raises(InputError, match="needs 2 independent batches at least, got 1"):
        probe_estimate(np.ones((1, 1)), 4)
    with pytest.raises(InputError, match="there is one"):
        per_rank_estimate([1.0], 1.0, 4)
    with pytest.raises(InputError, match="parts of equal size"):
        jackknife(lambda x: F.relu(x).flatten(), [torch.ones(6, 2)], 3, 2)
