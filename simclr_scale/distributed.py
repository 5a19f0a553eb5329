"""Process groups: who else is there, gathering from all of them, and batch norm over the global batch.

Everything here works on one process without an initialised group, and on gloo (CPU) as on NCCL (GPU).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class World(NamedTuple):
    """This process's place in a process group."""

    rank: int
    size: int


def world(group: dist.ProcessGroup | None = None) -> World:
    """Rank and size in ``group`` (None: all processes); rank 0 of 1 where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1)
    return World(dist.get_rank(group), dist.get_world_size(group))


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Stacks the equally shaped tensors of all ranks along dimension 0, in rank order, without gradient.

    Args:
        tensor: (n, ...), the same shape and dtype on every rank.

    Returns:
        (world * n, ...), equal on every rank. On one process the tensor itself.
    """
    size = world(group).size
    if size == 1:
        return tensor
    gathered = tensor.new_empty((size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


def sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replaces tensors by their sums over all ranks, without gradient, in one message for each type of number."""
    if world(group).size == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(summed.view(tensor.shape))


def require_equal_across_ranks(value: int, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError on EVERY rank when ``value`` differs between ranks, so that no rank is left waiting.

    Costs 8 bytes a rank.
    """
    if world(group).size == 1:
        return
    device = torch.device("cuda", torch.cuda.current_device()) if _backend_is_nccl(group) else torch.device("cpu")
    values = all_gather(torch.tensor([value], dtype=torch.int64, device=device), group).tolist()
    if len(set(values)) > 1:
        raise ValueError(f"every rank must have the same {what}; ranks 0 to {len(values) - 1} have {values}")


def _backend_is_nccl(group: dist.ProcessGroup | None) -> bool:
    return "nccl" in str(dist.get_backend(group))


class _NormaliseGlobally(torch.autograd.Function):
    """Batch normalisation with moments over all ranks; one collective forward, one backward.

    With DDP's averaging of parameter gradients in mind, each rank's gradient of weight and bias covers its own rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local_mean, local_var = _moments(x)
        local_count = x.numel() // x.shape[1]

        channels = x.shape[1]
        local = torch.cat([local_mean, local_var, local_mean.new_tensor([local_count])])
        gathered = all_gather(local[None], group)
        means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
        # Chan et al. 1983: combining the moments of parts loses nothing to cancellation, unlike E[x^2] - E[x]^2.
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / count

        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group, ctx.has_bias = eps, group, bias is not None
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy: Tensor = grads[0]
        x, weight, mean, var, count = ctx.saved_tensors
        inverse_std = torch.rsqrt(var + ctx.eps)
        # torch's own backward with fixed statistics gives the two sums that the global one needs.
        _, sum_dy_normalised, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy, x, torch.ones_like(mean), mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        d_weight = sum_dy_normalised.to(weight.dtype) if weight is not None else None
        d_bias = sum_dy.to(weight.dtype if weight is not None else mean.dtype) if ctx.has_bias else None

        sums = torch.stack([sum_dy, sum_dy_normalised])
        if world(ctx.group).size > 1:
            dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_normalised = sums / count
        scale = inverse_std if weight is None else inverse_std * weight.to(mean.dtype)
        # dx = scale * (dy - mean_dy) - scale * mean_dy_normalised * x_normalised: two lines a channel, which torch's
        # batch norm with fixed statistics draws faster than products of tensors do.
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        dx = F.batch_norm(dy, mean_dy, one, scale, zero, eps=0.0)
        dx += F.batch_norm(x, mean, one, -scale * mean_dy_normalised * inverse_std, zero, eps=0.0)
        return dx, d_weight, d_bias, None, None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,) in at least float32.

    From torch's batch norm: its kernel is some fifteen times faster than var_mean on channels-last images.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(x.shape[1], dtype=wide, device=x.device)
    _, mean, inverse_std = torch.native_batch_norm(x, ones, torch.zeros_like(ones), None, None, True, 0.0, 0.0)
    # It gives 0 for the inverse of a standard deviation of 0.
    return mean, torch.where(inverse_std > 0, inverse_std**-2, 0.0)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of the global batch, on any device.

    "we use a global BN ... aggregating BN mean and variance over all devices during the training" (SimCLR, section
    2.2). On CUDA this is torch's SyncBatchNorm; on the CPU, where that one refuses to run, an own implementation of
    the same function. Parameters, buffers and state-dict keys are those of the ``nn.BatchNorm*d`` it replaces.
    """

    # Not a subclass of SyncBatchNorm: DistributedDataParallel refuses a module on the CPU that has one within. Its
    # functions ask no more of `self` than is here.
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        nn.SyncBatchNorm._check_input_dim(self, input)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda:
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        y, mean, var, count = _NormaliseGlobally.apply(input, self.weight, self.bias, self.eps, self.process_group)
        if self.track_running_stats:
            self._update_running_statistics(mean, var, count)
        return y

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class _GlobalBatchNormAct(GlobalBatchNorm):
    """GlobalBatchNorm followed by the dropout and activation that timm fuses into its BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert_global_batch_norm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replaces every batch norm in ``module`` by GlobalBatchNorm over ``group``; weights and buffers are shared.

    Returns:
        The module itself, changed in place, or its replacement when it is a batch norm.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, GlobalBatchNorm):
        fused = hasattr(module, "act") and hasattr(module, "drop")
        converted = (_GlobalBatchNormAct if fused else GlobalBatchNorm)(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, group
        )
        # The very same tensors: an optimizer or a parameter list made before the conversion stays valid.
        converted._parameters = module._parameters
        converted._buffers = module._buffers
        converted.training = module.training
        if fused:
            for name in ("drop", "act"):
                converted.add_module(name, module.get_submodule(name))
        return converted
    for name, child in module.named_children():
        replacement = convert_global_batch_norm(child, group)
        if replacement is not child:
            setattr(module, name, replacement)
    return module
