"""Tensor parallelism of timm's vision transformers: each of T partners has 1/T of the heads and of the hidden units.

Every partner is given the same images and holds the same activations between the layers. Within a block (Shoeybi et al.
2019, "Megatron-LM", section 3) the first linear layer of attention and of the MLP is cut by its outputs, the second by
its inputs, and one all-reduce of each half puts the sums together.

The joint projection of queries, keys and values is cut by heads. Its rows are (3, heads, channels), so a head's rows
lie in three places, and no even cut of them is one by heads. So the layer keeps the parameters of all heads, those of
the state dict, and takes its heads' rows in the forward pass; FSDP2 shards them over all ranks, partners included.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from simclr_scale.distributed import world
from simclr_scale.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ATTENTIONS = ("attn", "attention")


class HeadsOfOnePartner(nn.Linear):
    """Queries, keys and values (B, N, 3 * channels of own heads) of the heads of this rank.

    The weight (3 * dim, dim) and bias are those of all heads, and on every partner equal; a partner's gradient of them
    is that of its own heads' rows, 0 elsewhere: the gradient is the SUM over partners.
    """

    heads: int
    partners: dist.ProcessGroup

    @classmethod
    def of(cls, layer: nn.Linear, heads: int, partners: dist.ProcessGroup) -> "HeadsOfOnePartner":
        """A layer that shares the parameters of another one."""
        with torch.device("meta"):
            made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight, made.bias = layer.weight, layer.bias
        made.heads, made.partners = heads, partners
        return made

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(
            _SumOfGradients.apply(input, self.partners),
            self._own(self.weight),
            None if self.bias is None else self._own(self.bias),
        )

    def _own(self, parameter: Tensor) -> Tensor:
        rank, size = world(self.partners)
        return parameter.unflatten(0, (3, self.heads, -1)).chunk(size, dim=1)[rank].flatten(0, 2)


class _SumOfGradients(torch.autograd.Function):
    """What partners have alike goes different ways from here: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def divide_heads(encoder: nn.Module, mesh: "DeviceMesh") -> list[HeadsOfOnePartner]:
    """Divides the blocks of a vision transformer among partners, in place.

    Args:
        encoder: whose blocks have timm's ``Attention`` as ``attn`` and timm's ``Mlp`` as ``mlp``.
        mesh: of one dimension, the partners.

    Returns:
        The layers that still hold the parameters of all heads, and whose gradients are to be summed over partners. The
        other weights of attention and MLP are DTensors on ``mesh``; what is left has equal gradients on all partners.

    Raises:
        InputError: another encoder, or one whose heads or hidden units do not divide.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    require_divisible(encoder, mesh.size())
    partners = mesh.get_group()
    layers = []
    for block in _blocks(encoder):
        attention: Any = block.attn
        attention.qkv = HeadsOfOnePartner.of(attention.qkv, attention.num_heads, partners)
        layers.append(attention.qkv)
        attention.num_heads //= mesh.size()
        attention.attn_dim //= mesh.size()
        plan = {"attn.proj": RowwiseParallel(), "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
        parallelize_module(block, mesh, plan)
    return layers


def require_divisible(encoder: nn.Module, size: int) -> None:
    """Raises InputError where an encoder cannot be divided among so many partners."""
    asked = f"trainer.strategy: tensor_parallel_size {size}"
    name = getattr(getattr(encoder, "architecture", None), "name", type(encoder).__name__)
    blocks = list(_blocks(encoder))
    unknown = [
        path
        for path, module in encoder.named_modules()
        if path.rpartition(".")[2] in _ATTENTIONS
        and not any(module is getattr(block, "attn", None) for block in blocks)
    ]
    if not blocks or unknown:
        where = f" ({unknown[0]} is of another kind)" if unknown else ""
        raise InputError(
            f"{asked} is for vision transformers of timm's plain blocks, and model.encoder {name} is none{where}; "
            "use tensor_parallel_size 1, which shards every encoder over the data-parallel ranks"
        )
    for block in blocks:
        attention, mlp = block.attn, block.mlp
        for what, number in {"heads": attention.num_heads, "hidden units of an MLP": mlp.fc1.out_features}.items():
            if number % size:
                raise InputError(f"{asked} does not divide the {number} {what} of model.encoder {name}")
        if attention.attn_drop.p or mlp.drop1.p:
            raise InputError(
                f"{asked}: partners would drop the same units of their different parts; model.encoder {name} must be "
                "without attn_drop_rate and proj_drop_rate (drop_path_rate is the same on all partners, and fine)"
            )


def _blocks(encoder: nn.Module) -> Iterator[Any]:
    for block in encoder.modules():
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if type(attention) is Attention and type(mlp) is Mlp and _is_plain(attention, mlp):
            yield block


def _is_plain(attention: Attention, mlp: Mlp) -> bool:
    """Whether nothing in between is over all heads or hidden units, nor shared by heads."""
    between = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
    return attention.gate is None and all(isinstance(module, nn.Identity) for module in between)
