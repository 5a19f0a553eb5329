"""The generated data set: reproducible, balanced, its parts apart, and its classes told by nothing but the pattern."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.textures import PATTERNS, TextureSource, draw_texture


@pytest.fixture(scope="module")
def train() -> TextureSource:
    return TextureSource("train", seed=0)


@pytest.fixture(scope="module")
def held_out() -> TextureSource:
    return TextureSource("test", seed=0)


def distinct(*sources: TextureSource) -> int:
    return len({image.numpy().tobytes() for source in sources for image in source.pixels})


def test_the_same_seed_gives_the_same_images() -> None:
    first, second = (TextureSource("train", seed=3, num_images=50) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert first.fingerprint() == second.fingerprint()


def test_a_smaller_set_is_the_head_of_a_larger_one(train: TextureSource) -> None:
    assert torch.equal(TextureSource("train", seed=0, num_images=40).pixels, train.pixels[:40])


def test_no_two_images_are_alike_in_or_across_splits(train: TextureSource, held_out: TextureSource) -> None:
    assert distinct(train, held_out) == len(train) + len(held_out)


def test_splits_and_seeds_share_no_image() -> None:
    sources = [TextureSource(split, seed, num_images=30) for split in ("train", "val", "test") for seed in (0, 1)]
    assert distinct(*sources) == 6 * 30
    assert len({source.fingerprint() for source in sources}) == 6


def test_sizes_and_balance(train: TextureSource, held_out: TextureSource) -> None:
    assert (len(train), len(held_out), len(TextureSource("val"))) == (4096, 1024, 1024)
    for source in (train, held_out):
        counts = np.bincount(source.labels, minlength=10)
        assert len(source.classes) == len(counts) == 10
        assert counts.max() - counts.min() <= 1
        assert source.labels.dtype == np.int64
        assert source.labels.shape == (len(source),)


def test_images_are_the_pixels(train: TextureSource) -> None:
    assert train.pixels.dtype == torch.uint8
    assert train.pixels.shape == (4096, 3, 32, 32)
    for index in (0, 1, 4095):
        image = train.image(index)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        np.testing.assert_array_equal(np.asarray(image), train.pixels[index].permute(1, 2, 0))
    assert train.image(np.int64(7)).tobytes() == train.image(7).tobytes()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [16, 31, 64])
def test_each_pattern_is_visible_at_any_size(pattern: str, size: int) -> None:
    for index in range(10):
        image = draw_texture(generator(Purpose.TEXTURE, 0, 0, index), pattern, size)
        assert image.shape == (3, size, size)
        assert image.dtype == np.uint8
        # In HSV's value, where the two colours always differ; the noise is of 10 levels.
        assert image.max(0).std() > 25


def test_both_colors_come_through(train: TextureSource) -> None:
    values = train.pixels.float()
    assert values.min() < 30
    assert values.max() == 255
    assert 60 < values.mean() < 195


def test_the_fingerprint_covers_pixels_and_labels() -> None:
    source = TextureSource(num_images=20)
    before = source.fingerprint()
    source.pixels[19, 2, 31, 31] ^= 1
    assert source.fingerprint() != before
    source.pixels[19, 2, 31, 31] ^= 1
    assert source.fingerprint() == before
    source.labels[0] = 5
    assert source.fingerprint() != before


def test_it_says_what_it_is() -> None:
    source = TextureSource("test", seed=4, num_images=10)
    assert source.name == "textures"
    assert source.split_description == "generated, seed 4, test part"
    assert source.describe(3) == "textures image 3 (generated, seed 4, test part)"


def mean_color(source: TextureSource) -> NDArray[np.float32]:
    return source.pixels.float().mean((2, 3)).numpy()


def color_histogram(source: TextureSource) -> NDArray[np.float64]:
    """4 x 4 x 4 bins."""
    bins = (source.pixels.long() // 64 * torch.tensor([16, 4, 1])[:, None, None]).sum(1).flatten(1)
    return np.stack([np.bincount(row, minlength=64) for row in bins.numpy()]) / bins.shape[1]


def raw_pixels(source: TextureSource) -> NDArray[np.float32]:
    return source.pixels.float().flatten(1).numpy()


@pytest.mark.parametrize(("features", "most"), [(mean_color, 0.18), (color_histogram, 0.25), (raw_pixels, 0.18)])
def test_colors_and_pixels_hardly_tell_the_classes(
    train: TextureSource, held_out: TextureSource, features: Callable[[TextureSource], NDArray[np.generic]], most: float
) -> None:
    """The share of ten classes that the 20 nearest neighbours get right; .1 is chance.

    A histogram sees a little: how much of the image each pattern gives to either colour.
    """
    knn = KNeighborsClassifier(20).fit(features(train), train.labels)
    assert knn.score(features(held_out), held_out.labels) < most
