"""LARS on an accelerator: all tensors of a list in a handful of kernels, and nothing that waits for the device.

Every value stays on the device, a learning rate that is a tensor included, and no branch depends on one: a step can be
captured in a CUDA graph and replayed under a schedule that runs inside the graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from simclr_scale.optim.lars_rule import Rule

Tensors = list[Tensor] | tuple[Tensor, ...]

_HAVE_FUSED_SGD = ("cuda", "cpu")


def update(
    parameters: Tensors,
    gradients: Tensors,
    buffers: Tensors,
    rule: Rule,
    sum_over_shards: Callable[[Tensor], None] | None = None,
) -> None:
    """One step of the tensors of one device, in place.

    Args:
        parameters: Vectors, all float32 or all float64, each contiguous.
        gradients: Of the same sizes and type.
        buffers: Likewise; empty where the momentum is 0.
        rule: The settings. A learning rate that is a tensor has no dimensions.
        sum_over_shards: Where the vectors are shards of larger tensors: turns sums of squares over the shards, float64,
            into those over the whole tensors, in place.
    """
    lr = rule.lr
    if isinstance(lr, Tensor):
        # One on the host can be read without waiting; it acts as a number would.
        lr = lr.item() if lr.device.type == "cpu" else lr.to(parameters[0].device, parameters[0].dtype)
    # Of the weight decayed gradients there is a copy to work in, made here or by the first product with the rates.
    steps = gradients
    if rule.weight_decay != 0:
        steps = torch._foreach_add(gradients, parameters, alpha=rule.weight_decay)
    multiply = torch._foreach_mul if steps is gradients else torch._foreach_mul_
    if rule.adapt:
        ratios = _trust_ratios(parameters, steps, rule.trust_coefficient, sum_over_shards)
        steps = multiply(steps, (ratios * lr).unbind())
    else:
        steps = multiply(steps, lr)
    _move(parameters, steps, buffers, rule)


def _trust_ratios(
    parameters: Tensors,
    gradients: Tensors,
    trust_coefficient: float,
    sum_over_shards: Callable[[Tensor], None] | None,
) -> Tensor:
    """The factors on the learning rate, one a tensor, on their device."""
    norms = torch.stack(torch._foreach_norm([*parameters, *gradients])).view(2, -1)
    if sum_over_shards is not None:
        squares = norms.double().square()
        sum_over_shards(squares)
        norms = squares.sqrt().to(norms.dtype)
    p_norms, g_norms = norms
    ratios = trust_coefficient * p_norms / g_norms
    return torch.where((p_norms > 0) & (g_norms > 0), ratios, 1.0)


def _move(parameters: Tensors, steps: Tensors, buffers: Tensors, rule: Rule) -> None:
    """v = momentum v + step; p = p - v."""
    fused_sgd = getattr(torch, "_fused_sgd_", None)
    if fused_sgd is not None and parameters[0].device.type in _HAVE_FUSED_SGD:
        # The private operation behind torch.optim.SGD(fused=True): one kernel in place of the three below.
        fused_sgd(
            parameters,
            steps,
            buffers,
            weight_decay=0.0,
            momentum=rule.momentum,
            lr=1.0,
            dampening=0.0,
            nesterov=rule.nesterov,
            maximize=False,
            is_first_step=False,
        )
        return
    if buffers:
        torch._foreach_mul_(buffers, rule.momentum)
        torch._foreach_add_(buffers, steps)
        if rule.nesterov:
            torch._foreach_add_(steps, buffers, alpha=rule.momentum)
        else:
            steps = buffers
    torch._foreach_sub_(parameters, steps)
