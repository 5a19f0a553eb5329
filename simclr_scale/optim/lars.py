"""LARS: SGD with momentum whose step on each tensor is proportional to the norm of that tensor.

Source: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888), in the form of
google-research/simclr, tf2/lars_optimizer.py with its default `classic_momentum=True`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from simclr_scale.errors import InputError


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, by Google's rule.

    For a parameter p with gradient g and momentum buffer v (zero at first)::

        g' = g + weight_decay * p
        trust = trust_coefficient * ||p|| / ||g'||   where both norms are above 0, else 1
        v = momentum * v + lr * trust * g'
        p = p - v                                    nesterov: p - (momentum * v + lr * trust * g')

    The learning rate enters the buffer, so a change of it acts on new gradients only; no epsilon softens the ratio.
    A parameter group may set `adapt=False`: then trust = 1, and its `weight_decay` holds as ever. The two settings
    are independent: weight decay 0 leaves adaptation on. `param_groups` builds the groups that SimCLR uses.

    A step never waits for the device. It is computed in float32 at least, also where parameters are bfloat16.

    Args:
        params: Parameters, or parameter groups (dicts with "params" and any of the settings below, or `adapt`).
        lr: Learning rate, at least 0. The schedule may change it at every step.
        momentum: In [0, 1). At 0 no buffer is kept.
        weight_decay: L2 coefficient, at least 0, added to the gradient before its norm is taken.
        trust_coefficient: Length of a step over the length of the parameter, per unit of learning rate; above 0.
        nesterov: Look ahead by one momentum step.

    Raises:
        InputError: A setting is out of its range, or a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "adapt": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; settings it does not name are those given to the constructor."""
        _check_settings(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again, with gradients on, and returns the loss.

        Returns:
            What the closure returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.layout != torch.strided:
            raise InputError(
                f"LARS needs the norm of a dense gradient; a parameter of shape {tuple(parameter.shape)} has one of "
                f"layout {gradient.layout} (for an nn.Embedding, leave sparse=False)"
            )
        precision = torch.promote_types(parameter.dtype, torch.float32)
        p = parameter.to(precision)
        g = gradient.to(precision)
        if group["weight_decay"] != 0:
            g = g.add(p, alpha=group["weight_decay"])
        rate = group["lr"]
        if group["adapt"]:
            rate = rate * _trust_ratio(p, g, group["trust_coefficient"])
        step = g * rate

        momentum = group["momentum"]
        if momentum != 0:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            velocity = buffer.to(precision) * momentum + step
            buffer.copy_(velocity)
            step = velocity * momentum + step if group["nesterov"] else velocity
        parameter.copy_(p - step)


def _trust_ratio(p: Tensor, g: Tensor, trust_coefficient: float) -> Tensor:
    """The factor on the learning rate, as a 0-dim tensor on the parameter's device."""
    p_norm, g_norm = _norm(p), _norm(g)
    ratio = trust_coefficient * p_norm / g_norm
    return torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))


def _norm(x: Tensor) -> Tensor:
    # Not torch.linalg.vector_norm: in float32 on CPU it adds up in sequence and is off by up to 1e-3 at the
    # 2.4 million weights of a ResNet's 3x3 convolution. `sum` adds pairwise and stays within 1e-6.
    return x.square().sum().sqrt()


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise InputError(f"LARS: {name} must be finite and at least 0, got {group[name]}")
    if not 0 <= group["momentum"] < 1:
        raise InputError(f"LARS: momentum must be at least 0 and below 1, got {group['momentum']}")
    if not 0 < group["trust_coefficient"] < math.inf:
        raise InputError(f"LARS: trust_coefficient must be finite and above 0, got {group['trust_coefficient']}")
