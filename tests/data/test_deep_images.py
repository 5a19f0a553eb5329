"""Grey, 16-bit and many-channel images where some cannot be read, from every kind of source and to the views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale import SimCLRDataModule
from simclr_scale.cli.prepare import main as prepare
from simclr_scale.cli.views import draw_sheet
from simclr_scale.data.augmentation import resolve
from simclr_scale.data.contact_sheet import describe_draws
from simclr_scale.data.crops import cut
from simclr_scale.data.draws import BOX, draw_views
from simclr_scale.data.memory import load_pixels
from simclr_scale.data.pixels import to_pixels
from simclr_scale.data.reading import first_readable, read_tensor
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import open_source
from simclr_scale.data.views import ViewsDataset
from simclr_scale.errors import InputError
from tests.data.sources.shard_files import encoded, write_shard

BANDS, SIDE = 5, 20
RANGE = ((1000.0, 30000.0),)


def write_grey(root: Path, depths: tuple[int, ...]) -> Path:
    """000.png, 001.png, ... of smooth noise with so many bits; 0: no image."""
    root.mkdir()
    for index, depth in enumerate(depths):
        path = root / f"{index:03}.png"
        coarse = np.random.default_rng(index).uniform(2000, 28000, (4, 5)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(coarse).resize((30, 24), Image.Resampling.BICUBIC))
        if depth == 0:
            path.write_bytes(b"nothing")
        else:
            Image.fromarray(smooth.astype(np.uint16) if depth == 16 else (smooth / 257).astype(np.uint8)).save(path)
    return root


def write_bands(root: Path, count: int, bad: int | None = None) -> Path:
    """000.npy, ... (SIDE, SIDE, BANDS) float32; one of them holds a NaN."""
    root.mkdir()
    for index in range(count):
        values = np.random.default_rng(index).normal(0.3, 0.1, (SIDE, SIDE, BANDS)).astype(np.float32)
        if index == bad:
            values[3, 4, 1] = np.nan
        np.save(root / f"{index:03}.npy", values)
    return root


def test_pictures_of_two_depths_meet_in_a_batch(tmp_path: Path) -> None:
    """The first 16 images, cut before the others are read, are all of 8 bits."""
    depths = (8,) * 16 + (16, 0, 16, 8)
    source = open_source(str(write_grey(tmp_path / "grey", depths)), channels=1)
    grey = resolve("grey", {})
    dataset = ViewsDataset(source, grey, 12, seed=2, value_range=RANGE)
    batch = dataset.__getitems__([Key(1, index) for index in range(len(depths))])
    assert batch["views"].shape == (20, 2, 1, 12, 12)
    assert batch["views"].dtype == torch.float32
    assert [index for index, _ in batch["unreadable"]] == [17]
    for row in (0, 15, 16, 18, 19):
        image = to_pixels(source.image(row), RANGE)
        assert image.dtype == (torch.float32 if depths[row] == 16 else torch.uint8)
        draws = draw_views(grey, 2, 1, [row], np.array([24, 30]), 1)[0]
        np.testing.assert_array_equal(batch["draws"][row], draws)
        for view in (0, 1):
            assert torch.equal(batch["views"][row, view], cut(image, draws[view, BOX], 12).float())
    with pytest.raises(InputError, match="16 bits"):
        load_pixels(source, True, {}, RANGE)


def test_the_range_maps_what_is_read(tmp_path: Path) -> None:
    source = open_source(str(write_grey(tmp_path / "grey", (0, 16))), channels=1)
    raw = np.asarray(source.image(1)).astype(np.float64)
    low, high = RANGE[0]
    expected = ((raw - low) / (high - low) * 255).clip(0, 255)
    np.testing.assert_allclose(read_tensor(source, 1, RANGE)[0], expected, atol=1e-3)
    assert torch.equal(first_readable(source, RANGE), read_tensor(source, 1, RANGE))
    unreadable: dict[int, str] = {}
    pixels = load_pixels(source, None, unreadable, RANGE)
    assert isinstance(pixels, torch.Tensor)
    assert list(unreadable) == [0]
    np.testing.assert_allclose(pixels[1, 0], expected, atol=1e-3)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_arrays_with_a_bad_one(tmp_path: Path, in_memory: bool) -> None:
    folder = write_bands(tmp_path / "bands", 8, bad=3)
    data = SimCLRDataModule(
        str(folder), preset="multiband", global_batch_size=8, num_workers=0, in_memory=in_memory, max_bad_fraction=0.5
    )
    data.setup()
    assert (data.channels, data.image_size) == (BANDS, SIDE)
    assert data.value_range is not None
    assert len(data.value_range) == BANDS
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["inputs"].shape == (16, BANDS, SIDE, SIDE)
    assert batch["inputs"].isfinite().all()
    assert 0 <= batch["inputs"].min() < batch["inputs"].max() <= 1
    assert list(data.unreadable) == [3]
    assert "003.npy: holds NaN" in data.unreadable[3]


def test_a_subset_of_arrays_keeps_their_channels(tmp_path: Path) -> None:
    folder = write_bands(tmp_path / "bands", 8)
    data = SimCLRDataModule(str(folder), preset="multiband", subset=4, global_batch_size=4, num_workers=0)
    data.setup()
    assert data.channels == BANDS
    assert next(iter(data.train_dataloader()))["images"].shape == (4, BANDS, SIDE, SIDE)


def test_a_sheet_of_arrays(tmp_path: Path) -> None:
    data = SimCLRDataModule(str(write_bands(tmp_path / "bands", 4, bad=0)), preset="multiband")
    sheet = np.asarray(draw_sheet(data, 4, bands=[4, 2, 0]))
    assert sheet.std() > 10
    with pytest.raises(InputError, match="0 to 4"):
        draw_sheet(data, 1, bands=[5])


def test_draws_of_each_channel_are_told() -> None:
    multiband = resolve("multiband", {"jitter": 1.0, "channel_drop": 0.9, "blur": 0.0, "flip": 0.0})
    draws = draw_views(multiband, 0, 0, [0], np.array([SIDE, SIDE]), BANDS)[0, 0]
    text = describe_draws(draws, (SIDE, SIDE), multiband)[1:]
    assert sorted(phrase.split()[0] for phrase in text[:2]) == ["brightness", "contrast"]
    assert all(" to " in phrase for phrase in text[:2])
    assert text[2].endswith(f"of {BANDS} channels dropped")


def test_channels_that_are_no_colours_need_their_preset(tmp_path: Path) -> None:
    folder = str(write_bands(tmp_path / "bands", 4))
    with pytest.raises(InputError, match="multiband"):
        SimCLRDataModule(folder, global_batch_size=4).setup()
    with pytest.raises(InputError, match="multiband"):
        draw_sheet(SimCLRDataModule(folder), 1)


def test_shards_and_packed_images_become_grey(tmp_path: Path) -> None:
    deep = write_grey(tmp_path / "grey", (16,)) / "000.png"
    write_shard(tmp_path / "shards" / "0.tar", {"0.png": encoded(0), "1.png": deep.read_bytes()})
    spec = f"wds/{tmp_path / 'shards'}"
    prepare(["--data.source", spec, "--output", str(tmp_path / "packed"), "--size", "64"])
    for opened in (spec, str(tmp_path / "packed")):
        color, grey = (open_source(opened, channels=channels) for channels in (3, 1))
        assert (getattr(color, "channels", None), getattr(grey, "channels", None)) == (3, 1)
        assert np.array_equal(np.asarray(grey.image(0)), np.asarray(color.image(0).convert("L")))
        assert np.array_equal(np.asarray(grey.image(1)), np.asarray(Image.open(deep)))
    with pytest.raises(InputError, match="has no columns"):
        open_source(str(tmp_path / "packed"), image_key="png")


def test_arrays_are_not_packed(tmp_path: Path) -> None:
    folder = write_bands(tmp_path / "bands", 2)
    with pytest.raises(InputError, match="arrays"):
        prepare(["--data.source", str(folder), "--output", str(tmp_path / "packed")])
    with pytest.raises(InputError, match="nothing to pack"):
        prepare(["--data.source", "patches/scene.mat", "--output", str(tmp_path / "packed")])
