"""What NT-Xent and its relatives share: one value over all ranks, with exact gradients and no collective in backward.

A loss of this family compares the positive of a row with the sum over its negatives:

    positive_i = S_i,p(i),   log_negative_i = log( sum over j not in {i, p(i)} of exp(S_ij) ),
    loss = mean over all N rows of l(positive_i, log_negative_i).

The chain rule, with S symmetric and p an involution, gives the gradient of row i in closed form: the negatives push it
away by exp(S_ij - log_sum_i) + exp(S_ij - log_sum_j), its other view pulls with pull_i + pull_p(i). Beside the rows
themselves that takes one number a row from the other ranks, known after the forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_scale.distributed import all_gather, require_equal_across_ranks, world
from simclr_scale.losses import engines
from simclr_scale.losses.engines import Engine

# As torch.nn.functional.normalize: a row of zeros stays one.
_SMALLEST_NORM = 1e-12


class RowTerms(NamedTuple):
    """What a loss makes of its rows, each (N,)."""

    loss: Tensor
    # d loss / d log_negative = exp(log_negative - log_sum)
    log_sum: Tensor
    # -d loss / d positive
    pull: Tensor


# (positive, log_negative), both (N,), -> RowTerms
RowLoss = Callable[[Tensor, Tensor], RowTerms]


def contrast(
    z: Tensor,
    row_loss: RowLoss,
    temperature: float,
    *,
    group: dist.ProcessGroup | None,
    gather: bool,
    engine: Engine,
) -> Tensor:
    """The mean of ``row_loss`` over the rows of all ranks; the arguments are those of :func:`nt_xent`."""
    if z.dim() != 2 or z.shape[0] < 2 or z.shape[0] % 2:
        raise ValueError(f"z must be (2n, d) with rows [view 1; view 2] and n >= 1, got shape {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    _require_temperature(temperature)
    chosen = engines.choose(engine, z.device)
    require_equal_across_ranks(z.shape[0], "number of rows in z (2n)", group)
    return _Contrast.apply(z, row_loss, temperature, group, gather, chosen)


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


class ContrastiveLoss(nn.Module, ABC):
    """Module form of these losses; called as ``loss(z)`` with both views stacked, or as ``loss(z1, z2)``."""

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        group: dist.ProcessGroup | None = None,
        gather: bool = True,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        _require_temperature(temperature)
        self.temperature, self.group, self.gather, self.engine = temperature, group, gather, engine

    @abstractmethod
    def row_loss(self, positive: Tensor, log_negative: Tensor) -> RowTerms:
        """As `RowLoss`."""

    def forward(self, z: Tensor, z2: Tensor | None = None) -> Tensor:
        """z: (2n, d), or (n, d) beside z2 of the same shape."""
        if z2 is not None:
            if z.shape != z2.shape:
                raise ValueError(f"both views must have one shape, got {tuple(z.shape)} and {tuple(z2.shape)}")
            z = torch.cat([z, z2])
        return contrast(z, self.row_loss, self.temperature, group=self.group, gather=self.gather, engine=self.engine)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather={self.gather}, engine={self.engine!r}"


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        row_loss: RowLoss,
        temperature: float,
        group: dist.ProcessGroup | None,
        gather: bool,
        engine: str,
    ) -> Tensor:
        ranks = world(group)
        gather = gather and ranks.size > 1
        rows, n = len(u), len(u) // 2
        first = ranks.rank * rows if gather else 0
        with torch.autocast(u.device.type, enabled=False):
            # Gathered as they came, normalised here: bfloat16 rows travel in 2 bytes and lose nothing on the way.
            u_all = all_gather(u, group) if gather else u
            wide = u_all.to(torch.promote_types(u.dtype, torch.float32))
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(_SMALLEST_NORM)
            z_all = wide / norm
            view1, view2 = z_all.view(-1, 2, n, z_all.shape[1]).unbind(1)
            positive = (view1 * view2).sum(-1).div_(temperature)[:, None].expand(-1, 2, n).reshape(-1)

            operand = _operand(z_all, u.dtype, engine)
            log_negative = engines.log_negatives(operand[first : first + rows], operand, first, temperature, engine)
            if gather:
                log_negative = all_gather(log_negative, group)
            terms = row_loss(positive, log_negative)
            value = terms.loss.mean()
        if ranks.size > 1 and not gather:
            dist.all_reduce(value, group=group)
            value /= ranks.size

        ctx.save_for_backward(u, z_all, norm[first : first + rows], terms.log_sum, terms.pull)
        ctx.temperature, ctx.engine, ctx.first = temperature, engine, first
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        u, z_all, norm, log_sum, pull = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
            own = slice(ctx.first, ctx.first + len(u))
            z, n = z_all[own], len(u) // 2
            operand = _operand(z_all, u.dtype, ctx.engine)
            dz = engines.repulsion(operand[own], operand, ctx.first, ctx.temperature, log_sum[own], log_sum, ctx.engine)
            # Both views of an image are pulled alike. The sum of a row and its partner is the same for both.
            both = pull[own].view(2, n).sum(0)[:, None]
            dz[:n].addcmul_(both, z[n:], value=-1)
            dz[n:].addcmul_(both, z[:n], value=-1)
            # DistributedDataParallel divides the sum over ranks by W; the mean is over all N rows.
            share = len(z_all) // len(u)
            dz *= grads[0] * (share / (len(z_all) * ctx.temperature))
            # Through the normalisation: the part along the row falls away, the rest is divided by its length.
            dz.addcmul_(z, (dz * z).sum(1, keepdim=True), value=-1).div_(norm)
            du = dz.to(u.dtype)
        if torch.is_grad_enabled():
            du = _FirstOrder.apply(du, u)
        return du, None, None, None, None, None


class _FirstOrder(torch.autograd.Function):
    """A gradient that says so when someone differentiates it again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, u: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the contrastive losses have no second derivatives: their gradient is computed in closed form. For a "
            "penalty on it, write the loss with torch's own operations on a small batch"
        )


def _operand(z_all: Tensor, given: torch.dtype, engine: str) -> Tensor:
    """The rows as an engine multiplies them: tensor cores take bfloat16 where that is what the caller had."""
    return z_all.to(given) if engine == "triton" and given == torch.bfloat16 else z_all
