"""The spectral contrastive loss: features that factorise the graph of which views come from one image.

Source: HaoChen, Wei, Gaidon, Ma, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss"
(arXiv:2106.04156), eq. 6: -2 E[f(x) . f(x+)] + E[(f(x) . f(x'))^2], with x and x' of independent images. From n images
on all ranks, z and z' their views:

    loss = -2/n sum over i of z_i . z'_i + 1/(n (n - 1)) sum over i != j of (z_i . z'_j)^2,

which has that expectation at any n. The sum over all pairs is the inner product of the second moments of the two views,
so that memory and what is sent grow with d^2 and not with n^2.
"""

import torch.distributed as dist
from torch import Tensor

from simclr_scale.losses.moments import PairLoss, require_images, sums_with_gradient, two_views


def spectral_contrastive(z: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Spectral contrastive loss over the images of all ranks, with exact gradients: one collective forward.

    Args:
        z: (2n, d) projections of this rank, not normalised: their lengths carry meaning. Rows [view 1 of n images;
            view 2 of the same].
        group: the ranks; None for all.

    Returns:
        Scalar loss in float32 (float64 for float64 input), the same on every rank; it can be negative.

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, or there is a single image.
    """
    z1, z2, images = two_views(z, group)
    require_images(images, 2, "the spectral contrastive loss")
    agreement = (z1 * z2).sum(1)
    parts = [agreement.sum() / images, agreement.square().sum(), z1.T @ z1, z2.T @ z2]
    pull, own, moment1, moment2 = sums_with_gradient(parts, group)
    return -2 * pull + ((moment1 * moment2).sum() - own) / (images * (images - 1))


class SpectralContrastiveLoss(PairLoss):
    """Module form of :func:`spectral_contrastive`."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group

    def stacked(self, z: Tensor) -> Tensor:
        return spectral_contrastive(z, group=self.group)
