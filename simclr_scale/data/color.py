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
from numpy.typing import NDArray
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
    operations, blurred = _jitters(augmentation, views.shape[2]), _clipped_blur(blur_in_blocks, augmentation)
    limit = max(1, _GROUP_BYTES_ON_CPU // (out[0].numel() * out.element_size()))
    for rows, order in _groups(draws.numpy(), limit):
        # Views lie image by image, results view by view.
        x = _take(images, 2 * (rows % count) + rows // count)
        own = _take(draws, rows)
        flags = own.numpy() > 0
        x = _where_drawn(x, flags[:, Draw.FLIP], lambda part: part.flip(-1))
        x = x.to(torch.float32, copy=True).div_(255)
        for operation in order:
            if operation in operations:
                function, columns = operations[operation]
                x = function(x, own[:, columns, None, None]).clamp_(0, 1)
        if augmentation.grey > 0:
            x = _where_drawn(x, flags[:, Draw.GREY], grey)
        if augmentation.channel_drop > 0:
            x = drop_channels(x, own)
        if augmentation.blur > 0:
            x = _where_drawn(x, flags[:, Draw.BLUR], blurred, own[:, Draw.SIGMA])
        if len(rows) == 1:
            out[rows[0]] = x[0]
        else:
            out[torch.from_numpy(rows)] = x
    return out


def _groups(draws: NDArray[np.float32], limit: int) -> Iterator[tuple[NDArray[np.int64], tuple[int, ...]]]:
    """Rows of images whose jitters come in the same order, at most ``limit`` at a time, and that order, maybe none."""
    orders = np.where(draws[:, Draw.JITTER] > 0, draws[:, Draw.ORDER], -1).astype(np.int64)
    sorted_rows = orders.argsort(kind="stable")
    borders = np.flatnonzero(np.diff(orders[sorted_rows])) + 1
    for group in np.split(sorted_rows, borders):
        order = orders[group[0]]
        for start in range(0, len(group), limit):
            yield group[start : start + limit], (ORDERS[order] if order >= 0 else ())


def _take(values: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """Some rows, not copied where it is one."""
    if len(rows) == 1:
        return values[rows[0] : rows[0] + 1]
    return values.index_select(0, torch.from_numpy(rows))


def _where_drawn(x: Tensor, flags: NDArray[np.bool_], function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """``function`` of the images whose flag is set, in place where they are not all."""
    if flags.all():
        return function(x, *parameters)
    if flags.any():
        chosen = torch.from_numpy(flags.nonzero()[0])
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
    if augmentation.grey > 0:
        x = _select(x, draws[:, Draw.GREY], grey)
    if augmentation.channel_drop > 0:
        x = drop_channels(x, draws)
    if augmentation.blur > 0:
        blur = _clipped_blur(blur_by_matrices, augmentation)
        x = _select(x, draws[:, Draw.BLUR], blur, draws[:, Draw.SIGMA])
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


def _clipped_blur(blur: Callable[..., Tensor], augmentation: Augmentation) -> Callable[[Tensor, Tensor], Tensor]:
    padding = "constant" if augmentation.color_ops == "google" else "reflect"
    return lambda x, sigma: blur(x, sigma, padding).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def grey(x: Tensor) -> Tensor:
    """Every channel replaced by the luma."""
    return luma(x).repeat(1, 3, 1, 1)


def drop_channels(x: Tensor, draws: Tensor) -> Tensor:
    """Some channels set to 0, by draws (B, P) that have them."""
    return x * (1 - draws[:, ChannelDraw.DROP.columns(x.shape[1]), None, None])


def scale_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def add_brightness(x: Tensor, delta: Tensor) -> Tensor:
    """SimCLR v1's brightness (data_util.py, random_brightness with impl='simclrv1')."""
    return x + delta


def contrast_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's contrast: away from the mean luma of the image."""
    return _away_from(luma(x.mean((2, 3), keepdim=True)), x, factor)


def contrast_by_channel(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's contrast (tf.image.adjust_contrast): away from the mean of each channel."""
    return _away_from(x.mean((2, 3), keepdim=True), x, factor)


def saturation_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's saturation: away from the grey image."""
    return _away_from(luma(x), x, factor)


def _away_from(centre: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``centre + factor * (x - centre)``. torch.lerp says the same and takes four times as long on a CPU."""
    rest = centre * (1 - factor)
    if x.device.type == "cpu" and factor.numel() == 1:
        return torch.add(rest, x, alpha=factor.item())
    return (x * factor).add_(rest)


def saturation_in_hsv(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's saturation (tf.image.adjust_saturation): S of HSV times the factor, at most 1.

    With V and hue fixed, a channel's distance from V = max(R, G, B) is proportional to S.
    """
    value, low = _extremes(x)
    # S' / S = min(factor, 1 / S) with S = (V - min) / V; a grey pixel has no distance to scale.
    ratio = torch.minimum(value / (value - low).clamp(min=torch.finfo(x.dtype).tiny), factor[:, 0])[:, None]
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
    value, low = _extremes(x)
    chroma = value.sub_(low)
    distance = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).add_(1)
    hue = torch.copysign(distance, green - blue)[:, None]
    shift = 6 * turns
    # 3 - ||h| - 3| is the distance from red on the circle of six while |h| <= 7.
    around = 6 * (shift < 0)
    to_channels = torch.cat((shift, shift - 2 + around, shift - 4 + around), 1)
    beyond = (hue + to_channels).abs_().sub_(3).abs_().clamp_(1, 2)
    return beyond.mul_(chroma[:, None]).add_(low.sub_(chroma)[:, None])


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest of three channels, each (B, H, W)."""
    red, green, blue = x.unbind(1)
    return torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)


def blur_kernel_size(image_size: int) -> int:
    """About a tenth of the image and odd: 23 at 224 px (SimCLR, appendix A; data_util.py, random_blur)."""
    return 2 * (image_size // 10 // 2) + 1


def blur_in_blocks(x: Tensor, sigma: Tensor, padding: str) -> Tensor:
    """Gaussian blur, separable, with a standard deviation for each image, as a CPU likes it.

    A convolution with a kernel for each image is slow on every device. Here each direction is a product with the
    banded matrix of the convolution, block by block along the band: zeros would cost time.

    Args:
        x: (B, C, H, W).
        sigma: (B,) in pixels.
        padding: "reflect" (torchvision) or "constant" (zeros, Google's 'SAME').
    """
    half = blur_kernel_size(x.shape[-2]) // 2
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for image, kernel, deviation, result in zip(x, _kernels(sigma, half), sigma.tolist(), out, strict=True):
        reach = min(half, math.ceil(_BLUR_REACH * deviation))
        _blur_one_in_blocks(image, kernel[half - reach : half + reach + 1], padding, result)
    return out


def blur_by_matrices(x: Tensor, sigma: Tensor, padding: str) -> Tensor:
    """:func:`blur_in_blocks` with whole matrices and without a look at ``sigma``, as an accelerator likes it."""
    kernels = _kernels(sigma, blur_kernel_size(x.shape[-2]) // 2)
    down, across = (_blur_matrix(kernels, size, padding)[:, None] for size in x.shape[-2:])
    return down @ x @ across.mT


def _kernels(sigma: Tensor, half: int) -> Tensor:
    """(B,) -> (B, 2 * half + 1)."""
    offsets = torch.arange(-half, half + 1, device=sigma.device, dtype=sigma.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    return kernels / kernels.sum(1, keepdim=True)


def _moved(kernel: Tensor, size: int) -> Tensor:
    """(..., K) -> (..., size, size + K - 1): row i is the kernel moved by i."""
    return F.pad(kernel, (size - 1, size - 1)).unfold(-1, size + kernel.shape[-1] - 1, 1).flip(-2)


def _blur_matrix(kernel: Tensor, size: int, padding: str) -> Tensor:
    """(B, K) -> (B, size, size): the convolution along one axis, weights beyond a border folded back or left out."""
    half = kernel.shape[1] // 2
    weights = _moved(kernel, size)
    inside = weights[..., half : half + size]
    if padding == "reflect":
        beyond = [weights[..., :half].flip(-1), weights[..., half + size :].flip(-1)]
        inside = inside + F.pad(beyond[0], (1, size - 1 - half)) + F.pad(beyond[1], (size - 1 - half, 1))
    return inside


def _blur_one_in_blocks(image: Tensor, kernel: Tensor, padding: str, out: Tensor) -> None:
    """One image (C, H, W) with one kernel. The blocks of rows, or of columns, share weights and are one product."""
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
    wide = out if width == across * block else out.new_empty(channels, height, across * block)
    wide.view(channels * height, across, block).copy_(blurred.transpose(0, 1))
    if wide is not out:
        out.copy_(wide[..., :width])
