"""The settings of one LARS update, as the forms that execute it receive them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """Google's rule with the settings of one parameter group; `LARS` has the formula.

    Attributes:
        lr: Learning rate; a 0-dim tensor where the schedule runs on the device.
        momentum: At 0 there are no buffers.
        weight_decay: L2 coefficient.
        trust_coefficient: Length of a step over that of the parameter, per unit of learning rate.
        nesterov: Look ahead by one momentum step.
        adapt: Scale the step of each tensor by its trust ratio.
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float
    trust_coefficient: float
    nesterov: bool
    adapt: bool


def working_precision(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of this type is updated: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
