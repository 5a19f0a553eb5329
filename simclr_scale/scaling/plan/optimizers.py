"""What an optimizer keeps, and what kind it is, from a step of it on a small layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from simclr_scale.optim import LARS, param_groups

_ADAPTIVE = ("adam", "lion", "rmsprop", "adagrad", "adadelta")


def make_on_a_small_layer(make: Callable[[Any, float], Optimizer] | None, learning_rate: float) -> Optimizer:
    """The optimizer of a model (None: LARS) after one step on a layer of 64 x 64."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = (make or LARS)(param_groups(layer, 0.0), learning_rate)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    return optimizer


def state_of_a_byte(optimizer: Optimizer) -> float:
    """Bytes of state for each byte of parameters: 1 for momentum, 2 for Adam."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [
        value.nbytes
        for p in parameters
        for value in optimizer.state[p].values()
        # Counters of steps, which do not grow with the parameters, are left out.
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    return sum(kept) / sum(p.nbytes for p in parameters)


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether each step is as long as the learning rate, element by element, as Adam's are."""
    return type(optimizer).__name__.lower().startswith(_ADAPTIVE)
