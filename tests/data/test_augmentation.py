"""The augmentation's settings: the paper's presets, and one line for each mistake."""

import dataclasses
import math
from typing import Any

import pytest

from simclr_scale.data.augmentation import PRESETS, Augmentation, resolve
from simclr_scale.errors import InputError


def test_natural_is_the_papers_recipe_for_imagenet() -> None:
    """SimCLR, appendix A, and data_util.py of google-research/simclr."""
    assert dataclasses.asdict(resolve("natural", {})) == {
        "crop_scale": (0.08, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "jitter": 0.8,
        "strength": 1.0,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "brightness_mode": "multiplicative",
        "per_channel": False,
        "grey": 0.2,
        "channel_drop": 0.0,
        "blur": 0.5,
        "blur_sigma": (0.1, 2.0),
        "blur_per": "image",
        "color_ops": "torchvision",
        "crop_sampling": "torchvision",
        "evaluation_crop": 0.875,
    }


def test_small_is_the_papers_recipe_for_cifar() -> None:
    """SimCLR, appendix B.9: half the strength, no blur; the evaluation keeps the whole image."""
    assert PRESETS["small"] == dataclasses.replace(PRESETS["natural"], strength=0.5, blur=0.0, evaluation_crop=1.0)


def test_overrides_replace_single_fields() -> None:
    changed = resolve("small", {"strength": 1.0, "crop_scale": (0.2, 0.9)})
    assert changed == dataclasses.replace(PRESETS["small"], strength=1.0, crop_scale=(0.2, 0.9))
    assert PRESETS["small"].strength == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, value)
            for name in ("flip", "jitter", "grey", "channel_drop", "blur")
            for value in (-0.1, 1.1, math.nan)
        ),
        *(
            (name, value)
            for name in ("strength", "brightness", "contrast", "saturation", "hue")
            for value in (-0.1, math.nan, math.inf)
        ),
        *(
            (name, value)
            for name in ("crop_scale", "crop_ratio", "blur_sigma")
            for value in ((0.0, 1.0), (0.9, 0.8), (-1.0, 1.0), (0.5, math.inf), (math.nan, 1.0))
        ),
        ("crop_scale", (0.5, 1.01)),
        ("evaluation_crop", 0.0),
        ("evaluation_crop", 1.01),
        ("color_ops", "tensorflow"),
        ("crop_sampling", "timm"),
        ("brightness_mode", "v1"),
        ("blur_per", "replica"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"augmentation\.{field} .*, got ") as caught:
        resolve("natural", {field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fine",
    [
        {"flip": 0.0, "jitter": 1.0, "grey": 0.0, "blur": 1.0},
        {"strength": 0.0},
        {"blur_per": "batch", "per_channel": True, "channel_drop": 1.0},
        {"strength": 2.5, "hue": 0.2},
        {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "blur_sigma": (0.5, 0.5)},
        {"evaluation_crop": 1.0},
        {"color_ops": "google", "crop_sampling": "google", "brightness_mode": "additive"},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(fine: dict[str, Any]) -> None:
    assert resolve("natural", fine) == dataclasses.replace(Augmentation(), **fine)


def test_hue_turns_at_most_half_the_circle() -> None:
    with pytest.raises(InputError, match=r"strength \* hue is at most half a turn \(\.5\), got 0\.6"):
        resolve("natural", {"strength": 3.0})
    with pytest.raises(InputError, match=r"got 0\.75"):
        resolve("small", {"hue": 1.5})


def test_unknown_preset_and_field_are_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match="unknown preset 'imagenet'; there are natural, small, grey, multiband"):
        resolve("imagenet", {})
    with pytest.raises(InputError, match=r"no field 'strenght'; it has .*strength"):
        resolve("natural", {"strenght": 0.5})


def test_additive_brightness_is_googles_alone() -> None:
    assert resolve("natural", {"brightness_mode": "additive", "color_ops": "google"}).brightness_mode == "additive"
    with pytest.raises(InputError, match="color_ops google"):
        resolve("natural", {"brightness_mode": "additive"})


# Channels.


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_the_images_that_it_is_for(preset: Any) -> None:
    for channels in {"natural": [3], "small": [3], "grey": [1, 3, 4], "multiband": [2, 3, 8, 200]}[preset]:
        resolve(preset, {}).require_channels(channels)


def test_grey_and_multiband_leave_colors_alone() -> None:
    for preset in ("grey", "multiband"):
        augmentation = PRESETS[preset]
        assert (augmentation.hue, augmentation.saturation, augmentation.grey) == (0, 0, 0)
        assert augmentation.jitter * augmentation.strength * augmentation.brightness * augmentation.contrast > 0
    assert PRESETS["multiband"].per_channel
    assert 0 < PRESETS["multiband"].channel_drop < 0.5


@pytest.mark.parametrize("field", ["hue", "saturation", "grey"])
@pytest.mark.parametrize(("channels", "number", "right"), [(1, "1 channel", "grey"), (8, "8 channels", "multiband")])
def test_a_color_operation_without_colors_is_refused(field: str, channels: int, number: str, right: str) -> None:
    augmentation = resolve("grey", {field: 0.25})
    augmentation.require_channels(3)
    expected = f"augmentation.{field} 0.25 is for red, green and blue, but the images have {number}; set it to 0, or "
    with pytest.raises(InputError, match=rf"^{expected}take data\.preset {right}$"):
        augmentation.require_channels(channels)


def test_the_only_channel_is_not_to_be_dropped() -> None:
    with pytest.raises(InputError, match=r"channel_drop 0\.1 .*; set it to 0, or take data\.preset grey$"):
        PRESETS["multiband"].require_channels(1)
    PRESETS["multiband"].require_channels(2)


@pytest.mark.parametrize("off", [{"jitter": 0.0}, {"strength": 0.0}])
def test_jitters_that_never_happen_are_no_mistake(off: dict[str, Any]) -> None:
    resolve("natural", {"grey": 0.0, **off}).require_channels(1)
