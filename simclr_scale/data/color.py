"""Flip, colour jitter, grey and blur of both views: pure functions of pixels and draws, on any device.

Two definitions of the colour operations are in use. torchvision blends contrast towards one grey mean and saturation
towards the grey image; Google's code (TensorFlow) blends contrast towards the mean of each channel and scales
saturation in HSV, and pads the blur with zeros where torchvision reflects. SimCLR was published with Google's.
"""

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.draws import Draw

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))

# ITU-R 601 luma, as both torchvision and TensorFlow use it.
_LUMA = (0.2989, 0.587, 0.114)
# Intermediate images of a chunk stay in the processor's cache; one large batch would fault in fresh memory for each.
_CHUNK_BYTES_ON_CPU = 4 << 20


def augment_colors(views: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Flips, jitters, greys and blurs each view by its own draws.

    Args:
        views: (B, 2, 3, H, W), uint8 or float32 in [0, 255].
        draws: (B, 2, P), see :class:`simclr_scale.data.draws.Draw`.

    Returns:
        (2B, 3, H, W) float32 in [0, 1]: all first views, then all second views.
    """
    x = views.transpose(0, 1).flatten(0, 1) / 255
    draws = draws.transpose(0, 1).flatten(0, 1)
    if x.device.type != "cpu":
        return _augment(x, draws, augmentation)
    chunk = max(1, _CHUNK_BYTES_ON_CPU // (x[0].numel() * x.element_size()))
    for part, part_draws in zip(x.split(chunk), draws.split(chunk), strict=True):
        part.copy_(_augment(part, part_draws, augmentation))
    return x


def _augment(x: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    x = torch.where(_flag(draws, Draw.FLIP), x.flip(-1), x)
    x = jitter(x, draws, augmentation)
    x = torch.where(_flag(draws, Draw.GREY), grey(x), x).clamp_(0, 1)
    if augmentation.blur > 0:
        chosen = draws[:, Draw.BLUR].nonzero()[:, 0]
        if len(chosen):
            padding = "constant" if augmentation.color_ops == "google" else "reflect"
            x[chosen] = blur(x[chosen], draws[chosen, Draw.SIGMA], padding).clamp_(0, 1)
    return x


def _flag(draws: Tensor, column: Draw) -> Tensor:
    return draws[:, column, None, None, None] > 0


def jitter(x: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """The four jitters, in an order of each image's own, clipped to [0, 1] after each (SimCLR, appendix A)."""
    jittered = draws[:, Draw.JITTER] > 0
    orders = torch.tensor(ORDERS, device=x.device)[draws[:, Draw.ORDER].long()]
    google = augmentation.color_ops == "google"
    additive = google and augmentation.brightness_mode == "additive"
    operations = {
        BRIGHTNESS: (add_brightness if additive else scale_brightness, Draw.BRIGHTNESS),
        CONTRAST: (contrast_by_channel if google else contrast_by_grey, Draw.CONTRAST),
        SATURATION: (saturation_in_hsv if google else saturation_by_grey, Draw.SATURATION),
        HUE: (shift_hue, Draw.HUE),
    }
    x = x.clone()
    for place in range(len(operations)):
        for operation, (function, column) in operations.items():
            chosen = (jittered & (orders[:, place] == operation)).nonzero()[:, 0]
            if len(chosen):
                x[chosen] = function(x[chosen], draws[chosen, column, None, None, None]).clamp_(0, 1)
    return x


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = x.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


def grey(x: Tensor) -> Tensor:
    """Every channel replaced by the luma."""
    return luma(x).expand_as(x)


def scale_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def add_brightness(x: Tensor, delta: Tensor) -> Tensor:
    """SimCLR v1's brightness (data_util.py, random_brightness with impl='simclrv1')."""
    return x + delta


def contrast_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's contrast: away from the mean luma of the image."""
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, factor)


def contrast_by_channel(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's contrast (tf.image.adjust_contrast): away from the mean of each channel."""
    return torch.lerp(x.mean((2, 3), keepdim=True), x, factor)


def saturation_by_grey(x: Tensor, factor: Tensor) -> Tensor:
    """torchvision's saturation: away from the grey image."""
    return torch.lerp(luma(x), x, factor)


def saturation_in_hsv(x: Tensor, factor: Tensor) -> Tensor:
    """TensorFlow's saturation (tf.image.adjust_saturation): S of HSV times the factor, at most 1.

    With V and hue fixed, a channel's distance from V = max(R, G, B) is proportional to S.
    """
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    # S' / S = min(factor, 1 / S) with S = chroma / V; a grey pixel has no distance to scale.
    ratio = torch.minimum(factor, value / chroma.clamp(min=torch.finfo(x.dtype).tiny))
    return value - (value - x) * ratio


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of HSV by ``turns`` of a full circle, S and V unchanged, without a detour through HSV.

    Each channel is V - chroma * t, where t is a trapezoid of the hue, shifted by a third of a turn between channels.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = chroma.clamp(min=torch.finfo(x.dtype).tiny)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = hue + 6 * turns[:, :, 0]
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(offset + sextant, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def blur_kernel_size(image_size: int) -> int:
    """About a tenth of the image and odd: 23 at 224 px (SimCLR, appendix A; data_util.py, random_blur)."""
    return 2 * (image_size // 10 // 2) + 1


def blur(x: Tensor, sigma: Tensor, padding: str) -> Tensor:
    """Gaussian blur, separable, with a standard deviation for each image.

    Args:
        x: (B, C, H, W).
        sigma: (B,) in pixels.
        padding: "reflect" (torchvision) or "constant" (zeros, Google's 'SAME').
    """
    batch, channels, height, width = x.shape
    size = blur_kernel_size(height)
    half = size // 2
    offsets = torch.arange(-half, half + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    padded = F.pad(x, [half] * 4, mode=padding).reshape(1, batch * channels, height + 2 * half, width + 2 * half)
    rows = F.conv2d(padded, kernel[:, :, :, None], groups=batch * channels)
    return F.conv2d(rows, kernel[:, :, None, :], groups=batch * channels).view_as(x)
