"""The deterministic transform that goes with an encoder, from a picture or an array to a tensor."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from simclr_scale.data.crops import cut
from simclr_scale.data.pixels import WHITE, ValueRange, to_pixels
from simclr_scale.data.sources.decoding import to_rgb
from simclr_scale.data.sources.grey import to_grey
from simclr_scale.errors import InputError

_PICTURES = {1: to_grey, 3: to_rgb}
_BANDS_IN_FULL = 4
_SETTINGS = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


class ImageTransform:
    """Resize, centre crop and normalise an image as timm does, from settings that can be saved.

    Pictures of 8 bits go through Pillow, as in timm. Deeper ones and arrays become pixels by the value range of the
    encoder's training and are then resized and cut to the same size by torch.

    The defaults are SimCLR's: bicubic, a centre crop of .875, pixels in [0, 1] without mean and standard deviation
    (google-research/simclr, data_util.py).

    Args:
        input_size: (C, H, W) of the result. Pictures are converted to 1 or 3 channels; arrays need to have C.
        crop_pct: share of the resized picture's side that the centre crop keeps.
        crop_mode: timm's "center" or "squash" (resize both sides, whatever the aspect).
        mean, std: of each channel; None: 0 and 1.
        value_range: of arrays and 16-bit pictures, see ``simclr_scale.data.pixels``.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int] = (3, 224, 224),
        *,
        crop_pct: float = 0.875,
        crop_mode: str = "center",
        interpolation: str = "bicubic",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: ValueRange | None = None,
    ) -> None:
        channels = input_size[0]
        if value_range is not None and len(value_range) not in (1, channels):
            raise InputError(f"a value range of {len(value_range)} channels does not fit images of {channels}")
        self.value_range = value_range
        self.config: dict[str, Any] = {
            "input_size": tuple(input_size),
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "interpolation": interpolation,
            "mean": tuple(mean or (0.0,) * channels)[:channels],
            "std": tuple(std or (1.0,) * channels)[:channels],
        }
        self._transform = create_transform(**self.config, is_training=False)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], value_range: Sequence[Sequence[float]] | None = None
    ) -> "ImageTransform":
        """From the settings among others in timm's `pretrained_cfg`; KeyError where one is missing.

        The value range is apart, as timm has no place for it.
        """
        pairs = None if value_range is None else tuple((float(low), float(high)) for low, high in value_range)
        return cls(**{name: config[name] for name in _SETTINGS}, value_range=pairs)

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.config["input_size"][0]

    def with_value_range(self, value_range: ValueRange | None) -> "ImageTransform":
        """The same with another range."""
        return ImageTransform(**self.config, value_range=value_range)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Picture, or raw values (C, H, W), -> (C, H, W) float32.

        A picture is read as in training, upright and with transparency on white.

        Raises:
            InputError: an array of another number of channels, or a picture where neither 1 nor 3 are wanted.
        """
        image = self._of_our_channels(image)
        if isinstance(image, Image.Image) and not image.mode.startswith("I"):
            return self._transform(image)
        return self._resize_and_cut(to_pixels(image, self.value_range))

    def cropped(self, image: Image.Image | Tensor, box: NDArray[np.float32], *, flip: bool = False) -> Tensor:
        """The part of an image at `box` instead of its centre, resized and normalised: (C, H, W) float32, H = W.

        Bicubic and antialiased, as in training. For evaluations that augment.

        Args:
            image: as in a call.
            box: (4,) top, left, height, width in pixels of `image`.
            flip: mirrors the result, left to right.

        Raises:
            InputError: as in a call.
        """
        pixels = to_pixels(self._of_our_channels(image), self.value_range)
        crop = cut(pixels, box, self.config["input_size"][1]).float() / WHITE
        return tv.normalize(crop.flip(-1) if flip else crop, self.config["mean"], self.config["std"])

    def _of_our_channels(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if isinstance(image, Image.Image):
            if self.channels not in _PICTURES:
                raise InputError(f"a picture has 1 or 3 channels, and this encoder takes arrays of {self.channels}")
            return _PICTURES[self.channels](image)
        if len(image) != self.channels:
            raise InputError(f"this encoder takes images of {self.channels} channels, not {len(image)}")
        return image

    def _resize_and_cut(self, pixels: Tensor) -> Tensor:
        """What timm's transform does, on numbers: (C, H, W) in [0, 255] -> (C, height, width) normalised."""
        height, width = self.config["input_size"][1:]
        scaled = [math.floor(side / self.config["crop_pct"]) for side in (height, width)]
        if self.config["crop_mode"] == "squash":
            size = scaled
        else:
            ratio = min(scaled) / min(pixels.shape[-2:])
            size = [int(side * ratio + 1e-6) for side in pixels.shape[-2:]]
        mode = InterpolationMode(self.config["interpolation"])
        resized = tv.resize(pixels.float(), size, mode, antialias=True).clamp_(0, WHITE) / WHITE
        return tv.normalize(tv.center_crop(resized, [height, width]), self.config["mean"], self.config["std"])

    def __repr__(self) -> str:
        settings = dict(self.config)
        if self.value_range is not None:
            settings["value_range"] = _brief(self.value_range)
        if len(set(settings["mean"])) == len(set(settings["std"])) == 1:
            settings |= {name: settings[name][:_BANDS_IN_FULL] for name in ("mean", "std")}
        return f"ImageTransform({', '.join(f'{key}={value}' for key, value in settings.items())})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ImageTransform) and self.config == other.config and self.value_range == other.value_range
        )

    def __hash__(self) -> int:
        return hash(repr(self))


def _brief(value_range: ValueRange) -> str:
    """In full for few channels; for many, what tells it from another range."""
    if len(value_range) <= _BANDS_IN_FULL:
        return str(value_range)
    low, high = min(pair[0] for pair in value_range), max(pair[1] for pair in value_range)
    digest = hashlib.sha256(repr(value_range).encode()).hexdigest()
    return f"({len(value_range)} bands within {low:g} to {high:g}, sha256 {digest[:12]})"
