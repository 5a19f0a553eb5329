"""Which data sets are held in memory, and that what is held is the images."""

import numpy as np
import pytest
import torch

from simclr_scale.data import memory
from simclr_scale.data.memory import load_pixels
from simclr_scale.data.textures import TextureSource
from simclr_scale.errors import InputError
from tests.data.generated import GradientSource


@pytest.mark.parametrize("wanted", [None, True])
def test_small_images_of_one_size_are_loaded(wanted: bool | None) -> None:
    source = GradientSource(5, (7, 96))
    pixels = load_pixels(source, wanted)
    assert pixels is not None
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (5, 3, 7, 96)
    for index in range(5):
        np.testing.assert_array_equal(pixels[index].permute(1, 2, 0), np.asarray(source.image(index)))


def test_large_images_only_on_demand() -> None:
    source = GradientSource(3, (97, 40))
    assert load_pixels(source) is None
    assert source.images_read == 1
    pixels = load_pixels(source, True)
    assert pixels is not None
    assert pixels.shape == (3, 3, 97, 40)


def test_large_sets_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GradientSource(4, (8, 8))
    monkeypatch.setattr(memory, "_LARGEST_BYTES", 4 * 3 * 8 * 8)
    assert load_pixels(source) is not None
    monkeypatch.setattr(memory, "_LARGEST_BYTES", 4 * 3 * 8 * 8 - 1)
    assert load_pixels(source) is None
    assert load_pixels(source, True) is not None


def test_images_of_several_sizes_stay_on_disk() -> None:
    source = GradientSource(4, (8, 8), (8, 9))
    assert load_pixels(source) is None
    with pytest.raises(InputError, match=r"one size: .* 0 is 8 x 8 and .* 1 is 9 x 8"):
        load_pixels(source, True)


def test_what_is_in_memory_already_is_not_copied() -> None:
    source = TextureSource(num_images=3, image_size=8)
    assert load_pixels(source) is source.pixels
    assert load_pixels(source, True) is source.pixels


def test_nothing_is_loaded_against_the_users_will() -> None:
    images = GradientSource(3, (8, 8))
    assert load_pixels(images, False) is None
    assert images.images_read == 0
    assert load_pixels(TextureSource(num_images=3, image_size=8), False) is None
