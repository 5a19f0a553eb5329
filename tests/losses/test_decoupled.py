"""The decoupled losses against the paper's formulas, in values and gradients, on 1, 2 and 4 processes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simclr_scale.losses import DCLLoss, DCLWLoss, dcl, dclw
from tests.losses.oracles import decoupled, images, network, paper_decoupled_loss, share

SIZES = [(2, 1), (3, 5), (17, 16), (64, 33)]
LOSSES = {"dcl": (dcl, None), "dclw": (partial(dclw, sigma=0.4), 0.4)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_value_is_the_papers_formula(name: str, engine: str, n: int, d: int, temperature: float) -> None:
    loss, sigma = LOSSES[name]
    z1, z2 = np.random.default_rng(n).normal(size=(2, n, d))
    value = loss(torch.from_numpy(np.concatenate([z1, z2])), temperature, engine=engine)
    assert value.item() == pytest.approx(paper_decoupled_loss(z1, z2, temperature, sigma), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_gradient_is_autograds(name: str, engine: str, n: int, d: int) -> None:
    loss, sigma = LOSSES[name]
    z = torch.randn(2 * n, d, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(3 * decoupled(z, 0.2, sigma), z)
    (actual,) = torch.autograd.grad(3 * loss(z, 0.2, engine=engine), z)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def test_gradient_is_that_of_finite_differences() -> None:
    """For DCL; DCLW's weights are constants to the gradient but not to the value."""
    z = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dcl(x, 0.2), z)


def test_orthogonal_images_in_closed_form() -> None:
    n, temperature = 5, 0.25
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    # Each row has 2n - 2 negatives at similarity 0 and its positive at 1; the weights are then all 1.
    expected = math.log(2 * n - 2) - 1 / temperature
    assert dcl(z, temperature).item() == pytest.approx(expected, rel=1e-14)
    assert dclw(z, temperature).item() == pytest.approx(expected, rel=1e-14)


def test_pairs_that_disagree_weigh_more() -> None:
    """The mean weight is 1, so DCLW and DCL agree where all pairs agree alike, and only there."""
    z1, z2 = torch.randn(2, 12, 6, dtype=torch.float64)
    z = torch.cat([z1, z2])
    assert dclw(z).item() != pytest.approx(dcl(z).item(), rel=1e-3)
    assert dclw(z, sigma=1e9).item() == pytest.approx(dcl(z).item(), rel=1e-6)


def test_modules() -> None:
    z1, z2 = torch.randn(2, 5, 7)
    z = torch.cat([z1, z2])
    assert torch.equal(DCLLoss(0.3)(z1, z2), dcl(z, 0.3))
    assert torch.equal(DCLWLoss(0.3, sigma=0.2)(z), dclw(z, 0.3, sigma=0.2))
    assert "sigma=0.2" in repr(DCLWLoss(sigma=0.2))


@pytest.mark.parametrize("loss", [dcl, dclw])
def test_a_single_image_is_refused(loss) -> None:
    with pytest.raises(ValueError, match="at least 2 images"):
        loss(torch.randn(2, 4))


def test_sigma_out_of_range() -> None:
    with pytest.raises(ValueError, match="sigma must be above 0, got 0"):
        dclw(torch.randn(8, 4), sigma=0)
    with pytest.raises(ValueError, match="sigma must be above 0, got -1"):
        DCLWLoss(sigma=-1)


def step(rank: int, world_size: int, n: int, name: str) -> tuple[float, list[Tensor]]:
    model = nn.parallel.DistributedDataParallel(network())
    loss = LOSSES[name][0](model(share(rank, world_size, n)), 0.2)
    (2.5 * loss).backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [4, 36])
def test_several_ranks_are_one(gloo, world_size: int, name: str, n: int) -> None:
    model = network()
    expected = decoupled(model(torch.cat(images(n))), 0.2, LOSSES[name][1])
    (2.5 * expected).backward()
    results = gloo(world_size, step, n, name)
    assert len({value for value, _ in results}) == 1
    for value, gradients in results:
        assert value == pytest.approx(expected.item(), rel=1e-12)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert (gradient - parameter.grad).norm() <= 1e-10 * parameter.grad.norm()
