"""Gradients at frozen weights, which leave no trace in what is being trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from simclr_scale.distributed import sum_in_place, world
from simclr_scale.errors import InputError


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Within: running statistics change as they like; afterwards they are, bit by bit, what they were."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Within: dropout draws as it likes; afterwards training draws as if nothing had been."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those with a gradient.

    Raises:
        InputError: there are none, or each rank holds a part of them.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("the noise scale is that of a gradient, and nothing here is trained")
    if any(hasattr(parameter, "placements") for parameter in parameters):
        raise InputError("the noise scale of parameters that are sharded over ranks is not supported; use ddp")
    return parameters


def own_gradient(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], *, scale: float = 1.0) -> Tensor:
    """(P,) float32: the gradient that this rank has by itself.

    No ``.grad`` is touched and no hook of DistributedDataParallel is called.

    Args:
        loss: a forward pass.
        scale: multiplies the loss on its way back, so that half precision holds small gradients; divided out again.
    """
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss() * scale, parameters, allow_unused=True)
    flat = [
        torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat([part.float() for part in flat]).div_(scale)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of equally shaped tensors of all ranks, in place, as DistributedDataParallel takes it of gradients."""
    sum_in_place([values])
    return values.div_(world().size)
