"""Encoders that learn nothing: what a trained encoder must beat."""

import torch
from torch import Tensor, nn

from simclr_scale.errors import InputError


class PixelEncoder(nn.Module):
    """The pixels themselves: images (B, in_chans, size, size) -> (B, in_chans * size * size).

    Whoever prepares the images resizes them; another size is an InputError.
    """

    def __init__(self, size: int = 16, in_chans: int = 3) -> None:
        super().__init__()
        if size < 1 or in_chans < 1:
            raise InputError(f"pixel encoder: size={size} and in_chans={in_chans} must be at least 1")
        self.image_shape = (in_chans, size, size)
        self.num_features = in_chans * size * size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.image_shape:
            raise InputError(f"pixel encoder: images are {tuple(images.shape[1:])}, not {self.image_shape}")
        return images.flatten(1)


class ColorHistogramEncoder(nn.Module):
    """Joint colour histogram (Swain & Ballard 1991): images (B, in_chans, H, W) in [0, 1] -> (B, bins ** in_chans).

    The joint histogram tells red and cyan halves from black and white ones, which one histogram a channel does not.
    Bins are of equal width, the counts divided by the number of pixels; values outside [0, 1] fall into the outer bins.
    Integer images are an InputError: their range is not known.
    """

    def __init__(self, bins: int = 8, in_chans: int = 3) -> None:
        super().__init__()
        if bins < 1 or in_chans < 1:
            raise InputError(f"colour histogram: bins={bins} and in_chans={in_chans} must be at least 1")
        self.bins = bins
        self.in_chans = in_chans
        self.num_features = bins**in_chans

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            raise InputError(
                f"colour histogram: images are {tuple(images.shape)} {images.dtype}, "
                f"not (B, {self.in_chans}, H, W) of a floating-point type in [0, 1]"
            )
        levels = (images * self.bins).long().clamp(0, self.bins - 1).flatten(2)
        cells = torch.zeros_like(levels[:, 0])
        for channel in range(self.in_chans):
            cells = cells * self.bins + levels[:, channel]
        histogram = images.new_zeros(len(images), self.num_features)
        return histogram.scatter_add_(1, cells, torch.full_like(cells, 1 / cells.shape[1], dtype=images.dtype))


class BandHistogramEncoder(nn.Module):
    """One histogram a channel, side by side: images (B, in_chans, H, W) in [0, 1] -> (B, in_chans * bins).

    For images whose joint histogram says nothing: grey ones, and those of many bands. Bins as in
    `ColorHistogramEncoder`.
    """

    def __init__(self, bins: int = 8, in_chans: int = 1) -> None:
        super().__init__()
        if bins < 1 or in_chans < 1:
            raise InputError(f"band histogram: bins={bins} and in_chans={in_chans} must be at least 1")
        self.bins = bins
        self.in_chans = in_chans
        self.num_features = bins * in_chans

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            raise InputError(
                f"band histogram: images are {tuple(images.shape)} {images.dtype}, "
                f"not (B, {self.in_chans}, H, W) of a floating-point type in [0, 1]"
            )
        cells = (images * self.bins).long().clamp(0, self.bins - 1).flatten(2)
        histogram = images.new_zeros(*cells.shape[:2], self.bins)
        return histogram.scatter_add_(2, cells, torch.full_like(images.flatten(2), 1 / cells.shape[2])).flatten(1)
