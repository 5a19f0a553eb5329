"""What LARS needs of sharded parameters (DTensor: FSDP2, tensor parallelism): the shards, and sums over them."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from simclr_scale.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, which may also be a replicated one."""
    # Whoever has a DTensor has imported its module; nobody else should pay for it, nor need a torch built with it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Shards:
    """How some parameters are laid out over a mesh. Equal, and of one hash, where their sums can share a collective.

    Args:
        parameter: A DTensor.

    Raises:
        InputError: The parameter is a partial sum.
    """

    def __init__(self, parameter: "DTensor") -> None:
        if any(placement.is_partial() for placement in parameter.placements):
            raise InputError(
                f"LARS updates sharded and replicated parameters; one of shape {tuple(parameter.shape)} has the "
                f"placements {parameter.placements}"
            )
        self._mesh = parameter.device_mesh
        self._dimensions = tuple(
            index for index, placement in enumerate(parameter.placements) if not placement.is_replicate()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self._mesh, self._dimensions

    def sum_over(self, values: Tensor) -> None:
        """Sum over the shards, in place; every rank of the mesh must call it."""
        import torch.distributed as dist

        for dimension in self._dimensions:
            dist.all_reduce(values, group=self._mesh.get_group(dimension))


def local_shards(parameter: "DTensor", gradient: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's part of a parameter, its gradient and its buffer, sharing their memory."""
    if is_sharded(gradient):
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        gradient = gradient.to_local()
    if buffer is not None and is_sharded(buffer):
        buffer = buffer.to_local()
    return parameter.to_local(), gradient, buffer
