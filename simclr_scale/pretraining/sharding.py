"""A SimCLR model laid out over the device mesh of Lightning's ``ModelParallelStrategy``: FSDP2 and tensor parallelism.

The mesh is (data_parallel, tensor_parallel). Ranks along the first dimension have different images, and each keeps a
part of every weight, gradient and optimizer state (FSDP2, torch's ``fully_shard``); a block's weights are gathered when
it is their turn. Ranks along the second have the same images and compute a part of each block.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_scale.distributed import DATA_PARALLEL, TENSOR_PARALLEL, world
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.models.tensor_parallel import divide_heads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def shard_model(encoder: nn.Module, head: nn.Module, loss: nn.Module, mesh: "DeviceMesh", device: torch.device) -> None:
    """Lays out the three parts of a model over a mesh, in place; nothing is done to a model that is so already.

    The weights are those of the first rank. Parameters of a loss, a few numbers, stay on every rank.

    Args:
        mesh: of the dimensions data_parallel and tensor_parallel, over all ranks.
        device: of this rank.

    Raises:
        InputError: an encoder that cannot be divided among the tensor-parallel ranks.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(encoder, FSDPModule):
        return
    for part in (encoder, head, loss):
        _take_from_first_rank(part, device)
    data, partners = mesh[DATA_PARALLEL], mesh[TENSOR_PARALLEL]
    # FSDP2 takes contiguous parameters only; images still come in the memory format that is asked for.
    encoder.to(memory_format=torch.contiguous_format)
    if partners.size() > 1:
        _shard_heads(divide_heads(encoder, partners), mesh)
    for block in blocks_of(encoder):
        _fully_shard(block, data)
    _fully_shard(encoder, data)
    if any(True for _ in head.parameters()):
        _fully_shard(head, data)
    for parameter in loss.parameters():
        parameter.register_post_accumulate_grad_hook(_mean_over(data.get_group()))


def _take_from_first_rank(module: nn.Module, device: torch.device) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            # One after the other: the whole model need not fit the device.
            there = tensor.detach().to(device, copy=True).contiguous()
            dist.broadcast(there, 0)
            tensor.copy_(there)


def _shard_heads(layers: list[Any], mesh: "DeviceMesh") -> None:
    """Shards the layers that stay whole for tensor parallelism over all ranks.

    Their gradient is to be the sum over partners and the mean over the data-parallel ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    everyone = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("all_ranks",))
    for layer in layers:
        _fully_shard(layer, everyone)
        layer.set_gradient_divide_factor(float(mesh[DATA_PARALLEL].size()))
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor


def _fully_shard(module: nn.Module, mesh: "DeviceMesh") -> None:
    from torch.distributed.fsdp import fully_shard

    module.register_forward_hook(_no_view)
    fully_shard(module, mesh=mesh)


def _no_view(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """FSDP2 hangs its backward on the output, and would lose it where the next layer changes a view in place."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _mean_over(group: dist.ProcessGroup) -> Any:
    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= world(group).size

    return average


def blocks_of(encoder: nn.Module) -> Iterator[nn.Module]:
    """The parts whose weights are gathered one after the other: the members of the encoder's sequences and lists."""
    for child in encoder.children():
        if not isinstance(child, _CONTAINERS):
            continue
        for member in child:
            if isinstance(member, _CONTAINERS):
                yield from blocks_of(nn.ModuleList([member]))
            elif any(True for _ in member.parameters()):
                yield member


def whole_weights(module: nn.Module, *, everywhere: bool) -> dict[str, Tensor]:
    """A state dict of whole tensors; every rank must call it.

    Args:
        everywhere: on every rank and its device, rather than on the first rank alone and its CPU (elsewhere: empty).
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    weights: dict[str, Any] = get_model_state_dict(module, options=options)
    return weights


def whole_encoder(encoder: nn.Module, *, everywhere: bool) -> nn.Module | None:
    """A copy of a sharded encoder that is not sharded; every rank must call it.

    Args:
        everywhere: see `whole_weights`; None is returned elsewhere.
    """
    weights = whole_weights(encoder, everywhere=everywhere)
    if not weights:
        return None
    made: Any = encoder.architecture
    # Its own initial weights are replaced, and must not move anyone's random numbers.
    with torch.random.fork_rng(devices=[]):
        copy = create_encoder(made.name, made.in_chans, **made.kwargs)
    parameter = next(iter(weights.values()))
    copy.to(parameter.device)
    copy.load_state_dict(weights)
    copy.train(encoder.training)
    return copy


def whole_head(head: nn.Module) -> ProjectionHead | None:
    """The same of a projection head, on the first rank; None where it is of another kind."""
    weights = whole_weights(head, everywhere=False)
    if not weights or not isinstance(head, ProjectionHead):
        return None
    with torch.random.fork_rng(devices=[]):
        copy = ProjectionHead(**head.arguments)
    copy.load_state_dict(weights)
    return copy
