"""Negatives within groups of a fixed size: the batch of the optimizer and the number of negatives apart.

A contrastive loss takes its negatives from the batch, so that a larger batch is two changes at once: more images under
one step of the optimizer, and a harder task. Here a batch of k * m images is k tasks of m images each,

    loss = 1/k sum over groups g of loss(images of g),

so k varies the batch of the optimizer at a fixed task, and m the task. (Batch norm of an encoder still sees all of
them.)
"""

import copy

import torch
from torch import Tensor, nn

from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.losses.contrast import ContrastiveLoss


class GroupedNegatives(nn.Module):
    """A contrastive loss whose negatives come from groups of ``images`` images, in the order of the batch.

    Each rank holds whole groups, unless one group is the global batch. Value and gradients over ranks are as for
    :func:`nt_xent`.

    Args:
        loss: ``NTXentLoss`` or a relative of it; it is left as it is.
        images: m, in a group; each view then has 2(m - 1) negatives.

    Raises:
        InputError: fewer than two images, which have no negatives; a loss that is no sum over such comparisons; a
            batch of which groups of m are no division.
    """

    def __init__(self, loss: nn.Module, images: int) -> None:
        super().__init__()
        if images < 2:
            raise InputError(f"negatives: a group needs 2 images at least, got {images}")
        if not isinstance(loss, ContrastiveLoss):
            raise InputError(
                f"negatives: {type(loss).__name__} has no negatives to take from groups; NTXentLoss and DCLLoss have"
            )
        self.images = images
        self.whole = loss
        self.within = copy.copy(loss)
        self.within.gather = False

    def forward(self, z: Tensor, z2: Tensor | None = None) -> Tensor:
        """z: (2n, d), rows [view 1 of n images; view 2 of the same] of this rank, or (n, d) beside z2."""
        if z2 is not None:
            z = torch.cat([z, z2])
        n, ranks = len(z) // 2, world(self.whole.group).size
        if self.whole.gather and self.images == n * ranks:
            return self.whole(z)
        if len(z) % 2 or n % self.images:
            shares = f", {ranks} ranks of {n}" if ranks > 1 else ""
            raise InputError(
                f"negatives: a batch of {n * ranks} images{shares} does not divide into groups of {self.images}"
            )
        # (2, n, d) -> (groups, 2m, d), each [view 1; view 2] of its images
        groups = z.view(2, n // self.images, self.images, -1).transpose(0, 1).reshape(-1, 2 * self.images, z.shape[1])
        return torch.stack([self.within(group) for group in groups]).mean()

    def extra_repr(self) -> str:
        return f"images={self.images}"


def couples_ranks(loss: nn.Module) -> bool:
    """Whether a loss of this package compares the images of one rank with those of others.

    Its global value is then no mean over ranks of what each could compute alone.
    """
    if isinstance(loss, GroupedNegatives):
        return False
    return not (isinstance(loss, ContrastiveLoss) and not loss.gather)
