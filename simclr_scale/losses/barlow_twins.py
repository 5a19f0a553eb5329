"""Barlow Twins: the cross-correlation of the two views' features is to be the identity.

Source: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv:2103.03230), eq. 1
and 2, with lambda .0051 of the authors' code (main.py of facebookresearch/barlowtwins; the paper says .005). n images
on all ranks; z and z' with every feature standardised over them (biased variance, eps 1e-5, as batch norm does):

    c_ij = mean over images of z_i z'_j,     loss = sum over i of (1 - c_ii)^2 + lambda * sum over i != j of c_ij^2.
"""

import torch.distributed as dist
from torch import Tensor

from simclr_scale.losses.moments import PairLoss, centred, require_images, sums_with_gradient, two_views

_EPSILON = 1e-5


def barlow_twins(z: Tensor, redundancy: float = 0.0051, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Barlow Twins over the images of all ranks, with exact gradients: two collectives forward, none backward.

    Args:
        z: (2n, d) projections of this rank, not normalised, rows [view 1 of n images; view 2 of the same]. The paper's
            projector has d = 8192; memory and what is sent grow with d^2.
        redundancy: lambda, the weight of what is off the diagonal.
        group: the ranks; None for all.

    Returns:
        Scalar loss in float32 (float64 for float64 input), the same on every rank.

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, or there is a single image.
    """
    z1, z2, images = two_views(z, group)
    require_images(images, 2, "Barlow Twins")
    z1, z2 = centred(z1, z2, images, group)
    parts = [z1.T @ z2 / images, z1.square().sum(0) / images, z2.square().sum(0) / images]
    product, variance1, variance2 = sums_with_gradient(parts, group)
    correlation = product * (variance1 + _EPSILON).rsqrt()[:, None] * (variance2 + _EPSILON).rsqrt()
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + redundancy * off_diagonal


class BarlowTwinsLoss(PairLoss):
    """Module form of :func:`barlow_twins`."""

    def __init__(self, redundancy: float = 0.0051, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.redundancy, self.group = redundancy, group

    def stacked(self, z: Tensor) -> Tensor:
        return barlow_twins(z, self.redundancy, group=self.group)

    def extra_repr(self) -> str:
        return f"redundancy={self.redundancy}"
