"""Bundles of encoders for one channel and for many: what they were trained with comes back to the digit."""

import json
from pathlib import Path

import pytest
import timm
import torch

from simclr_scale.bundle import BUNDLE_KEY, ImageTransform, baseline, encoder_config, load_encoder, save_encoder
from simclr_scale.errors import InputError
from simclr_scale.models import BandHistogramEncoder, ColorHistogramEncoder, PixelEncoder, create_encoder

RANGES = {1: ((0.1, 4095.7),), 6: tuple((band / 3, 1000.0 + band / 7) for band in range(6))}


@pytest.mark.parametrize("channels", [1, 6])
@torch.no_grad()
def test_value_ranges_survive_bundle_and_checkpoint(channels: int, tmp_path: Path) -> None:
    encoder = create_encoder("simclr_resnet_tiny", in_chans=channels).eval()
    transform = ImageTransform((channels, 16, 16), crop_pct=1.0, value_range=RANGES[channels])
    folder = save_encoder(encoder, transform, tmp_path / "bundle")
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    checkpoint = {"state_dict": state, BUNDLE_KEY: {"encoder": encoder_config(encoder, transform)}}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    values = torch.rand(channels, 20, 20) * 2000
    expected = encoder(transform(values)[None])
    for spec in (folder, tmp_path / "a.ckpt"):
        loaded, its_transform = load_encoder(spec)
        assert its_transform == transform
        assert its_transform.channels == channels
        assert torch.equal(loaded(its_transform(values)[None]), expected)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(by_timm(transform(values)[None]), expected)
    card = (folder / "README.md").read_text()
    assert ("a tensor of the raw values, (C, H, W)" in card) == (channels == 6)


@pytest.mark.parametrize("damage", [[[1.0]], [["a", "b"]], 7, [[0.0, 1.0]] * 5, {"low": 0}])
def test_a_damaged_range_is_one_line(damage: object, tmp_path: Path) -> None:
    encoder = create_encoder("simclr_resnet_tiny", in_chans=6)
    folder = save_encoder(encoder, ImageTransform((6, 16, 16), value_range=RANGES[6]), tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    config[BUNDLE_KEY]["value_range"] = damage
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"bundle .* does not describe an encoder"):
        load_encoder(folder)


def test_a_bundle_for_8_bits_has_no_range(tmp_path: Path) -> None:
    folder = save_encoder(create_encoder("simclr_resnet_tiny"), ImageTransform((3, 16, 16)), tmp_path / "bundle")
    config = json.loads((folder / "config.json").read_text())
    assert "value_range" not in config[BUNDLE_KEY]
    assert load_encoder(folder)[1] == ImageTransform((3, 16, 16))


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_baselines_for_any_number_of_channels(channels: int) -> None:
    pixels, histogram = baseline("pixels:4", channels), baseline("histogram:5", channels)
    assert isinstance(pixels[0], PixelEncoder)
    assert isinstance(histogram[0], ColorHistogramEncoder if channels == 3 else BandHistogramEncoder)
    for encoder, transform in (pixels, histogram):
        assert not encoder.training
        image = transform(torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8))
        assert encoder(image[None]).shape == (1, encoder.num_features)


def test_what_is_no_baseline() -> None:
    with pytest.raises(InputError, match="'timm:resnet18' is no baseline; they are pixels and histogram"):
        baseline("timm:resnet18", 1)
