"""LARS on the CPU: tensor after tensor, with as few passes over memory as torch's operations allow.

The cost is that of reading memory. A step of a tensor takes two passes: one reads parameter and gradient for their
norms, in pieces whose intermediate results stay in cache; the other reads them again with the momentum buffer and
writes parameter and buffer, in one operation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simclr_scale.optim.lars_rule import Rule

# Elements of a piece. Smaller ones fit a nearer cache, but on a ResNet-50 the calls then cost more than that saves.
_PIECE = 1 << 18

# torch.linalg.vector_norm adds float32 squares up in sequence, in 8 or 16 lanes, and is off by up to 1e-3 at the
# 2.4 million weights of a ResNet's 3x3 convolution. Over rows as short as this it errs by less than 1e-7 (weights that
# are all the same, the worst case), and the norms of the rows are then added in float64.
_ROW = 256


def update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    rule: Rule,
    sum_over_shards: Callable[[Tensor], None] | None = None,
) -> None:
    """One step of CPU tensors, in place.

    Args:
        parameters: Vectors, all float32 or all float64, each contiguous.
        gradients: Of the same sizes and type.
        buffers: Likewise; empty where the momentum is 0.
        rule: The settings.
        sum_over_shards: Where the vectors are shards of larger tensors: turns sums of squares over the shards, float64,
            into those over the whole tensors, in place.
    """
    lr = float(rule.lr)
    if not rule.adapt:
        _move(parameters, gradients, buffers, rule, lr)
        return
    scratch = torch.empty(_PIECE, dtype=parameters[0].dtype) if rule.weight_decay != 0 else None
    if sum_over_shards is None:
        # Each tensor moves as soon as its norms are known, while it may still be in cache.
        for index, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
            rate = lr * _trust_ratio(*_norms(p, g, rule.weight_decay, scratch), rule.trust_coefficient)
            _move([p], [g], buffers[index : index + 1], rule, rate)
        return
    norms = [_norms(p, g, rule.weight_decay, scratch) for p, g in zip(parameters, gradients, strict=True)]
    squares = torch.tensor(norms, dtype=torch.float64).square()
    sum_over_shards(squares)
    for index, (p_norm, g_norm) in enumerate(squares.sqrt().tolist()):
        rate = lr * _trust_ratio(p_norm, g_norm, rule.trust_coefficient)
        _move([parameters[index]], [gradients[index]], buffers[index : index + 1], rule, rate)


def _trust_ratio(p_norm: float, g_norm: float, trust_coefficient: float) -> float:
    return trust_coefficient * p_norm / g_norm if p_norm > 0 and g_norm > 0 else 1.0


def _norms(p: Tensor, g: Tensor, weight_decay: float, scratch: Tensor | None) -> tuple[float, float]:
    """The norms of the parameter and of its gradient with weight decay."""
    # ||g + wd p||^2 from ||g||^2, <g, p> and ||p||^2 would need no scratch, but cancels where g is near -wd p.
    p_parts, g_parts = [], []
    for p_piece, g_piece in zip(p.split(_PIECE), g.split(_PIECE), strict=True):
        if scratch is not None:
            g_piece = torch.add(g_piece, p_piece, alpha=weight_decay, out=scratch[: g_piece.numel()])
        p_parts += _row_norms(p_piece)
        g_parts += _row_norms(g_piece)
    return _norm_of(p_parts), _norm_of(g_parts)


def _row_norms(x: Tensor) -> list[Tensor]:
    rest = x.numel() % _ROW
    rows = x.numel() // _ROW
    if rest == 0:
        return [torch.linalg.vector_norm(x.view(rows, _ROW), 2, 1)]
    head, tail = x[: rows * _ROW], x[rows * _ROW :]
    return [torch.linalg.vector_norm(head.view(rows, _ROW), 2, 1), torch.linalg.vector_norm(tail, 2, 0, keepdim=True)]


def _norm_of(norms: list[Tensor]) -> float:
    together = norms[0] if len(norms) == 1 else torch.cat(norms)
    return float(torch.linalg.vector_norm(together, dtype=torch.float64))


def _move(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], rule: Rule, rate: float
) -> None:
    """v = momentum v + rate (g + weight_decay p); p = p - v."""
    if not _move_by_fused_sgd(parameters, gradients, buffers, rule, rate):
        _move_by_public_operations(parameters, gradients, buffers, rule, rate)


def _move_by_fused_sgd(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], rule: Rule, rate: float
) -> bool:
    """Everything in one pass, by the private operation behind torch.optim.SGD(fused=True); false: not possible.

    It computes v = momentum v + (1 - dampening) g', p = p - lr v: with lr 1 and dampening 1 - rate the rate is inside
    the buffer. The difference is taken in double precision, where it gives the rate back but for the last bits of a
    small one: enough for float32 at any rate above 1e-8, rarely for float64.
    """
    fused_sgd = getattr(torch, "_fused_sgd_", None)
    if fused_sgd is None or (rule.nesterov and buffers):  # its look-ahead adds a gradient without the dampening
        return False
    lr, dampening = (1.0, 1.0 - rate) if buffers else (rate, 0.0)
    if buffers and not abs((1.0 - dampening) - rate) <= torch.finfo(parameters[0].dtype).eps / 16 * rate:
        return False
    fused_sgd(
        parameters,
        gradients,
        buffers,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=lr,
        dampening=dampening,
        nesterov=rule.nesterov,
        maximize=False,
        is_first_step=False,
    )
    return True


def _move_by_public_operations(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor], rule: Rule, rate: float
) -> None:
    for index, parameter in enumerate(parameters):
        pieces = [x.split(_PIECE) for x in (parameter, gradients[index], *buffers[index : index + 1])]
        for p, g, *v in zip(*pieces, strict=True):
            step = torch.add(g, p, alpha=rule.weight_decay).mul_(rate)
            if v:
                v[0].mul_(rule.momentum).add_(step)
                step = step.add_(v[0], alpha=rule.momentum) if rule.nesterov else v[0]
            p.sub_(step)
