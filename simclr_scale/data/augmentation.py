"""The settings of SimCLR's augmentation, and the presets for kinds of images."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, get_type_hints

from simclr_scale.errors import InputError

ColorOps = Literal["torchvision", "google"]
CropSampling = Literal["torchvision", "google"]
BrightnessMode = Literal["multiplicative", "additive"]
BlurPer = Literal["image", "batch"]
Preset = Literal["natural", "small", "grey", "multiband"]

_CHOICES = {
    "color_ops": ColorOps,
    "crop_sampling": CropSampling,
    "brightness_mode": BrightnessMode,
    "blur_per": BlurPer,
}


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, colour jitter, grey and blur (SimCLR, appendix A; defaults are those for ImageNet).

    Attributes:
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of width / height of the crop.
        flip: probability of a horizontal flip.
        jitter: probability that an image's colours are jittered.
        strength: s; the four amounts below are multiplied by it ("color distortion strength", 1 or .5 for CIFAR-10).
        brightness, contrast, saturation: factors are uniform in [max(0, 1 - s * amount), 1 + s * amount].
        hue: the shift is uniform in [-s * hue, s * hue] turns of the colour circle; at most half a turn.
        brightness_mode: "multiplicative" (SimCLRv2, torchvision) or "additive" (SimCLR v1), for Google's operations.
        per_channel: whether each channel has brightness and contrast factors of its own, for images whose channels are
            no colours.
        grey: probability of dropping colour.
        channel_drop: probability of a channel to be set to 0, each by itself; one is always left.
        blur: probability of a Gaussian blur, with a kernel of a tenth of the image's size.
        blur_sigma: range of its standard deviation in pixels, uniform.
        blur_per: whether the standard deviation is drawn for each "image", or once for each view of a global "batch",
            as Google's code does for the batch of a replica. Which images are blurred is up to each image.
        color_ops: whose definition of contrast, saturation and blur's border: torchvision's or Google's.
        crop_sampling: whose distribution of crops: torchvision's or Google's (TensorFlow's).
        evaluation_crop: share of the resized image that evaluation keeps, centred; 1 keeps all.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    strength: float = 1.0
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    brightness_mode: BrightnessMode = "multiplicative"
    per_channel: bool = False
    grey: float = 0.2
    channel_drop: float = 0.0
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_per: BlurPer = "image"
    color_ops: ColorOps = "torchvision"
    crop_sampling: CropSampling = "torchvision"
    evaluation_crop: float = 0.875

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "channel_drop", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augmentation.{name} is a probability, 0 to 1, got {getattr(self, name)}")
        for name in ("strength", "brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"augmentation.{name} must be 0 or above, got {getattr(self, name)}")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise InputError(f"augmentation.{name} must be a range 0 < low <= high, got [{low}, {high}]")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"augmentation.{name} is {' or '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.brightness_mode == "additive" and self.color_ops != "google":
            raise InputError("augmentation.brightness_mode additive is Google's: it needs color_ops google")
        if self.crop_scale[1] > 1:
            raise InputError(f"augmentation.crop_scale is a share of the image, at most 1, got {self.crop_scale[1]}")
        if self.strength * self.hue > 0.5:
            raise InputError(f"strength * hue is at most half a turn (.5), got {self.strength * self.hue:g}")
        if not 0 < self.evaluation_crop <= 1:
            raise InputError(f"augmentation.evaluation_crop is a share above 0, up to 1, got {self.evaluation_crop}")

    def require_channels(self, channels: int) -> None:
        """Checks that every operation makes sense for images of that many channels; nothing is left out in silence.

        Raises:
            InputError: a colour operation where the channels are not red, green and blue, or a channel to drop where
                there is only one; it names the setting and what would be right.
        """
        preset = "grey" if channels == 1 else "multiband"
        instead = f"set it to 0, or take data.preset {preset}"
        number = "1 channel" if channels == 1 else f"{channels} channels"
        in_use = {
            "hue": self.jitter * self.strength * self.hue,
            "saturation": self.jitter * self.strength * self.saturation,
            "grey": self.grey,
        }
        for name, amount in in_use.items():
            if channels != 3 and amount > 0:
                raise InputError(
                    f"augmentation.{name} {getattr(self, name)} is for red, green and blue, but the images have "
                    f"{number}; {instead}"
                )
        if channels == 1 and self.channel_drop > 0:
            raise InputError(
                f"augmentation.channel_drop {self.channel_drop} leaves one channel at least, and the images have "
                f"no other; {instead}"
            )


PRESETS: dict[str, Augmentation] = {
    # SimCLR's recipe for ImageNet.
    "natural": Augmentation(),
    # "we do not use Gaussian blur ... color distortion strength 0.5" for CIFAR-10: SimCLR, appendix B.9.
    "small": Augmentation(strength=0.5, blur=0.0, evaluation_crop=1.0),
    # One channel, such as X-rays: "natural" without colours. What matters may lie at the edge, so evaluation keeps all.
    "grey": Augmentation(saturation=0.0, hue=0.0, grey=0.0, evaluation_crop=1.0),
    # Channels that are no colours: satellites, hyperspectral cameras. Factors of each channel bend the spectrum, which
    # is most of what such images say, hence half the strength.
    "multiband": Augmentation(
        strength=0.5,
        per_channel=True,
        saturation=0.0,
        hue=0.0,
        grey=0.0,
        channel_drop=0.1,
        evaluation_crop=1.0,
    ),
}

if TYPE_CHECKING:
    Overrides = dict[str, Any]
else:
    # Built from the dataclass, so that the command line checks names and types without a second list of fields.
    Overrides = TypedDict("Overrides", get_type_hints(Augmentation), total=False)


def resolve(preset: str, overrides: Overrides) -> Augmentation:
    """The preset with some fields replaced.

    Raises:
        InputError: unknown preset or field, or a value out of range.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    known = {field.name for field in dataclasses.fields(Augmentation)}
    if unknown := set(overrides) - known:
        raise InputError(f"augmentation has no field {min(unknown)!r}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(PRESETS[preset], **overrides)
