"""What the losses send: counted by watching every collective that torch dispatches, with its bytes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_scale.losses import dcl, dclw, nt_xent
from tests.losses.oracles import images, share

LOSSES = {"nt_xent": nt_xent, "dcl": dcl, "dclw": dclw}


class Watch(TorchDispatchMode):
    """Name and bytes of the largest tensor (what every rank ends up with) of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace.startswith(("c10d", "_c10d")):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.sent.append((func.name(), max(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


def watched(rank: int, world_size: int, name: str, dtype: torch.dtype, gather: bool) -> tuple[list, list]:
    z = share(rank, world_size, 12).to(dtype).requires_grad_()
    with Watch() as forward:
        loss = LOSSES[name](z, 0.2, gather=gather)
    with Watch() as backward:
        loss.backward()
    return forward.sent, backward.sent


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_rows_and_one_number_a_row_forward_and_nothing_backward(
    gloo, name: str, world_size: int, dtype: torch.dtype
) -> None:
    for forward, backward in gloo(world_size, watched, name, dtype, True):
        assert backward == []
        if world_size == 1:
            assert forward == []
            continue
        rows, d = torch.cat(images(12)).shape
        operators, sizes = zip(*forward, strict=True)
        assert sizes == (8 * world_size, rows * d * dtype.itemsize, rows * 4)
        assert all("allgather" in operator for operator in operators), operators


def test_without_gather_only_the_sizes_and_the_value(gloo) -> None:
    for forward, backward in gloo(2, watched, "nt_xent", torch.float32, False):
        assert [size for _, size in forward] == [16, 4]
        assert backward == []


def reduced(rank: int, world_size: int) -> list[tuple[str, int]]:
    x = torch.ones(3, requires_grad=True)
    with Watch() as watch:
        y = x * 2
        y.register_hook(lambda gradient: dist.all_reduce(gradient))
        y.sum().backward()
    return watch.sent


def test_the_watch_sees_a_collective_in_backward(gloo) -> None:
    for sent in gloo(2, reduced):
        assert [size for _, size in sent] == [12]
