"""What losses of batch moments share: sums over all ranks that gradients go through.

A loss of moments is L(m), m = sum over ranks of m_r(z_r). Every rank computes the same L from the same m, so the
gradient of m is known on each without asking, and that of z_r is it times d m_r / d z_r. DistributedDataParallel then
averages gradients over W ranks, for which the sum makes up with a factor W. As for NT-Xent, every rank must scale the
loss alike; and what m_r is of must not depend on other ranks, or the gradient of m would differ between them.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_scale.distributed import require_equal_across_ranks, world


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.size = world(group).size
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient * ctx.size, None


def sums_with_gradient(parts: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Sums of tensors over all ranks, in one collective; their gradients, averaged over ranks, are those of the sums.

    Nothing is sent in the backward pass.
    """
    if world(group).size == 1:
        return parts
    total = _SumOverRanks.apply(torch.cat([part.flatten() for part in parts]), group)
    sums = total.split([part.numel() for part in parts])
    return [one.view(part.shape) for one, part in zip(sums, parts, strict=True)]


def two_views(z: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, int]:
    """Both views (n, d) of this rank, in float32 or float64, and the number of images on all ranks.

    Raises:
        ValueError: on every rank, if `z` is not (2n, d) of floating point, or ranks differ in n.
    """
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[0] % 2:
        raise ValueError(f"z must be (2n, d) with rows [view 1; view 2] and n >= 1, got shape {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    require_equal_across_ranks(z.shape[0], "number of rows in z (2n)", group)
    z1, z2 = (z if z.dtype == torch.float64 else z.float()).chunk(2)
    return z1, z2, len(z1) * world(group).size


def centred(z1: Tensor, z2: Tensor, images: int, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Both views less their means over all ranks, for second moments that do not cancel.

    The means are constants to the gradient: a second moment about the mean does not change with it to first order.
    """
    with torch.no_grad():
        mean1, mean2 = sums_with_gradient([z1.sum(0) / images, z2.sum(0) / images], group)
    return z1 - mean1, z2 - mean2


def require_images(images: int, least: int, what: str) -> None:
    """Raises ValueError where a batch is too small for `what`."""
    if images < least:
        raise ValueError(f"{what} needs at least {least} images in the global batch, got {images}")


class PairLoss(nn.Module, ABC):
    """Called as ``loss(z)`` with both views stacked, (2n, d), or as ``loss(z1, z2)``."""

    @abstractmethod
    def stacked(self, z: Tensor) -> Tensor:
        """The loss of the rows [view 1; view 2]."""

    def forward(self, z: Tensor, z2: Tensor | None = None) -> Tensor:
        if z2 is not None and z2.shape != z.shape:
            raise ValueError(f"both views must have one shape, got {tuple(z.shape)} and {tuple(z2.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            return self.stacked(z if z2 is None else torch.cat([z, z2]))
