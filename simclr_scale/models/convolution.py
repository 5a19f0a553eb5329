"""A convolution whose weight gradient on the CPU is matrix products where those beat the library's kernel.

In channels-last memory a 1x1 convolution is one matrix product over all pixels, and a 3x3 one is nine over shifted
images. torch leaves the gradient of the weights to oneDNN, whose AVX2 kernel for it runs in blocks of 8 x 8 channels
and is slow on small maps: at 512 x 512 channels on 4 x 4 pixels 28 Gflop/s, where the products reach 75 (one thread of
an AMD Zen 3, torch 2.15). benchmarks/step.py measures the step that this is for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With fewer channels or larger maps the nine shifted copies of the input cost more than the products save.
_LEAST_CHANNELS_OF_3X3 = 256
_LARGEST_MAP_OF_3X3 = 14 * 14


def _kernels_are_avx2() -> bool:
    # oneDNN has other kernels for AVX-512 (and for ARM); where products beat those is not known.
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class Convolution(nn.Conv2d):
    """``nn.Conv2d`` without bias: same parameters, same values, a faster backward pass on some processors.

    The products are used in training on a CPU with AVX2 alone, for float32 images (B, C, H, W) in channels-last
    memory, outside of autocast and ``torch.compile``. Elsewhere this is ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self._gains_from_products(input):
            return _ConvolutionByProducts.apply(input, self.weight, self.stride[0], int(self.padding[0]))
        return super().forward(input)

    def _gains_from_products(self, x: Tensor) -> bool:
        weight = self.weight
        if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
            return False
        if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.dim() != 4:
            return False
        if torch.is_autocast_enabled("cpu") or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if self.kernel_size == (3, 3):
            pixels = x.shape[2] * x.shape[3] // self.stride[0] ** 2
            small = pixels <= _LARGEST_MAP_OF_3X3 and min(weight.shape[:2]) >= _LEAST_CHANNELS_OF_3X3
            return small and _kernels_are_avx2()
        return self.kernel_size == (1, 1) and _kernels_are_avx2()


class _ConvolutionByProducts(torch.autograd.Function):
    """x (B, C, H, W), weight (D, C, k, k) -> (B, D, H', W'); k is 1 or 3."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (dy,) = grads
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        # Products into one buffer have no derivative; torch's own backward has.
        differentiable = torch.is_grad_enabled()
        pointwise = weight.shape[2] == 1 and ctx.stride == 1
        dx = dweight = None
        if not differentiable:
            dy = dy.contiguous(memory_format=torch.channels_last)
            if needs_dweight:
                dweight = _weight_gradient(x, dy, weight.shape[2], ctx.stride, ctx.padding)
                needs_dweight = False
            if needs_dx and pointwise:
                dx = (_pixels(dy) @ weight.flatten(1)).view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
                needs_dx = False
        if needs_dx or needs_dweight:
            stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
            mask = [needs_dx, needs_dweight, False]
            by_torch = torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
            )
            dx = by_torch[0] if needs_dx else dx
            dweight = by_torch[1] if needs_dweight else dweight
        return dx, dweight, None, None


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory -> (B * H * W, C), a view of it where no row or column is skipped."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _weight_gradient(x: Tensor, dy: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(D, C, k, k) in channels-last memory, as such a module holds its weight."""
    height, width = dy.shape[2:]
    if padding:
        # Padded as it lies in memory: F.pad of the permuted view keeps the channels innermost.
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).permute(0, 3, 1, 2)
    outputs = _pixels(dy).T
    gradient = dy.new_empty(dy.shape[1], kernel, kernel, x.shape[1])
    for row in range(kernel):
        for column in range(kernel):
            seen = x[:, :, row : row + stride * height : stride, column : column + stride * width : stride]
            torch.mm(outputs, _pixels(seen), out=gradient[:, row, column])
    return gradient.permute(0, 3, 1, 2)
