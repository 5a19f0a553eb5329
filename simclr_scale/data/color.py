"""Flip, colour jitter, grey and blur of both views: pure functions of pixels and draws, on any device.

Two definitions of the colour operations are in use. torchvision blends contrast towards one grey mean and saturation
towards the grey image; Google's code (TensorFlow) blends contrast towards the mean of each channel and scales
saturation in HSV, and pads the blur with zeros where torchvision reflects. SimCLR was published with Google's. Images
that are not of three channels have no grey mean, so their contrast is about the mean of each channel in both.

One set of operations serves every device; what differs is how images with different draws are kept apart. On a CPU they
are sorted by the order of their jitters and go through the operations in groups that the cache holds. On an accelerator
the host must not ask what was drawn, which would stop it until the device has caught up: every image goes through
every operation there, and masks choose.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.draws import ChannelDraw, Draw

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

# ITU-R 601 luma, as both torchvision and TensorFlow use it.
_LUMA = (0.2989, 0.587, 0.114)
# One photograph at 224 px: a group and its intermediate images stay in the processor's cache.
_GROUP_BYTES_ON_CPU = 640 << 10
# Bounds the memory of intermediate images.
_CHUNK_BYTES_ON_ACCELERATORS = 256 << 20
# Side of the blocks of a blur's matrices: larger ones multiply more zeros, smaller ones are less work at a time.
_BLUR_BLOCK_ON_CPU = 16
# In standard deviations: what lies farther, a 4e-8 of the whole, is nothing to a sum of float32.
_BLUR_REACH = 5.5

# (images, factor) -> images; the factor is (B, 1, 1, 1), or (B, C, 1, 1) for the brightness and contrast of channels.
Operation = Callable[[Tensor, Tensor], Tensor]


def augment_colors(views: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Flips, jitters, greys and blurs each view by its own draws.

    Args:
        views: (B, 2, C, H, W), uint8 or float32 in [0, 255].
        draws: (B, 2, P), see :class:`simclr_scale.data.draws.Draw`.
        augmentation: one that C channels allow, see ``Augmentation.require_channels``.

    Returns:
        (2B, C, H, W) float32 in [0, 1]: all first views, then all second views.
    """
    draws = draws.transpose(0, 1).flatten(0, 1)
    if views.device.type == "cpu":
        return _augment_in_groups(views, draws, augmentation)
    images = views.transpose(0, 1).flatten(0, 1)
    augment = _compiled if images.device.type == "cuda" else augment_by_masks
    size = max(1, _CHUNK_BYTES_ON_ACCELERATORS // (images[0].numel() * 4))
    chunks = zip(images.split(size), draws.split(size), strict=True)
    return torch.cat([augment(part, part_draws, augmentation) for part, part_draws in chunks])


def _augment_in_groups(views: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """On a CPU, where the draws can be looked at."""
    images, count = views.flatten(0, 1), len(views)
    # NumPy asks for large pages, without which the first touch of a large result takes as long as some jitters.
    out = torch.from_numpy(np.empty((2 * count, *views.shape[2:]), dtype=np.float32))
    for rows, order in _groups(draws, max(1, _GROUP_BYTES_ON_CPU // (out[0].numel() * out.element_size()))):
        own = draws[rows]
        # Views lie image by image, results view by view.
        x = images.index_select(0, 2 * (rows % count) + rows // count).to(torch.float32).div_(255)
        x = _where_drawn(x, own[:, Draw.FLIP], lambda part: part.flip(-1))
        operations = _jitters(augmentation, x.shape[1]) if order is not None else {}
        for operation in order or ():
            if operation in operations:
                function, columns = operations[operation]
                x = function(x, own[:, columns, None, None]).clamp_(0, 1)
        x = _drop_color(x, own, augmentation, _where_drawn)
        if augmentation.blur > 0:
            x = _where_drawn(x, own[:, Draw.BLUR], _blur_as(augmentation), own[:, Draw.SIGMA])
        out.index_copy_(0, rows, x)
    return out


def _groups(draws: Tensor, limit: int) -> Iterator[tuple[Tensor, tuple[int, ...] | None]]:
    """Rows of images that are jittered in the same order, at most ``limit`` at a time, and that order or None."""
    orders = torch.where(draws[:, Draw.JITTER] > 0, draws[:, Draw.ORDER].long(), -1)
    sorted_orders, rows = orders.sort(stable=True)
    values, sizes = sorted_orders.unique_consecutive(return_counts=True)
    for order, group in zip(values.tolist(), rows.split(sizes.tolist()), strict=True):
        for part in group.split(limit):
            yield part, (ORDERS[order] if order >= 0 else None)


def _where_drawn(x: Tensor, flags: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``function`` of the images whose flag is set, in place where they are not all."""
    chosen = flags.nonzero()[:, 0]
    if len(chosen) == len(x):
        return function(x, *parameters)
    if len(chosen):
        x[chosen] = function(x[chosen], *(parameter[chosen] for parameter in parameters))
    return x


def augment_by_masks(images: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Without a look at the draws: no shape and no branch depends on them, so nothing waits for the device.

    Args:
        images: (N, C, H, W), uint8 or float32 in [0, 255].
        draws: (N, P).

    Returns:
        (N, C, H, W) float32 in [0, 1].
    """
    x = images.to(torch.float32) / 255
    x = _select(x, draws[:, Draw.FLIP], lambda part: part.flip(-1))
    operations = _jitters(augmentation, x.shape[1])
    jittered = draws[:, Draw.JITTER] > 0
    for chosen in order_places(draws[:, Draw.ORDER]) if operations else ():
        before = x
        for operation, (function, columns) in operations.items():
            here = (jittered & (chosen == operation))[:, None, None, None]
            x = torch.where(here, function(before, draws[:, columns, None, None]), x)
        x = x.clamp(0, 1)
    x = _drop_color(x, draws, augmentation, _select)
    if augmentation.blur > 0:
        x = _select(x, draws[:, Draw.BLUR], _blur_as(augmentation), draws[:, Draw.SIGMA])
    return x


def _select(x: Tensor, flags: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    return torch.where(flags[:, None, None, None] > 0, function(x, *parameters), x)


def order_places(order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``ORDERS[order]`` by arithmetic: a table would have to be brought to the device at every call.

    Args:
        order: (N,), numbers of permutations in lexicographic order.

    Returns:
        (N,) operations for each of the four places.
    """
    order = order.long()
    first = order // 6
    rank = order % 6 // 2
    second = rank + (rank >= first)
    # The third is the smaller or the larger of the two that are left.
    third = order % 2
    for taken in (torch.minimum(first, second), torch.maximum(first, second)):
        third = third + (third >= taken)
    return first, second, third, 6 - first - second - third


@functools.cache
def _compile() -> Callable[..., Tensor]:
    return torch.compile(augment_by_masks)


_compiler_failed = False


def _compiled(images: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Fused by the compiler into few passes over memory, or operation by operation where it cannot be."""
    global _compiler_failed
    if not _compiler_failed:
        try:
            return _compile()(images, draws, augmentation)
        except torch._dynamo.exc.TorchDynamoException as error:
            _compiler_failed = True
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"the augmentation is slower than it could be: torch.compile failed ({reason})", stacklevel=2)
    return augment_by_masks(images, draws, augmentation)


def _jitters(augmentation: Augmentation, channels: int) -> dict[int, tuple[Operation, slice]]:
    """The jitters that are in use: what each does and which columns of the draws hold its factor."""
    a = augmentation
    if a.jitter * a.strength == 0:
        return {}
    google, per_channel = a.color_ops == "google", a.per_channel
    by_grey = not google and channels == 3 and not per_channel
    operations: dict[int, tuple[float, Operation, slice]] = {
        BRIGHTNESS: (
            a.brightness,
            add_brightness if google and a.brightness_mode == "additive" else scale_brightness,
            ChannelDraw.BRIGHTNESS.columns(channels) if per_channel else _column(Draw.BRIGHTNESS),
        ),
        CONTRAST: (
            a.contrast,
            contrast_by_grey if by_grey else contrast_by_channel,
            ChannelDraw.CONTRAST.columns(channels) if per_channel else _column(Draw.CONTRAST),
        ),
        SATURATION: (a.saturation, saturation_in_hsv if google else saturation_by_grey, _column(Draw.SATURATION)),
        HUE: (a.hue, shift_hue, _column(Draw.HUE)),
    }
    return {name: (function, columns) for name, (amount, function, columns) in operations.items() if amount > 0}


def _column(draw: Draw) -> slice:
    return slice(draw, draw + 1)


def _drop_color(x: Tensor, draws: Tensor, augmentation: Augmentation, choose: Callable[..., Tensor]) -> Tensor:
    if augmentation.grey > 0:
        x = choose(x, draws[:, Draw.GREY], grey)
    if augmentation.channel_drop > 0:
        x = x * (1 - draws[:, ChannelDraw.DROP.columns(x.shape[1]), None, None])
    return x


def _blur_as(augmentation: Augmentation) -> Callable[[Tensor, Tensor], Tensor]:
    padding = "constant" if augmentation.color_ops == "google" else "reflect"
    return lambda x, sigma: blur(x, sigma, padding).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def grey(x: Tensor) -> Tensor:
    """Every channel replaced by the luma."""
    return luma(x).repeat(1, 3, 1, 1)


def scale_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def add_brightness(x: Tensor, delta: Tensor) -> Tensor:
    """SimCLR v1's brightness (data_util.py, random_brightness with impl='simclrv1')."""
    return x + delta


# torch.lerp would say the same as the three sums below, and takes four times as long on a CPU.


def contrast_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's contrast: away from the mean luma of the image."""
    mean = luma(x.mean((2, 3), keepdim=True))
    return (x * factor).add_(mean * (1 - factor))


def contrast_by_channel(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's contrast (tf.image.adjust_contrast): away from the mean of each channel."""
    return (x * factor).add_(x.mean((2, 3), keepdim=True) * (1 - factor))


def saturation_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's saturation: away from the grey image."""
    return (x * factor).add_(luma(x) * (1 - factor))


def saturation_in_hsv(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's saturation (tf.image.adjust_saturation): S of HSV times the factor, at most 1.

    With V and hue fixed, a channel's distance from V = max(R, G, B) is proportional to S.
    """
    value, chroma = _value_and_chroma(x)
    # S' / S = min(factor, 1 / S) with S = chroma / V; a grey pixel has no distance to scale.
    ratio = torch.minimum(value / chroma.clamp(min=torch.finfo(x.dtype).tiny), factor[:, 0])[:, None]
    value = value[:, None]
    return ((x - value) * ratio).add_(value)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of HSV by ``turns`` in [-.5, .5] of a full circle, S and V unchanged, without a detour through HSV.

    In sextants from red, the hue is 1 + (G + B - R - min) / chroma, with the sign of G - B: of R, G and B one is the
    maximum, one the minimum, and the third says where between two corners of the circle the colour lies. Each channel
    is then min + chroma * (2 - d), d being the distance of the hue from the channel's own (red 0, green 2, blue 4),
    between 1 and 2. No step chooses between cases, which is the slow part of the textbook's formula.
    """
    red, green, blue = x.unbind(1)
    value, chroma = _value_and_chroma(x)
    low = value - chroma
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).add_(1)
    hue = torch.copysign(distance, green - blue)[:, None]
    shift = 6 * turns
    # 3 - ||h| - 3| is the distance from red on the circle of six while |h| <= 7.
    around = 6 * (shift < 0)
    to_channels = torch.cat((shift, shift - 2 + around, shift - 4 + around), 1)
    beyond = (hue + to_channels).abs_().sub_(3).abs_().clamp_(1, 2)
    return beyond.mul_(chroma[:, None]).add_((low - chroma)[:, None])


def _value_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """V of HSV and max - min, each (B, H, W)."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    return value, value - torch.minimum(torch.minimum(red, green), blue)


def blur_kernel_size(image_size: int) -> int:
    """About a tenth of the image and odd: 23 at 224 px (SimCLR, appendix A; data_util.py, random_blur)."""
    return 2 * (image_size // 10 // 2) + 1


def blur(x: Tensor, sigma: Tensor, padding: str) -> Tensor:
    """Gaussian blur, separable, with a standard deviation for each image.

    A convolution with a kernel for each image is slow on every device. Here each direction is a product with the
    banded matrix of the convolution; on a CPU, where zeros cost time, block by block along the band.

    Args:
        x: (B, C, H, W).
        sigma: (B,) in pixels.
        padding: "reflect" (torchvision) or "constant" (zeros, Google's 'SAME').
    """
    height, width = x.shape[-2:]
    half = blur_kernel_size(height) // 2
    offsets = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    if x.device.type != "cpu":
        down, across = (_blur_matrix(kernel, size, padding)[:, None] for size in (height, width))
        return down @ x @ across.mT
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for image, weights, deviation, result in zip(x, kernel, sigma.tolist(), out, strict=True):
        reach = min(half, math.ceil(_BLUR_REACH * deviation))
        _blur_in_blocks(image, weights[half - reach : half + reach + 1], padding, result)
    return out


def _moved(kernel: Tensor, size: int) -> Tensor:
    """(..., K) -> (..., size, size + K - 1): row i is the kernel moved by i."""
    return F.pad(kernel, (size - 1, size - 1)).unfold(-1, size + kernel.shape[-1] - 1, 1).flip(-2)


def _blur_matrix(kernel: Tensor, size: int, padding: str) -> Tensor:
    """(B, K) -> (B, size, size): the convolution along one axis, with weights beyond a border folded back or left out."""
    half = kernel.shape[1] // 2
    weights = _moved(kernel, size)
    inside = weights[..., half : half + size]
    if padding == "reflect":
        beyond = [weights[..., :half].flip(-1), weights[..., half + size :].flip(-1)]
        inside = inside + F.pad(beyond[0], (1, size - 1 - half)) + F.pad(beyond[1], (size - 1 - half, 1))
    return inside


def _blur_in_blocks(image: Tensor, kernel: Tensor, padding: str, out: Tensor) -> None:
    """One image (C, H, W) with one kernel. All blocks of rows, or of columns, are one product, as they share weights."""
    channels, height, width = image.shape
    half, block = len(kernel) // 2, _BLUR_BLOCK_ON_CPU
    down, across = -(-height // block), -(-width // block)
    padded = image.new_zeros(channels, down * block + 2 * half, across * block + 2 * half)
    padded[:, half : half + height, half : half + width] = image
    if padding == "reflect" and half > 0:
        for axis, size in ((1, height), (2, width)):
            before, after = padded.narrow(axis, half + 1, half), padded.narrow(axis, size - 1, half)
            padded.narrow(axis, 0, half).copy_(before.flip(axis))
            padded.narrow(axis, half + size, half).copy_(after.flip(axis))
    weights = _moved(kernel, block)
    between = image.new_empty(channels, down * block, padded.shape[2])
    for rows, result in zip(padded, between, strict=True):
        blocks = rows.unfold(0, weights.shape[1], block).transpose(1, 2)
        torch.bmm(weights.expand(down, -1, -1), blocks, out=result.view(down, block, -1))
    lines = between[:, :height].reshape(channels * height, -1).unfold(1, weights.shape[1], block).transpose(0, 1)
    blurred = torch.bmm(lines, weights.T.contiguous().expand(across, -1, -1))
    out.copy_(blurred.transpose(0, 1).reshape(channels, height, across * block)[..., :width])
