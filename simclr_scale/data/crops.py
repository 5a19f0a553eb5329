"""Random resized crops: where they lie, and how they are cut and resized."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simclr_scale.data.augmentation import Augmentation

# TensorFlow's limit; torchvision's (10) uses the first ten of the same numbers.
MAX_TRIES = 100
_TORCHVISION_TRIES = 10
_MIN_OBJECT_COVERED = 0.1
_CUT_BYTES_ON_CPU = 512 << 10


def sample_boxes(
    uniforms: NDArray[np.float64], sizes: NDArray[np.int64], augmentation: Augmentation
) -> NDArray[np.float64]:
    """Crop boxes of the field's two distributions.

    Args:
        uniforms: (..., 2 * MAX_TRIES + 2) numbers in [0, 1): two for each try, two for the position.
        sizes: (..., 2) height and width of the images.

    Returns:
        (..., 4) top, left, height, width in whole pixels.
    """
    tries, position = uniforms[..., :-2].reshape(*uniforms.shape[:-1], MAX_TRIES, 2), uniforms[..., -2:]
    sample = _google_sizes if augmentation.crop_sampling == "google" else _torchvision_sizes
    heights, widths, valid, fallback = sample(tries, sizes[..., None, :], augmentation)
    first = np.asarray(valid.argmax(-1))[..., None]
    found = np.asarray(valid.any(-1))
    box = np.stack([np.take_along_axis(part, first, -1)[..., 0] for part in (heights, widths)], -1)
    room = np.broadcast_to(sizes, box.shape) - box
    # TensorFlow never draws the last place, torchvision does.
    places = room if augmentation.crop_sampling == "google" else room + 1
    corner = np.floor(position * places)
    corner = np.where(found[..., None], corner, (np.broadcast_to(sizes, box.shape) - fallback) // 2)
    return np.concatenate([corner, np.where(found[..., None], box, fallback)], -1)


def _torchvision_sizes(
    tries: NDArray[np.float64], sizes: NDArray[np.int64], a: Augmentation
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Area uniform, aspect log-uniform, ten tries, else the largest centre crop of an allowed aspect.

    torchvision/transforms/transforms.py, RandomResizedCrop.get_params.
    """
    tries = tries[..., :_TORCHVISION_TRIES, :]
    height, width = sizes[..., 0], sizes[..., 1]
    area = height * width * (a.crop_scale[0] + (a.crop_scale[1] - a.crop_scale[0]) * tries[..., 0])
    log_low, log_high = np.log(a.crop_ratio)
    ratio = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    valid = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)

    height, width = height[..., 0].astype(float), width[..., 0].astype(float)
    bounded = np.clip(width / height, *a.crop_ratio)
    fallback = np.stack(
        [np.minimum(height, np.rint(width / bounded)), np.minimum(width, np.rint(height * bounded))], -1
    )
    return heights, widths, valid, np.broadcast_to(fallback, (*tries.shape[:-2], 2))


def _google_sizes(
    tries: NDArray[np.float64], sizes: NDArray[np.int64], a: Augmentation
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Aspect uniform, then height uniform among those whose area is allowed; a hundred tries, else the whole image.

    The sampling of tf.image.sample_distorted_bounding_box, as SimCLR calls it (data_util.py, distorted bounding box
    crop with min_object_covered .1 and the whole image as the only object).
    """
    height, width = sizes[..., 0], sizes[..., 1]
    aspect = a.crop_ratio[0] + (a.crop_ratio[1] - a.crop_ratio[0]) * tries[..., 0]
    least, most = a.crop_scale[0] * width * height, a.crop_scale[1] * width * height
    highest = np.rint(np.sqrt(most / aspect))
    highest = np.where(np.rint(highest * aspect) > width, np.floor((width + 0.5 - 1e-7) / aspect), highest)
    highest = np.minimum(np.where(np.rint(highest * aspect) > width, highest - 1, highest), height)
    lowest = np.minimum(np.rint(np.sqrt(least / aspect)), highest)
    heights = lowest + np.floor(tries[..., 1] * (highest - lowest + 1))
    # Rounding may leave the allowed areas by one row.
    for beyond, correction in ((np.less, 1), (np.greater, -1)):
        bound = least if correction > 0 else most
        heights = np.where(beyond(heights * np.rint(heights * aspect), bound), heights + correction, heights)
    widths = np.rint(heights * aspect)
    areas = heights * widths
    valid = (areas >= np.maximum(least, _MIN_OBJECT_COVERED * height * width)) & (areas <= most)
    valid &= (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    return heights, widths, valid, np.broadcast_to(sizes[..., 0, :].astype(float), (*tries.shape[:-2], 2))


def cut(image: Tensor, box: NDArray[np.float32], size: int) -> Tensor:
    """One crop of one image, bicubic and antialiased: (C, H, W) uint8 -> (C, size, size) uint8.

    Fastest where the channels of a pixel lie side by side in memory, as they then do in the result.
    """
    top, left, height, width = (int(value) for value in box)
    # Not image[None]: the stride of its first dimension would hide the memory format, and cost a third more.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    crop = batch[..., top : top + height, left : left + width]
    resized = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    return resized if resized.dtype == torch.uint8 else resized.clamp_(0, 255)


def cut_batch(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of many equally large images at once, on their device: :func:`cut` without its rounding.

    Resizing is linear and separable, so each crop is a product with two small matrices. On bytes, the resize behind
    :func:`cut` also rounds and clips between its two passes, which shows where a sharp edge overshoots black or white.

    Args:
        images: (B, C, H, W), uint8 or float32 in [0, 255].
        boxes: (B, V, 4) top, left, height, width in pixels.

    Returns:
        (B, V, C, size, size) float32 in [0, 255].
    """
    if images.device.type != "cpu":
        return _cut_together(images, boxes, size)
    # A part and its intermediate results stay in the processor's cache.
    part = max(1, _CUT_BYTES_ON_CPU // (4 * images[0].numel() * boxes.shape[1]))
    out = torch.empty((*boxes.shape[:2], images.shape[1], size, size))
    for some, their_boxes, result in zip(images.split(part), boxes.split(part), out.split(part), strict=True):
        result.copy_(_cut_together(some, their_boxes, size))
    return out


def _cut_together(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    batch, channels, height, width = images.shape
    views = boxes.shape[1]
    rows = _resampling_matrix(boxes[..., 0], boxes[..., 2], height, size).flatten(1, 2)
    columns = _resampling_matrix(boxes[..., 1], boxes[..., 3], width, size).flatten(0, 1)
    # Rows first, of all views and channels of an image in one product; then columns, of all rows of a view in one.
    lines = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(2)
    resized = torch.bmm(rows, lines).view(batch * views, size * channels, width)
    resized = torch.bmm(resized, columns.mT).view(batch, views, size, channels, size)
    return resized.transpose(2, 3).clamp(0, 255)


def _resampling_matrix(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """Weights (..., out_size, in_size) of an antialiased bicubic resize of ``length`` pixels from ``start``.

    Keys' cubic convolution kernel with a = -.5 (1981), widened by the scale where the image shrinks, as in Pillow and
    in torch's antialiased resize.
    """
    start, length = start[..., None, None], length[..., None, None]
    scale = length / out_size
    pixel = torch.arange(in_size, device=start.device, dtype=torch.float32) - start
    centre = (torch.arange(out_size, device=start.device, dtype=torch.float32)[:, None] + 0.5) * scale
    distance = (pixel + 0.5 - centre).abs_().div_(scale.clamp(min=1))
    # Both cubics are 0 at 1, and the outer one at 2: each within its own interval, they need only be added.
    near, far = distance.clamp(max=1), distance.clamp_(1, 2)
    weights = (1.5 * near).sub_(2.5).mul_(near).mul_(near).add_(1)
    weights += (-0.5 * far).add_(2.5).mul_(far).sub_(4).mul_(far).add_(2)
    weights *= (pixel >= 0) & (pixel < length)
    return weights / weights.sum(-1, keepdim=True)
