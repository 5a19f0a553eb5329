"""Negatives within groups: against a loop over the groups, on one rank and several."""

import pytest
import torch

from simclr_scale.errors import InputError
from simclr_scale.losses import BarlowTwinsLoss, DCLLoss, GroupedNegatives, NTXentLoss, couples_ranks, nt_xent
from tests.gloo_pool import GlooPool


def projections(images: int) -> torch.Tensor:
    return torch.randn(2 * images, 5, generator=torch.Generator().manual_seed(images), dtype=torch.float64)


def by_a_loop(z: torch.Tensor, group: int) -> torch.Tensor:
    """The definition, with softmax cross-entropy over each group's own rows."""
    n = len(z) // 2
    losses = []
    for first in range(0, n, group):
        rows = torch.cat([z[first : first + group], z[n + first : n + first + group]])
        unit = torch.nn.functional.normalize(rows, dim=1)
        logits = (unit @ unit.T / 0.3).fill_diagonal_(-torch.inf)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.arange(2 * group).roll(group)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("images", "group"), [(6, 2), (12, 3), (8, 8)])
def test_value_and_gradient_are_those_of_a_loop(images: int, group: int) -> None:
    z = projections(images).requires_grad_()
    expected = by_a_loop(z, group)
    (gradient,) = torch.autograd.grad(expected, z)
    value = GroupedNegatives(NTXentLoss(0.3), group)(z)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], gradient, rtol=1e-9, atol=1e-12)
    two = GroupedNegatives(NTXentLoss(0.3), group)(*z.chunk(2))
    torch.testing.assert_close(two, expected, rtol=1e-12, atol=0)


def test_other_groups_do_not_matter() -> None:
    z = projections(6)
    changed = z.clone()
    changed[[4, 5, 10, 11]] = 7.0
    loss = GroupedNegatives(NTXentLoss(0.3), 2)
    own = z.requires_grad_()
    first = torch.autograd.grad(loss(own), own)[0][[0, 1, 6, 7]]
    other = changed.requires_grad_()
    assert torch.equal(torch.autograd.grad(loss(other), other)[0][[0, 1, 6, 7]], first)
    assert not torch.allclose(nt_xent(z, 0.3), loss(z))


def on_ranks(rank: int, world_size: int, group: int) -> tuple[float, torch.Tensor]:
    images = 8 // world_size
    z = projections(8).view(2, 8, -1)[:, rank * images : (rank + 1) * images].reshape(2 * images, -1)
    z = z.clone().requires_grad_()
    value = GroupedNegatives(NTXentLoss(0.3), group)(z)
    (gradient,) = torch.autograd.grad(value, z)
    return float(value.detach()), gradient.view(2, images, -1) / world_size


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("group", [2, 8])
def test_ranks_have_the_value_and_gradient_of_one(ranks: int, group: int, gloo: GlooPool) -> None:
    z = projections(8).requires_grad_()
    expected = by_a_loop(z, group)
    (gradient,) = torch.autograd.grad(expected, z)
    outcomes = gloo(ranks, on_ranks, group)
    for value, _ in outcomes:
        assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    together = torch.cat([part for _, part in outcomes], dim=1).reshape(16, -1)
    torch.testing.assert_close(together, gradient, rtol=1e-9, atol=1e-12)


def spanning(rank: int, world_size: int) -> str:
    with pytest.raises(InputError) as caught:
        GroupedNegatives(NTXentLoss(0.3), 4)(projections(2))
    return str(caught.value)


def test_groups_that_are_no_division(gloo: GlooPool) -> None:
    with pytest.raises(InputError, match="a batch of 6 images does not divide into groups of 4"):
        GroupedNegatives(NTXentLoss(), 4)(projections(6))
    with pytest.raises(InputError, match="needs 2 images at least, got 1"):
        GroupedNegatives(NTXentLoss(), 1)
    with pytest.raises(InputError, match="BarlowTwinsLoss has no negatives"):
        GroupedNegatives(BarlowTwinsLoss(), 4)
    for message in gloo(4, spanning):
        assert message == "negatives: a batch of 8 images, 4 ranks of 2 does not divide into groups of 4"


def test_whose_ranks_hang_together() -> None:
    assert couples_ranks(NTXentLoss())
    assert couples_ranks(BarlowTwinsLoss())
    assert not couples_ranks(DCLLoss(gather=False))
    assert not couples_ranks(GroupedNegatives(NTXentLoss(), 4))
