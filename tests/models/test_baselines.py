"""Baselines that learn nothing."""

import numpy as np
import pytest
import torch

from simclr_scale.errors import InputError
from simclr_scale.models import BandHistogramEncoder, ColorHistogramEncoder, PixelEncoder


def test_pixels_are_kept_in_order() -> None:
    encoder = PixelEncoder(size=5, in_chans=2)
    images = torch.rand(3, 2, 5, 5)
    features = encoder(images)
    assert features.shape == (3, encoder.num_features) == (3, 50)
    torch.testing.assert_close(features.reshape(images.shape), images, rtol=0, atol=0)
    assert PixelEncoder().num_features == 768


@pytest.mark.parametrize("shape", [(2, 3, 16, 15), (2, 1, 16, 16), (3, 16, 16)])
def test_pixels_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"pixel encoder: images are .*, not \(3, 16, 16\)"):
        PixelEncoder()(torch.rand(shape))


@pytest.mark.parametrize(("bins", "in_chans"), [(8, 3), (5, 3), (4, 1), (3, 4)])
def test_histogram_equals_numpys(bins: int, in_chans: int) -> None:
    images = np.random.default_rng(0).random((3, in_chans, 7, 9))
    encoder = ColorHistogramEncoder(bins, in_chans)
    features = encoder(torch.from_numpy(images))
    assert features.shape == (3, encoder.num_features) == (3, bins**in_chans)
    for image, feature in zip(images, features.numpy(), strict=True):
        counts, _ = np.histogramdd(image.reshape(in_chans, -1).T, bins=bins, range=[(0, 1)] * in_chans)
        np.testing.assert_allclose(feature, counts.ravel() / 63, rtol=1e-12)


def test_histogram_is_joint_and_its_outer_bins_hold_what_lies_outside() -> None:
    encoder = ColorHistogramEncoder(bins=2)
    black_and_white = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    red_and_cyan = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]])[None]
    assert not torch.equal(encoder(black_and_white), encoder(red_and_cyan))
    torch.testing.assert_close(encoder(black_and_white * 3 - 1), encoder(black_and_white))
    assert encoder(black_and_white).tolist() == [[0.5, 0, 0, 0, 0, 0, 0, 0.5]]


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 4, 4), torch.zeros(3, 4, 4)]
)
def test_histogram_of_what_is_no_batch_of_colour_images(images: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"colour histogram: images are .*, not \(B, 3, H, W\) of a floating-point"):
        ColorHistogramEncoder()(images)


@pytest.mark.parametrize("build", [PixelEncoder, ColorHistogramEncoder])
def test_baselines_have_no_parameters_and_check_their_sizes(build: type) -> None:
    assert not build().state_dict()
    with pytest.raises(InputError, match="must be at least 1"):
        build(0)


@pytest.mark.parametrize(("bins", "in_chans"), [(64, 1), (8, 7), (3, 2)])
def test_histograms_of_each_band_are_numpys(bins: int, in_chans: int) -> None:
    images = np.random.default_rng(0).uniform(-0.1, 1.1, (3, in_chans, 7, 9))
    encoder = BandHistogramEncoder(bins, in_chans)
    features = encoder(torch.from_numpy(images))
    assert features.shape == (3, encoder.num_features) == (3, bins * in_chans)
    for image, feature in zip(images, features.numpy(), strict=True):
        counts = [np.histogram(band.clip(0, 1), bins=bins, range=(0, 1))[0] for band in image]
        np.testing.assert_allclose(feature, np.concatenate(counts) / 63, rtol=1e-12)


def test_histograms_of_each_band_of_other_images() -> None:
    for images in (torch.rand(2, 3, 4, 4), torch.rand(1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(InputError, match=r"band histogram: images are .*, not \(B, 1, H, W\) of a floating"):
            BandHistogramEncoder()(images)
    with pytest.raises(InputError, match="band histogram: bins=0"):
        BandHistogramEncoder(0)
