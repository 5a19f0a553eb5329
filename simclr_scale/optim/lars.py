"""LARS: SGD with momentum whose step on each tensor is proportional to the norm of that tensor.

Source: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888), in the form of
google-research/simclr, tf2/lars_optimizer.py with its default `classic_momentum=True`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from simclr_scale.errors import InputError
from simclr_scale.optim import lars_multi_tensor, lars_per_tensor
from simclr_scale.optim.lars_rule import Rule, working_precision
from simclr_scale.optim.lars_sharded import Shards, is_sharded, local_shards


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

    A step never waits for the device. It is computed in float32 at least, also where parameters are bfloat16. The norms
    of a sharded parameter (DTensor: FSDP2, tensor parallelism) are those of the whole tensor; every rank of its mesh
    must then take the step. The result is the same to the bit in every run of equal inputs on equal hardware, whatever
    else the optimizer holds.

    A step on CUDA can be captured in a CUDA graph once a first one has made the momentum buffers. A learning rate that
    is a number is then part of the graph; one that is a tensor on the device is read at each replay.

    Args:
        params: Parameters, or parameter groups (dicts with "params" and any of the settings below, or `adapt`).
        lr: Learning rate, at least 0: a number, or a tensor without dimensions. The schedule may change it at every
            step.
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
        lr: float | Tensor,
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
            rule = Rule(*(group[name] for name in Rule._fields))
            for bucket in self._buckets(group["params"], rule):
                bucket.update(rule)
        return loss

    def _buckets(self, parameters: Iterable[Tensor], rule: Rule) -> "Iterable[_Bucket]":
        """The parameters that have a gradient, in lists that can be updated together."""
        buckets: dict[tuple[Any, ...], _Bucket] = {}
        for p in parameters:
            g = p.grad
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise InputError(
                    f"LARS needs the norm of a dense gradient; a parameter of shape {tuple(p.shape)} has one of "
                    f"layout {g.layout} (for an nn.Embedding, leave sparse=False)"
                )
            v = self._buffer(p) if rule.momentum != 0 else None
            shards = None
            if is_sharded(p):
                shards = Shards(p)
                p, g, v = local_shards(p, g, v)
            key = (p.device, p.dtype, shards)
            if key not in buckets:
                buckets[key] = _Bucket(p.device, p.dtype, shards)
            buckets[key].add(p, g, v)
        return buckets.values()

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
                raise InputError(
                    "LARS: a first step inside the capture of a CUDA graph would zero the momentum at every replay; "
                    "take one step before it (at a learning rate of 0 it leaves the parameters as they are)"
                )
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _form_for(device: torch.device) -> ModuleType:
    return lars_per_tensor if device.type == "cpu" else lars_multi_tensor


class _Bucket:
    """Tensors of one device and type, whole or sharded alike: what one call of a form of the rule updates."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shards: Shards | None) -> None:
        self._form = _form_for(device)
        self._precision = working_precision(dtype)
        self._sum_over_shards = shards.sum_over if shards is not None else None
        self._in_place: list[Sequence[Tensor]] = []  # parameter, gradient and, where there is one, buffer, as vectors
        self._by_copy: list[Sequence[Tensor]] = []

    def add(self, p: Tensor, g: Tensor, v: Tensor | None) -> None:
        tensors = (p, g) if v is None else (p, g, v)
        vectors = _as_vectors(tensors) if all(x.dtype == self._precision for x in tensors) else None
        if vectors is None:
            self._by_copy.append(tensors)
        else:
            self._in_place.append(vectors)

    def update(self, rule: Rule) -> None:
        if self._form is lars_multi_tensor or self._sum_over_shards is not None:
            self._update(self._in_place, self._by_copy, rule)
            return
        if self._in_place:
            self._update(self._in_place, [], rule)
        for tensors in self._by_copy:  # one by one: no more than one is held twice
            self._update([], [tensors], rule)

    def _update(self, in_place: list[Sequence[Tensor]], by_copy: list[Sequence[Tensor]], rule: Rule) -> None:
        originals = [x for tensors in by_copy for x in tensors]
        copies = [torch.empty(x.shape, dtype=self._precision, device=x.device) for x in originals]
        if by_copy:
            torch._foreach_copy_(copies, originals)
        width = 2 if rule.momentum == 0 else 3
        vectors = [x.view(-1) for x in copies]
        rows = [*in_place, *(vectors[start : start + width] for start in range(0, len(vectors), width))]
        parameters, gradients, *rest = (list(column) for column in zip(*rows, strict=True))
        self._form.update(parameters, gradients, rest[0] if rest else [], rule, self._sum_over_shards)
        changed = [index for index in range(len(copies)) if index % width != 1]  # all but the gradients
        if changed:
            torch._foreach_copy_([originals[index] for index in changed], [copies[index] for index in changed])


def _as_vectors(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Their elements in the order of memory, sharing it; None where there are gaps or the orders differ."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(-1) for x in tensors]
    if all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors):
        return [x.permute(0, 2, 3, 1).view(-1) for x in tensors]
    return None


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise InputError(f"LARS: {name} must be finite and at least 0, got {group[name]}")
    if not 0 <= group["momentum"] < 1:
        raise InputError(f"LARS: momentum must be at least 0 and below 1, got {group['momentum']}")
    if not 0 < group["trust_coefficient"] < math.inf:
        raise InputError(f"LARS: trust_coefficient must be finite and above 0, got {group['trust_coefficient']}")
