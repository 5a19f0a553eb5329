"""From values to pixels between 0 and 255, against the formula, and the range that is measured."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale.data.pixels import (
    as_value_range,
    channels_of,
    is_deep,
    measure_value_range,
    size_of,
    takes_value_range,
    to_pixels,
)
from simclr_scale.errors import InputError
from tests.data.generated import ArraySource, GradientSource


def test_pictures_of_8_bits_come_as_they_are() -> None:
    color = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for value_range in (None, ((0.0, 9.0),)):
        pixels = to_pixels(Image.fromarray(color), value_range)
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels, color.transpose(2, 0, 1))
        np.testing.assert_array_equal(to_pixels(Image.fromarray(color[..., 0]), value_range), color[None, ..., 0])


def test_16_bits_are_spread_over_all_grey_or_over_the_range() -> None:
    values = np.array([[0, 1, 257, 4095], [4096, 32768, 65534, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    np.testing.assert_allclose(to_pixels(image), values[None] / 257, rtol=1e-6)
    expected = np.clip((values[None].astype(float) - 100) / (4095 - 100) * 255, 0, 255)
    np.testing.assert_allclose(to_pixels(image, ((100, 4095),)), expected, rtol=1e-5)


def test_each_channel_has_its_range() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 100, (3, 5, 7)).astype(np.float32))
    before = values.clone()
    ranges = ((-50.0, 50.0), (0.0, 10.0), (-1000.0, 1000.0))
    pixels = to_pixels(values, ranges)
    for channel, (low, high) in enumerate(ranges):
        expected = np.clip((values[channel].double().numpy() - low) / (high - low), 0, 1) * 255
        np.testing.assert_allclose(pixels[channel], expected, atol=1e-3)
    assert torch.equal(values, before)
    assert torch.equal(to_pixels(values, ((-50.0, 50.0),))[0], pixels[0])


def test_arrays_of_8_bits_need_no_range_and_deeper_ones_do() -> None:
    eight = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    assert torch.equal(to_pixels(eight), eight)
    assert to_pixels(eight, ((0, 23),)).max() == 255
    with pytest.raises(InputError, match="values of type float32 need a value range"):
        to_pixels(eight.float())
    with pytest.raises(InputError, match="value range is of 3 channels, the image has 2"):
        to_pixels(eight, ((0, 1),) * 3)


def test_measured_percentiles_are_those_of_all_values() -> None:
    """256 small images are read whole, so the sample is everything."""
    rng = np.random.default_rng(0)
    images = [rng.normal(100 * band, 10 + band, (1, 12, 15)) for band in range(3) for _ in range(1)]
    stack = np.stack([np.concatenate([image + rng.normal(0, 1, image.shape) for image in images]) for _ in range(50)])
    source = ArraySource(torch.from_numpy(stack.astype(np.float32)))
    measured = measure_value_range(source)
    expected = np.percentile(stack.astype(np.float32).transpose(1, 0, 2, 3).reshape(3, -1), [0.1, 99.9], axis=1).T
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_a_measured_range_is_seeded() -> None:
    source = ArraySource(torch.randn(600, 1, 6, 6))
    assert measure_value_range(source, 3) == measure_value_range(source, 3)
    assert measure_value_range(source, 3) != measure_value_range(source, 4)


def test_large_images_are_sampled_evenly() -> None:
    ramp = torch.arange(1000 * 400, dtype=torch.float32).reshape(1, 1, 1000, 400)
    [(low, high)] = measure_value_range(ArraySource(ramp)) or ()
    assert low == pytest.approx(400, abs=20)
    assert high == pytest.approx(399600, abs=20)


def test_a_dead_band_becomes_black() -> None:
    values = torch.cat([torch.full((4, 1, 3, 3), 7.0), torch.randn(4, 1, 3, 3)], 1)
    measured = measure_value_range(ArraySource(values))
    assert measured is not None
    assert measured[0] == (7.0, 8.0)
    assert to_pixels(values[0], measured)[0].abs().max() == 0


def test_8_bits_need_no_range() -> None:
    assert measure_value_range(GradientSource(40, (8, 8))) is None
    assert measure_value_range(ArraySource(torch.zeros(20, 2, 4, 4, dtype=torch.uint8))) is None
    source = GradientSource(40, (8, 8))
    measure_value_range(source)
    assert source.images_read < 20  # of a hundred thousand photographs few tell


def test_images_that_cannot_be_read_are_passed_over() -> None:
    values = torch.randn(40, 1, 5, 5)
    whole, damaged = ArraySource(values), ArraySource(values, unreadable=range(1, 40, 2))
    assert measure_value_range(damaged) == measure_value_range(ArraySource(values[::2]))
    assert measure_value_range(damaged) != measure_value_range(whole)
    with pytest.raises(InputError, match=r"image \d+ is damaged"):
        measure_value_range(ArraySource(values, unreadable=range(40)))


def test_what_a_range_can_map() -> None:
    assert takes_value_range(ArraySource(torch.zeros(3, 1, 4, 4, dtype=torch.uint8)))
    assert not takes_value_range(GradientSource(3, (4, 4)))


@pytest.mark.parametrize("wrong", [(1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0), (1, 2, 3)])
def test_what_is_no_range(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"data.value_range is \[low, high\], two numbers with low < high, got"):
        as_value_range(wrong)
    assert as_value_range((0, 4095)) == ((0.0, 4095.0),)


def test_sizes_channels_and_depth() -> None:
    array, picture = torch.zeros(5, 3, 4), Image.new("RGB", (4, 3))
    assert size_of(array) == size_of(picture) == (3, 4)
    assert is_deep(array)
    assert not is_deep(array.byte())
    assert not is_deep(picture)
    assert channels_of(ArraySource(torch.zeros(2, 5, 3, 4))) == 5
    assert channels_of(GradientSource(2, (3, 4))) == 3
