"""The deterministic transform that goes with an encoder, from a picture to a tensor."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from simclr_scale.data.sources.decoding import to_rgb
from simclr_scale.errors import InputError

_COLOR_MODES = {1: "L", 3: "RGB"}
_SETTINGS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


class ImageTransform:
    """Resize, centre crop and normalise a picture as timm does, from settings that can be saved.

    The defaults are SimCLR's: bicubic, a centre crop of .875, pixels in [0, 1] without mean and standard deviation
    (google-research/simclr, data_util.py).

    Args:
        input_size: (C, H, W) of the result; C is 1 or 3, and pictures are converted to that many channels.
        crop_pct: share of the resized picture's side that the centre crop keeps.
        crop_mode: timm's "center" or "squash" (resize both sides, whatever the aspect).
    """

    def __init__(
        self,
        input_size: tuple[int, int, int] = (3, 224, 224),
        *,
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        channels = input_size[0]
        if channels not in _COLOR_MODES:
            raise InputError(
                f"a picture has 1 or 3 channels, not {channels}: {tuple(input_size)} cannot be its input size"
            )
        self.config: dict[str, Any] = {
            "input_size": tuple(input_size),
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "mean": tuple(mean)[:channels],
            "std": tuple(std)[:channels],
        }
        self._transform = create_transform(**self.config, is_training=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageTransform":
        """From the settings among others in timm's `pretrained_cfg`; KeyError where one is missing."""
        return cls(**{name: config[name] for name in _SETTINGS})

    def __call__(self, image: Image.Image) -> Tensor:
        """Picture -> (C, H, W) float32; it is read as in training, upright and with transparency on white."""
        return self._transform(to_rgb(image).convert(_COLOR_MODES[self.config["input_size"][0]]))

    def __repr__(self) -> str:
        return f"ImageTransform({', '.join(f'{key}={value}' for key, value in self.config.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTransform) and self.config == other.config

    def __hash__(self) -> int:
        return hash(repr(self))
