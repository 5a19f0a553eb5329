"""The decoupled contrastive loss: NT-Xent without the positive in its own denominator.

Source: Yeh et al., "Decoupled Contrastive Learning" (arXiv:2110.06848): the loss of section 3.1, with the weights of
section 3.2. Where NT-Xent's gradient fades as soon as a positive outweighs its negatives, which small batches reach
early, this one's does not.

With positives and negatives as in :mod:`simclr_scale.losses.nt_xent`,

    loss_i = -w_i S_i,p(i) + log( sum over j not in {i, p(i)} of exp(S_ij) ),   loss = mean over all N rows,

where w = 1 (DCL), or w falls where the views already agree (DCLW).
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.losses.contrast import ContrastiveLoss, RowTerms, contrast
from simclr_scale.losses.engines import Engine


def dcl(
    z: Tensor,
    temperature: float = 0.1,
    *,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    engine: Engine = "auto",
) -> Tensor:
    """Decoupled contrastive loss over the rows of all ranks; it can be negative.

    Arguments, value and gradients over ranks are as for :func:`nt_xent`.

    Raises:
        ValueError: as :func:`nt_xent`, and for a single image, which has no negatives.
    """
    return contrast(z, _decoupled, temperature, group=group, gather=gather, engine=engine)


def dclw(
    z: Tensor,
    temperature: float = 0.1,
    *,
    sigma: float = 0.5,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    engine: Engine = "auto",
) -> Tensor:
    """Decoupled contrastive loss with the negative von Mises-Fisher weighting of the positives.

    For image k of the B of all ranks, w_k = 2 - B softmax_k(<z1_k, z2_k> / sigma): the mean weight is 1, and pairs
    that agree less than others weigh more. The softmax is over the global batch (over this rank's with
    ``gather=False``), and the weights are constants to the gradient.

    Args:
        sigma: width of the weighting, above 0; the paper uses 0.5.

    Other arguments, value, gradients and errors are those of :func:`dcl`.
    """
    _require_sigma(sigma)
    weighted = partial(_weighted, temperature=temperature, sigma=sigma)
    return contrast(z, weighted, temperature, group=group, gather=gather, engine=engine)


class DCLLoss(ContrastiveLoss):
    """Module form of :func:`dcl`."""

    def row_loss(self, positive: Tensor, log_negative: Tensor) -> RowTerms:
        return _decoupled(positive, log_negative)


class DCLWLoss(ContrastiveLoss):
    """Module form of :func:`dclw`."""

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        sigma: float = 0.5,
        group: dist.ProcessGroup | None = None,
        gather: bool = True,
        engine: Engine = "auto",
    ) -> None:
        super().__init__(temperature, group=group, gather=gather, engine=engine)
        _require_sigma(sigma)
        self.sigma = sigma

    def row_loss(self, positive: Tensor, log_negative: Tensor) -> RowTerms:
        return _weighted(positive, log_negative, self.temperature, self.sigma)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sigma={self.sigma}"


def _decoupled(positive: Tensor, log_negative: Tensor) -> RowTerms:
    _require_negatives(positive)
    return RowTerms(log_negative - positive, log_sum=log_negative, pull=torch.ones_like(positive))


def _weighted(positive: Tensor, log_negative: Tensor, temperature: float, sigma: float) -> RowTerms:
    _require_negatives(positive)
    # Each image stands twice among the N rows: N times the softmax over them is B times the softmax over images.
    weight = 2 - len(positive) * torch.softmax(positive * (temperature / sigma), 0)
    return RowTerms(log_negative - weight * positive, log_sum=log_negative, pull=weight)


def _require_negatives(positive: Tensor) -> None:
    if len(positive) < 4:
        raise ValueError("the decoupled loss needs at least 2 images: a single one has no negatives")


def _require_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
