"""VICReg: views agree, every feature varies, no two features covary.

Source: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization" (arXiv:2105.04906), section 4,
with the factors of the authors' code (main_vicreg.py of facebookresearch/vicreg), whose coefficients are the reported
ones: it averages over features and views where the paper's formula sums. n images on all ranks, d features, C and C'
the covariances of the two views with n - 1 in the denominator:

    loss = l s + m v + c k,     s = mean of (z - z')^2 over images and features,
    v = (h(C) + h(C')) / 2,     h(C) = mean over j of max(0, 1 - sqrt(C_jj + eps)),
    k = (o(C) + o(C')) / d,     o(C) = sum of C_ij^2 over i != j.
"""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.losses.moments import PairLoss, centred, require_images, sums_with_gradient, two_views

_EPSILON = 1e-4


def vicreg(
    z: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """VICReg over the images of all ranks, with exact gradients: two collectives forward, none backward.

    Args:
        z: (2n, d) projections of this rank, not normalised, rows [view 1 of n images; view 2 of the same]. The paper's
            expander has d = 8192; memory and what is sent grow with d^2.
        invariance: l, the paper's default.
        variance: m, the paper's default.
        covariance: c, the paper's default.
        group: the ranks; None for all.

    Returns:
        Scalar loss in float32 (float64 for float64 input), the same on every rank.

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, or there is a single image.
    """
    z1, z2, images = two_views(z, group)
    require_images(images, 2, "VICReg")
    distance = (z1 - z2).square().sum() / z1.shape[1] / images
    z1, z2 = centred(z1, z2, images, group)
    parts = [distance, z1.T @ z1 / (images - 1), z2.T @ z2 / (images - 1)]
    distance, *covariances = sums_with_gradient(parts, group)
    loss = invariance * distance
    for matrix in covariances:
        diagonal = matrix.diagonal()
        loss = loss + variance / 2 * F.relu(1 - (diagonal + _EPSILON).sqrt()).mean()
        loss = loss + covariance * (matrix.square().sum() - diagonal.square().sum()) / len(matrix)
    return loss


class VICRegLoss(PairLoss):
    """Module form of :func:`vicreg`."""

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.invariance, self.variance, self.covariance, self.group = invariance, variance, covariance, group

    def stacked(self, z: Tensor) -> Tensor:
        return vicreg(z, self.invariance, self.variance, self.covariance, group=self.group)

    def extra_repr(self) -> str:
        return f"invariance={self.invariance}, variance={self.variance}, covariance={self.covariance}"
