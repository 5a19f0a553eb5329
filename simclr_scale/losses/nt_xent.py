"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR.

Shapes: n images on this rank, W ranks, N = 2nW rows over all of them, d the width of an embedding.

For unit rows z and similarities S = z z' / temperature, with p(i) the other view of row i (SimCLR, eq. 1):

    loss_i = -log( exp(S_i,p(i)) / sum over j != i of exp(S_ij) ),   loss = mean over all N rows.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.losses.contrast import ContrastiveLoss, RowTerms, contrast
from simclr_scale.losses.engines import Engine


def nt_xent(
    z: Tensor,
    temperature: float = 0.1,
    *,
    group: dist.ProcessGroup | None = None,
    gather: bool = True,
    engine: Engine = "auto",
) -> Tensor:
    """NT-Xent loss (Chen et al. 2020, eq. 1) with negatives from all ranks and exact gradients.

    The value is the mean over the global batch and the same on every rank. Its gradients, averaged over ranks as
    DistributedDataParallel does, are the gradients of that one value. This takes for granted that every rank scales
    the loss alike (``loss * k`` with the same k everywhere). There are no second derivatives.

    Args:
        z: (2n, d) projections of this rank, not normalised, rows [view 1 of n images; view 2 of the same].
            Half-precision input is computed in float32, also under autocast; only the engine "triton" multiplies
            bfloat16 rows as such.
        temperature: tau > 0; the paper uses 0.1 for ImageNet and 0.5 for CIFAR-10.
        group: the data-parallel process group; None is the default group.
        gather: False takes negatives from this rank alone; the value is still the mean over all ranks.
        engine: "tiled" and "triton" (CUDA devices with Triton) have memory linear in the batch, "dense" holds the
            (2n, N) matrix of similarities; "auto" is "triton" where that runs, else "tiled".

    Returns:
        Scalar loss in float32 (float64 for float64 input).

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, or an argument is out of range.
        InputError: engine "triton" where it cannot run.
    """
    return contrast(z, _cross_entropy, temperature, group=group, gather=gather, engine=engine)


def _cross_entropy(positive: Tensor, log_negative: Tensor) -> RowTerms:
    # The positive is kept apart from the negatives: softplus(log_negative - positive) keeps its precision near
    # convergence, where log-sum-exp minus the positive cancels. F.softplus itself turns linear above 20, which costs
    # float64 its digits.
    loss = -F.logsigmoid(positive - log_negative)
    return RowTerms(loss, log_sum=positive + loss, pull=torch.sigmoid(log_negative - positive))


class NTXentLoss(ContrastiveLoss):
    """Module form of :func:`nt_xent`; called as ``loss(z)`` with both views stacked, or as ``loss(z1, z2)``."""

    def row_loss(self, positive: Tensor, log_negative: Tensor) -> RowTerms:
        return _cross_entropy(positive, log_negative)
