"""Patches of a scene: which pixels they hold, and that train and test share none."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from simclr_scale.data.pixels import measure_value_range, to_pixels
from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.patches import PatchSource, split_scene
from simclr_scale.errors import InputError

HEIGHT, WIDTH, BANDS = 40, 37, 5


def write_scene(path: Path, dtype: str = "uint16", labelled: bool = True) -> str:
    """Every value says its row, column and band; half the pixels have a class, in stripes of three."""
    row, column, band = np.indices((HEIGHT, WIDTH, BANDS))
    values = row + column + band if dtype == "uint8" else row * 1000 + column * 10 + band
    variables: dict[str, Any] = {"data": values.astype(dtype)}
    if labelled:
        stripes = ((row + column)[..., 0] // 3) % 4
        variables["gt"] = (stripes * (row[..., 0] % 2)).astype(np.uint8)
    scipy.io.savemat(path, variables)
    return f"patches/{path}"


def opened(spec: str, split: Any = "train", **options: Any) -> PatchSource:
    source = open_source(spec, split=split, **({"channel_axis": -1} | options))
    assert isinstance(source, PatchSource)
    return source


def pixels_of(source: PatchSource) -> set[tuple[int, int]]:
    """Every pixel of the scene that is in any patch, read off the patches' own values."""
    first_band = np.stack([source.image(index)[0].numpy() for index in range(len(source))]).astype(int)
    return {(value // 1000, value % 1000 // 10) for value in np.unique(first_band)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_no_pixel_is_in_patches_of_both_parts(tmp_path: Path, patch_size: int, seed: int) -> None:
    spec = write_scene(tmp_path / "a.mat")
    train, test = (opened(spec, split, patch_size=patch_size, seed=seed) for split in ("train", "test"))
    seen, held_out = pixels_of(train), pixels_of(test)
    assert len(seen) > len(held_out) > 0
    assert seen & held_out == set()
    assert set(train.labels) == {-1, 0, 1, 2}
    assert set(test.labels) == {0, 1, 2}


def test_a_patch_is_cut_around_its_centre_and_labelled_by_it(tmp_path: Path) -> None:
    spec = write_scene(tmp_path / "a.mat")
    source = opened(spec, patch_size=5)
    expected = scipy.io.loadmat(tmp_path / "a.mat")
    for index in range(0, len(source), 7):
        row, column = source.centres[index]
        patch = source.image(index)
        assert patch.shape == (BANDS, 5, 5)
        assert patch[:, 2, 2].tolist() == expected["data"][row, column].tolist()
        assert source.labels[index] == int(expected["gt"][row, column]) - 1
        assert source.describe(index) == f"{spec}, patch around row {row}, column {column}"
        if 2 <= row < HEIGHT - 2 and 2 <= column < WIDTH - 2:
            cut = expected["data"][row - 2 : row + 3, column - 2 : column + 3].transpose(2, 0, 1)
            np.testing.assert_array_equal(patch, cut.astype(np.float32))


def test_the_border_is_mirrored(tmp_path: Path) -> None:
    source = opened(write_scene(tmp_path / "a.mat", labelled=False), patch_size=5)
    assert len(source) == HEIGHT * WIDTH
    scene = scipy.io.loadmat(tmp_path / "a.mat")["data"].transpose(2, 0, 1)
    mirrored = np.pad(scene, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    for index in (0, 1, WIDTH - 1, WIDTH * (HEIGHT - 1), len(source) - 1):
        row, column = divmod(index, WIDTH)
        np.testing.assert_array_equal(source.image(index), mirrored[:, row : row + 5, column : column + 5])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_windows_are_the_patches_as_pixels(tmp_path: Path, dtype: str) -> None:
    source = opened(write_scene(tmp_path / "a.mat", dtype), patch_size=3)
    value_range = measure_value_range(source)
    assert (value_range is None) == (dtype == "uint8")
    windows = source.windows(value_range)
    indices = torch.tensor([5, 0, len(source) - 1, 5])
    assert windows.shape == (len(source), BANDS, 3, 3)
    expected = torch.stack([to_pixels(source.image(int(index)), value_range) for index in indices])
    assert torch.equal(windows[indices], expected)
    assert windows[indices].dtype == (torch.uint8 if dtype == "uint8" else torch.float32)


def test_the_same_seed_gives_the_same_blocks_and_another_seed_others() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (60, 60))
    first, again, other = (split_scene(labels, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.test, again.test)
    assert (first.test != other.test).any()


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_in_both_parts_where_that_can_be_had(seed: int) -> None:
    """A rare class in two corners, among 16 blocks of which 4 are test."""
    labels = np.zeros((64, 64), dtype=np.int64)
    labels[:12, :12] = labels[-12:, -12:] = 1
    labels[:, 20:40] = 2
    cut = split_scene(labels, 5, seed)
    assert (cut.blocks, cut.test_blocks, cut.block) == (16, 4, (16, 16))
    for part in (cut.train, cut.test):
        assert set(np.unique(labels[part])) == {0, 1, 2}
    assert not (cut.train & cut.test).any()


def test_the_parts_are_said(tmp_path: Path) -> None:
    spec = write_scene(tmp_path / "a.mat")
    test = opened(spec, "test", patch_size=3, seed=7)
    assert test.split_description == (
        "patches of 3 x 3, test part of seeded blocks, seed 7: 4 of 16 blocks of 10 x 9 pixels are test, "
        "and no patch reaches from one part into the other"
    )
    assert opened(spec, patch_size=3, label_key="").split_description == "patches of 3 x 3 around all pixels"


def test_fingerprints_tell_parts_patches_and_values_apart(tmp_path: Path) -> None:
    spec = write_scene(tmp_path / "a.mat")
    prints = [
        opened(spec, patch_size=3).fingerprint(),
        opened(spec, "test", patch_size=3).fingerprint(),
        opened(spec, patch_size=5).fingerprint(),
        opened(spec, patch_size=3, seed=1).fingerprint(),
        opened(write_scene(tmp_path / "b.mat", "float32"), patch_size=3).fingerprint(),
    ]
    assert opened(spec, patch_size=3).fingerprint() == prints[0]
    assert len({*prints[:4]}) == 4
    assert prints[4] == prints[0]  # the same numbers, in another type
    changed = scipy.io.loadmat(tmp_path / "a.mat")
    changed["data"][20, 20, 2] += 1
    scipy.io.savemat(tmp_path / "c.mat", {key: changed[key] for key in ("data", "gt")})
    assert opened(f"patches/{tmp_path / 'c.mat'}", patch_size=3).fingerprint() != prints[0]


def test_a_worker_can_have_it(tmp_path: Path) -> None:
    source = opened(write_scene(tmp_path / "a.mat"))
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.image(11), source.image(11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, "data.patch_size must be an odd number of pixels, got 4"),
        ({"patch_size": 39}, "a patch of 39 pixels does not fit in a scene of 40 x 37"),
        ({"split": "val"}, "has no validation part; train and test can be had"),
        ({"split": "test", "label_key": ""}, "has no labels, so there is no test part"),
        ({"test_split": "x"}, "has no splits: leave out train_split and test_split"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(write_scene(tmp_path / "a.mat"), channel_axis=-1, **options)


def test_labels_that_no_whole_patch_reaches(tmp_path: Path) -> None:
    """The only labelled pixel lies where four blocks meet."""
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[20, 18] = 1
    scipy.io.savemat(tmp_path / "a.mat", {"data": np.ones((HEIGHT, WIDTH, BANDS)), "gt": labels})
    with pytest.raises(InputError, match=r"no labelled patch of 9 x 9 pixels lies within the test part; lower"):
        open_source(f"patches/{tmp_path / 'a.mat'}", split="test")


def test_no_scene(tmp_path: Path) -> None:
    for name in ("missing.mat", "."):
        with pytest.raises(
            InputError, match=r"no such scene; after patches/ comes a file that ends in \.npy \.mat \.tif"
        ):
            open_source(f"patches/{tmp_path / name}")


@pytest.mark.parametrize("name", ["jasperRidge2_R198", "Samson"])
def test_real_scenes_have_every_class_in_parts_that_share_nothing(real_data: Path, name: str) -> None:
    spec = f"patches/{real_data / 'hyperspectral' / name}.mat"
    train, test = (opened(spec, split, channel_axis=None) for split in ("train", "test"))
    assert set(train.labels) == set(test.labels) == set(range(len(train.classes)))
    radius = train.patch_size // 2
    held = np.zeros(train.centres.max(0) + 1 + 100, dtype=bool)
    for row, column in test.centres:
        held[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = True
    assert not any(
        held[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1].any()
        for row, column in train.centres
    )
    assert 0.1 < len(test) / (len(test) + len(train)) < 0.35
