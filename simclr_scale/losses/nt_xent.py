"""NT-Xent, the normalised temperature-scaled cross-entropy of SimCLR: its definition and the dense engine.

Shapes: n images on this rank, W ranks, N = 2nW rows over all of them, d the width of an embedding.

For unit rows z and similarities S = z z' / temperature, with p(i) the other view of row i (SimCLR, eq. 1):

    loss_i = -log( exp(S_i,p(i)) / sum over j != i of exp(S_ij) ),   loss = mean over all N rows.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simclr_scale.distributed import all_gather, require_equal_across_ranks, world

Engine = Literal["auto", "dense", "tiled", "triton"]


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
    the loss alike (``loss * k`` with the same k everywhere).

    Args:
        z: (2n, d) projections of this rank, not normalised, rows [view 1 of n images; view 2 of the same].
            Half-precision input is computed in float32.
        temperature: tau > 0; the paper uses 0.1 for ImageNet and 0.5 for CIFAR-10.
        group: the data-parallel process group; None is the default group.
        gather: False takes negatives from this rank alone; the value is still the mean over all ranks.
        engine: "dense" holds the (2n, N) matrix of similarities; "auto" chooses by device and size.

    Returns:
        Scalar loss in float32 (float64 for float64 input).

    Raises:
        ValueError: on every rank, if ranks differ in n, rows are odd in number, or an argument is out of range.
    """
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[0] % 2:
        raise ValueError(f"z must be (2n, d) with rows [view 1; view 2] and n >= 1, got shape {tuple(z.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if engine not in ("auto", "dense"):
        raise ValueError(f"engine {engine!r} is not available in this version; use 'auto' or 'dense'")
    require_equal_across_ranks(z.shape[0], "number of rows in z (2n)", group)
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        return _DenseNTXent.apply(unit, temperature, group, gather)


class _DenseNTXent(torch.autograd.Function):
    """The loss of this rank's rows against all rows, holding the (2n, N) similarities.

    The positive is kept apart from the negatives: loss_i = softplus(log neg_i - pos_i) keeps its precision near
    convergence, where log-sum-exp minus the positive cancels.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, group: dist.ProcessGroup | None, gather: bool) -> Tensor:
        ranks = world(group)
        gather = gather and ranks.size > 1
        z_all = all_gather(z, group) if gather else z
        rows = z.shape[0]
        partner = _partners(rows, z.device)
        own = torch.arange(rows, device=z.device) + (ranks.rank * rows if gather else 0)
        own_partner = own - torch.arange(rows, device=z.device) + partner

        similarity = z @ z_all.T / temperature
        positive = (z * z[partner]).sum(1) / temperature
        similarity.scatter_(1, torch.stack([own, own_partner], 1), -torch.inf)
        log_negative = similarity.logsumexp(1)
        # softplus of the difference; F.softplus itself turns linear above 20, which costs float64 its digits.
        loss = -F.logsigmoid(positive - log_negative)

        log_sum = positive + loss
        log_sum_all = all_gather(log_sum, group) if gather else log_sum
        value = loss.mean()
        if ranks.size > 1:
            dist.all_reduce(value, group=group)
            value /= ranks.size

        ctx.save_for_backward(z, z_all, similarity, log_sum, log_sum_all, torch.sigmoid(log_negative - positive))
        ctx.temperature, ctx.group_size = temperature, ranks.size if gather else 1
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, z_all, similarity, log_sum, log_sum_all, not_chosen = ctx.saved_tensors
        rows = z.shape[0]
        partner = _partners(rows, z.device)
        # S is symmetric and p an involution, so row i of the gradient needs, beside its own probabilities, only those
        # that the other rows give to it: exp(S_ij - lse_j). Every rank has lse of all rows, hence no collective here.
        weights = (similarity - log_sum[:, None]).exp_() + (similarity - log_sum_all).exp_()
        dz = weights @ z_all - (not_chosen + not_chosen[partner])[:, None] * z[partner]
        # z_all holds W times the rows, whose mean the loss is; DDP divides the sum over ranks by W again.
        return grad * dz * (ctx.group_size / (z_all.shape[0] * ctx.temperature)), None, None, None


def _partners(rows: int, device: torch.device) -> Tensor:
    """Index of the other view of each row, for rows [view 1; view 2]."""
    return torch.arange(rows, device=device).roll(rows // 2)


@torch.no_grad()
def contrastive_accuracy(z: Tensor, *, group: dist.ProcessGroup | None = None, gather: bool = True) -> Tensor:
    """Share of this rank's rows that are closer to their other view than to any other row of the batch.

    Args:
        z: (2n, d) as for :func:`nt_xent`.

    Returns:
        Scalar in [0, 1], of this rank's rows; chance is 1 / (N - 1).
    """
    unit = F.normalize(z.float(), dim=1)
    ranks = world(group)
    gather = gather and ranks.size > 1
    with torch.autocast(z.device.type, enabled=False):  # in half precision a row is as close to many as to its own
        similarity = unit @ (all_gather(unit, group) if gather else unit).T
    rows = unit.shape[0]
    offset = ranks.rank * rows if gather else 0
    here = torch.arange(rows, device=z.device)
    similarity[here, here + offset] = -torch.inf
    return (similarity.argmax(1) == _partners(rows, z.device) + offset).float().mean()


class NTXentLoss(nn.Module):
    """Module form of :func:`nt_xent`; called as ``loss(z)`` with both views stacked, or as ``loss(z1, z2)``."""

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        group: dist.ProcessGroup | None = None,
        gather: bool = True,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature, self.group, self.gather, self.engine = temperature, group, gather, engine

    def forward(self, z: Tensor, z2: Tensor | None = None) -> Tensor:
        """z: (2n, d), or (n, d) beside z2 of the same shape."""
        if z2 is not None:
            if z.shape != z2.shape:
                raise ValueError(f"both views must have one shape, got {tuple(z.shape)} and {tuple(z2.shape)}")
            z = torch.cat([z, z2])
        return nt_xent(z, self.temperature, group=self.group, gather=self.gather, engine=self.engine)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather={self.gather}, engine={self.engine!r}"
