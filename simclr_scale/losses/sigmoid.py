"""The sigmoid loss of SigLIP on two views: every pair of images is a question of its own, same or not.

Source: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343), section 3.2
and algorithm 1. n images on all ranks, z and z' the unit rows of their views:

    loss = -1/n sum over i, j of log sigmoid( y_ij (t z_i . z'_j + b) ),     y_ij = 1 where i = j, else -1,

with t = exp(t') and b learned, from 10 and -10 on. (There the two views are image and text.)
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.distributed import all_gather, world
from simclr_scale.errors import InputError
from simclr_scale.losses.moments import PairLoss, two_views

# Rows of pairs that are held at a time.
_BLOCK = 1024


def sigmoid_pairs(z: Tensor, scale: Tensor, bias: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sigmoid loss over all pairs of images of all ranks, with exact gradients and none of the n x n pairs kept.

    One gather, and one sum of one number, forward; nothing backward. Each rank takes its rows of both views against all
    of the other view, which is twice the arithmetic, and so has its whole gradient without asking.

    Args:
        z: (2n, d) projections of this rank, not normalised, rows [view 1 of n images; view 2 of the same].
        scale: t > 0, a scalar.
        bias: b, a scalar.
        group: the ranks; None for all.

    Returns:
        Scalar loss in float32 (float64 for float64 input), the same on every rank. Its gradients, averaged over ranks,
        are those of that value, for `scale` and `bias` too. There are no second derivatives.

    Raises:
        ValueError: on every rank, if ranks differ in n or rows are odd in number.
    """
    z1, z2, _ = two_views(z, group)
    scale, bias = scale.to(z1.dtype), bias.to(z1.dtype)
    return _SigmoidPairs.apply(F.normalize(z1, dim=1), F.normalize(z2, dim=1), scale, bias, group)


class _SigmoidPairs(torch.autograd.Function):
    """With all gradients found in the forward pass, as the pairs are not kept."""

    @staticmethod
    def forward(
        ctx: Any, u1: Tensor, u2: Tensor, scale: Tensor, bias: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        ranks = world(group)
        count = len(u1)
        images, first = count * ranks.size, count * ranks.rank
        every1, every2 = all_gather(torch.cat([u1, u2], dim=1), group).chunk(2, dim=1)
        loss, d_scale, d_bias, d_u1 = _rows(u1, every2, scale, bias, first)
        _, _, _, d_u2 = _rows(u2, every1, scale, bias, first)
        if ranks.size > 1:
            dist.all_reduce(loss, group=group)
        # The mean of gradients over ranks is to be that of the whole.
        share = ranks.size / images
        ctx.save_for_backward(d_u1 * share, d_u2 * share, d_scale * share, d_bias * share)
        return loss / images

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return (*(gradient * saved for saved in ctx.saved_tensors), None)


def _rows(u: Tensor, others: Tensor, scale: Tensor, bias: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over some rows of pairs, and its gradients for scale, bias and the rows (n, d).

    Row i of `u` is of the same image as row `first + i` of `others`.
    """
    loss, d_scale, d_bias = (u.new_zeros(()) for _ in range(3))
    d_u = torch.empty_like(u)
    for start in range(0, len(u), _BLOCK):
        block = u[start : start + _BLOCK]
        similarity = block @ others.T
        logits = similarity * scale + bias
        same = torch.arange(len(block), device=u.device)
        # -log sigmoid(-x) of all pairs, then the sign turned where the image is the same: the difference is -x.
        loss += F.softplus(logits).sum() - logits[same, first + start + same].sum()
        d_logits = torch.sigmoid(logits)
        d_logits[same, first + start + same] -= 1
        d_scale += (d_logits * similarity).sum()
        d_bias += d_logits.sum()
        d_u[start : start + _BLOCK] = scale * (d_logits @ others)
    return loss, d_scale, d_bias, d_u


class SigmoidLoss(PairLoss):
    """Module form of :func:`sigmoid_pairs` with scale and bias to learn.

    Args:
        scale: t at the start.
        bias: b at the start: as nearly all pairs are of different images, the loss is to begin near that.
        group: the ranks; None for all.
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not scale > 0:
            raise InputError(f"scale must be above 0, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.group = group

    def stacked(self, z: Tensor) -> Tensor:
        return sigmoid_pairs(z, self.log_scale.exp(), self.bias, group=self.group)

    def extra_repr(self) -> str:
        return f"scale={self.log_scale.exp().item():.4g}, bias={self.bias.item():.4g}"
