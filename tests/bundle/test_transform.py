"""The evaluation transform against the same steps by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale.bundle import ImageTransform
from simclr_scale.errors import InputError

SIZES = [(40, 40), (41, 67), (97, 33), (8, 9)]  # (width, height): square, odd, wide, smaller than the result


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def by_hand(image: Image.Image, size: int, crop_pct: float) -> np.ndarray:
    """Resize the shorter side to size / crop_pct, cut the centre, scale to [0, 1]: (C, size, size)."""
    width, height = image.size
    side = math.floor(size / crop_pct)
    if width <= height:
        resized = image.resize((side, int(side * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(side * width / height), side), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32)
    return np.atleast_3d(pixels).transpose(2, 0, 1) / 255


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_resize_and_centre_crop(size: tuple[int, int], crop_pct: float) -> None:
    image = Image.fromarray(picture(*size))
    transformed = ImageTransform((3, 31, 31), crop_pct=crop_pct)(image)
    assert transformed.shape == (3, 31, 31)
    assert transformed.dtype == torch.float32
    np.testing.assert_array_equal(transformed.numpy(), by_hand(image, 31, crop_pct))


def test_mean_and_deviation() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = Image.fromarray(picture(40, 33))
    transformed = ImageTransform((3, 24, 24), mean=mean, std=std)(image).numpy()
    expected = (by_hand(image, 24, 0.875) - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    np.testing.assert_allclose(transformed, expected, rtol=0, atol=1e-6)


def test_squash_resizes_both_sides_whatever_the_aspect() -> None:
    image = Image.fromarray(picture(57, 21))
    transformed = ImageTransform((3, 16, 16), crop_pct=1.0, crop_mode="squash")(image).numpy()
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_array_equal(transformed, expected)


def test_the_defaults_are_those_of_simclr() -> None:
    assert ImageTransform().config == {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }


def whole(image: Image.Image, channels: int = 3) -> np.ndarray:
    """The picture in levels of 0 to 255, neither resized nor cut."""
    transform = ImageTransform((channels, image.height, image.width), crop_pct=1.0)
    return (transform(image) * 255).numpy().round()


def test_grey_is_repeated_over_the_channels() -> None:
    grey = picture(13, 9, 1)[..., 0]
    np.testing.assert_array_equal(whole(Image.fromarray(grey)), np.stack([grey] * 3))


def test_grey_for_one_channel_is_taken_as_it_is() -> None:
    grey = picture(13, 9, 1)[..., 0]
    np.testing.assert_array_equal(whole(Image.fromarray(grey), channels=1), grey[None])


def test_colour_for_one_channel_is_its_luma() -> None:
    color = picture(13, 9)
    luma = color @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(whole(Image.fromarray(color), channels=1)[0], luma, atol=0.51)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(channels: int) -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (9, 13), dtype=np.uint16)
    np.testing.assert_allclose(whole(Image.fromarray(grey), channels)[-1], grey / 257, atol=0.51)


def test_one_channel_keeps_all_16_bits_within_its_range() -> None:
    grey = np.random.default_rng(0).integers(0, 4096, (9, 13), dtype=np.uint16)
    transform = ImageTransform((1, 9, 13), crop_pct=1.0, value_range=((100.0, 4000.0),))
    expected = (grey.astype(float) - 100) / 3900
    np.testing.assert_allclose(transform(Image.fromarray(grey))[0], expected.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_arrays_are_resized_and_cut_as_pictures_are(size: tuple[int, int], crop_pct: float, crop_mode: str) -> None:
    """Pillow rounds to bytes between its two passes and at the end, so a step of 255 or two may differ."""
    color = np.random.default_rng(0).integers(60, 200, (size[1], size[0], 3), dtype=np.uint8)
    transform = ImageTransform((3, 31, 31), crop_pct=crop_pct, crop_mode=crop_mode)
    of_picture = transform(Image.fromarray(color))
    of_array = transform(torch.from_numpy(color).permute(2, 0, 1))
    assert of_array.shape == (3, 31, 31)
    np.testing.assert_allclose(of_array, of_picture, atol=1.6 / 255)


def test_each_channel_of_an_array_has_its_own_range_mean_and_deviation() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 50, (5, 9, 9)).astype(np.float32))
    ranges = tuple((-10.0 * band, 10.0 * band + 1) for band in range(5))
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)
    transform = ImageTransform((5, 9, 9), crop_pct=1.0, mean=mean, std=std, value_range=ranges)
    for band, (low, high) in enumerate(ranges):
        pixels = ((values[band].double().numpy() - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(transform(values)[band], (pixels - mean[band]) / std[band], atol=1e-5)


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(InputError, match="takes images of 4 channels, not 5"):
        ImageTransform((4, 8, 8))(torch.zeros(5, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="a picture has 1 or 3 channels, and this encoder takes arrays of 4"):
        ImageTransform((4, 8, 8))(Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="a value range of 2 channels does not fit images of 4"):
        ImageTransform((4, 8, 8), value_range=((0, 1), (0, 1)))
    with pytest.raises(InputError, match="need a value range"):
        ImageTransform((4, 8, 8))(torch.zeros(4, 8, 8))


def test_transparency_lies_on_white() -> None:
    color = picture(13, 9, 4)
    alpha = color[..., 3:] / 255
    expected = color[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(whole(Image.fromarray(color)), expected.transpose(2, 0, 1), atol=1)


def test_a_palette_is_looked_up() -> None:
    colors, indices = picture(1, 256)[:, 0], picture(13, 9, 1)[..., 0]
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors.tobytes())
    np.testing.assert_array_equal(whole(image), colors[np.asarray(image)].transpose(2, 0, 1))


def test_a_photograph_is_turned_upright() -> None:
    color = picture(8, 8)
    image = Image.fromarray(color)
    image.getexif()[0x0112] = 3  # upside down
    np.testing.assert_array_equal(whole(image), color[::-1, ::-1].transpose(2, 0, 1))


def test_an_array_of_4_channels_by_its_range() -> None:
    values = picture(67, 41, 4).astype(np.float32) * 10 + 100
    transform = ImageTransform((4, 31, 31), value_range=((100.0, 2650.0),))
    features = transform(torch.from_numpy(values).permute(2, 0, 1)).numpy()
    assert features.shape == (4, 31, 31)
    for channel in range(4):
        image = Image.fromarray((values[..., channel] - 100) / 10)  # mode F: Pillow rounds and clips nothing
        np.testing.assert_allclose(features[channel], by_hand(image, 31, 0.875)[0].clip(0, 1), atol=1e-5)


def test_an_encoder_of_4_channels_takes_nothing_else() -> None:
    transform = ImageTransform((4, 31, 31))
    with pytest.raises(InputError, match=r"takes arrays of 4"):
        transform(Image.fromarray(picture(40, 40)))
    with pytest.raises(InputError, match=r"4 channels, not 5"):
        transform(torch.zeros(5, 40, 40, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"range of 3 channels does not fit images of 4"):
        ImageTransform((4, 31, 31), value_range=((0.0, 1.0),) * 3)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_every_channel_has_a_mean(channels: int) -> None:
    config = ImageTransform((channels, 32, 32)).config
    assert (config["mean"], config["std"]) == ((0.0,) * channels, (1.0,) * channels)


def test_the_value_range_is_part_of_what_it_is() -> None:
    plain = ImageTransform((200, 9, 9))
    ranges = tuple((0.0, float(band + 1)) for band in range(200))
    ranged = plain.with_value_range(ranges)
    assert ranged.value_range == ranges
    assert ranged != plain
    assert ranged == ImageTransform((200, 9, 9), value_range=ranges)
    assert ImageTransform.from_config(ranged.config, [list(pair) for pair in ranges]) == ranged
    assert repr(ranged) != repr(plain.with_value_range(((0.0, 2.0), *ranges[1:])))
    assert len(repr(ranged)) < 300
    assert "value_range=((0.0, 4095.0),)" in repr(plain.with_value_range(((0.0, 4095.0),)))
    assert "value_range" not in repr(plain)


def test_it_comes_back_from_its_settings_among_others() -> None:
    transform = ImageTransform((3, 30, 20), crop_pct=0.9, crop_mode="squash", interpolation="bilinear", mean=(0.5,) * 3)
    other = ImageTransform.from_config({**transform.config, "num_classes": 0})
    assert other == transform
    assert hash(other) == hash(transform)
    assert other != ImageTransform()
    with pytest.raises(KeyError, match="std"):
        ImageTransform.from_config({key: value for key, value in transform.config.items() if key != "std"})
