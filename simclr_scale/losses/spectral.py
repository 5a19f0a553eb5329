"""The spectral contrastive loss: features that factorise the graph of which views come from one image.

Source: HaoChen, Wei, Gaidon, Ma, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss"
(arXiv:2106.04156), eq. 6: -2 E[f(x) . f(x+)] + E[(f(x) . f(x'))^2], with x and x' of independent images. From n images
on all ranks, z and z' their views:

    loss = -2/n sum over i of z_i . z'_i + 1/(n (n - 1)) sum over i != j of (z_i . z'_j)^2,

which has that expectation at any n. The authors keep features within a ball of radius sqrt(mu), by shortening longer
ones, and divide the loss by mu (function D of models/spectral.py in jhaochenz96/spectral_contrastive_learning); mu is 1
in their recipe of CIFAR-10 and 10 in that of ImageNet. Without it the squares outgrow the agreement where features are
long: a head that ends in batch norm starts with lengths of sqrt(d).

The sum over all pairs is the inner product of the second moments of the two views,
so that memory and what is sent grow with d^2 and not with n^2.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.errors import InputError
from simclr_scale.losses.moments import PairLoss, require_images, sums_with_gradient, two_views


def spectral_contrastive(z: Tensor, mu: float | None = 1.0, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Spectral contrastive loss over the images of all ranks, with exact gradients: one collective forward.

    Args:
        z: (2n, d) projections of this rank, not normalised: their lengths carry meaning. Rows [view 1 of n images;
            view 2 of the same].
        mu: square of the largest length; longer rows are shortened to it. None: eq. 6 itself, with rows as they are.
        group: the ranks; None for all.

    Returns:
        Scalar loss in float32 (float64 for float64 input), the same on every rank; it can be negative.

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, there is a single image, or mu is not
            above 0.
    """
    _check(mu)
    z1, z2, images = two_views(z, group)
    require_images(images, 2, "the spectral contrastive loss")
    if mu is not None:
        z1, z2 = (_within_ball(each, mu) for each in (z1, z2))
    agreement = (z1 * z2).sum(1)
    parts = [agreement.sum() / images, agreement.square().sum(), z1.T @ z1, z2.T @ z2]
    pull, own, moment1, moment2 = sums_with_gradient(parts, group)
    loss = -2 * pull + ((moment1 * moment2).sum() - own) / (images * (images - 1))
    return loss if mu is None else loss / mu


def _within_ball(z: Tensor, mu: float) -> Tensor:
    """Rows longer than sqrt(mu), shortened to it."""
    radius = math.sqrt(mu)
    return z * (radius / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp(min=radius))


def _check(mu: float | None) -> None:
    if mu is not None and not 0 < mu < math.inf:
        raise InputError(f"mu must be above 0, or None for no bound, got {mu}")


class SpectralContrastiveLoss(PairLoss):
    """Module form of :func:`spectral_contrastive`.

    Args:
        mu: square of the largest length of a projection; None for no bound.
        group: the ranks; None for all.
    """

    def __init__(self, mu: float | None = 1.0, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        _check(mu)
        self.mu, self.group = mu, group

    def stacked(self, z: Tensor) -> Tensor:
        return spectral_contrastive(z, self.mu, group=self.group)

    def extra_repr(self) -> str:
        return f"mu={self.mu}"
