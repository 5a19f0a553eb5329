"""The gradient noise scale: how large a batch still pays."""

from simclr_scale.scaling.noise_scale.callback import GradientNoiseScale
from simclr_scale.scaling.noise_scale.estimates import NoiseScale

__all__ = ["GradientNoiseScale", "NoiseScale"]
