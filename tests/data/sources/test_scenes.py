"""Scenes on disk: which variable is what, and that every pixel, band and label is where it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import tifffile

from simclr_scale.data.sources.matlab import list_variables, read_variables
from simclr_scale.data.sources.scenes import read_scene
from simclr_scale.errors import InputError

BANDS, HEIGHT, WIDTH, CLASSES = 11, 6, 8, 3


def cube() -> np.ndarray:
    """(H, W, C): row, column and band can be read off every value."""
    row, column, band = np.indices((HEIGHT, WIDTH, BANDS))
    return (1000 * row + 100 * column + band).astype(np.uint16)


def labels() -> np.ndarray:
    """(H, W), 0 for none."""
    return np.random.default_rng(0).integers(0, CLASSES + 1, (HEIGHT, WIDTH)).astype(np.uint8)


def shares() -> np.ndarray:
    """Abundances (H, W, K); the largest is that of the labels, shifted by one so that every pixel has a class."""
    parts = np.random.default_rng(1).uniform(0.1, 0.2, (HEIGHT, WIDTH, CLASSES))
    np.put_along_axis(parts, labels()[..., None] % CLASSES, 1.0, axis=2)
    return parts / parts.sum(-1, keepdims=True)


def pixels_in_a_row(array: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (C, pixels), the pixels as MATLAB counts them."""
    return array.transpose(2, 1, 0).reshape(array.shape[2], -1)


def save(path: Path, **variables: Any) -> str:
    scipy.io.savemat(path, variables, do_compression=True)
    return str(path)


def test_a_cube_with_a_map_of_classes(tmp_path: Path) -> None:
    scene = read_scene(save(tmp_path / "a.mat", data=cube(), gt=labels()))
    np.testing.assert_array_equal(scene.cube, cube().transpose(2, 0, 1))
    np.testing.assert_array_equal(scene.labels, labels().astype(int) - 1)
    assert scene.classes == ("1", "2", "3")


def test_pixels_in_a_row_with_abundances_and_names(tmp_path: Path) -> None:
    names = np.array([["tree"], ["water"], ["road"]], dtype=object)
    variables = {
        "Y": pixels_in_a_row(cube()),
        "A": pixels_in_a_row(shares()),
        "nRow": HEIGHT,
        "nCol": WIDTH,
        "M": np.random.default_rng(0).random((BANDS, CLASSES)),
        "names": names,
        "bands": np.arange(BANDS)[:, None],
        "about": {"place": "somewhere"},
    }
    scene = read_scene(save(tmp_path / "a.mat", **variables))
    np.testing.assert_array_equal(scene.cube, cube().transpose(2, 0, 1))
    np.testing.assert_array_equal(scene.labels, labels() % CLASSES)
    assert scene.classes == ("tree", "water", "road")
    variables["Y"] = variables["Y"].T
    np.testing.assert_array_equal(read_scene(save(tmp_path / "b.mat", **variables)).cube, cube().transpose(2, 0, 1))


def test_the_size_is_known_by_a_map_alone(tmp_path: Path) -> None:
    scene = read_scene(save(tmp_path / "a.mat", Y=pixels_in_a_row(cube()), S_GT=shares()))
    np.testing.assert_array_equal(scene.cube, cube().transpose(2, 0, 1))
    np.testing.assert_array_equal(scene.labels, labels() % CLASSES)
    with pytest.raises(InputError, match=r"of shape \(11, 48\) has its pixels in one row, .*save it as \(H, W, C\)"):
        read_scene(save(tmp_path / "b.mat", Y=pixels_in_a_row(cube())))


@pytest.mark.parametrize("extension", [".mat", ".npy", ".tif"])
def test_labels_in_a_file_beside(tmp_path: Path, extension: str) -> None:
    files = {"Place_corrected": cube().transpose(2, 0, 1), "Place_gt": labels()}
    for stem, array in files.items():
        path = tmp_path / (stem + extension)
        if extension == ".mat":
            scipy.io.savemat(path, {stem.lower(): array})
        elif extension == ".npy":
            np.save(path, array)
        else:
            tifffile.imwrite(path, array, photometric="minisblack")
    scene = read_scene(str(tmp_path / f"Place_corrected{extension}"))
    np.testing.assert_array_equal(scene.cube, cube().transpose(2, 0, 1))
    np.testing.assert_array_equal(scene.labels, labels().astype(int) - 1)


def test_an_unlabelled_scene(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cube())
    with pytest.raises(InputError, match=r"say which by data\.channel_axis"):
        read_scene(str(tmp_path / "a.npy"))
    scene = read_scene(str(tmp_path / "a.npy"), channel_axis=-1)
    np.testing.assert_array_equal(scene.cube, cube().transpose(2, 0, 1))
    assert (scene.labels == -1).all()
    assert scene.classes == ()
    path = save(tmp_path / "a.mat", data=cube(), gt=labels())
    assert (read_scene(path, label_key="", channel_axis=-1).labels == -1).all()


def test_keys_name_the_variables(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mat", big=np.zeros((20, 20, 20)), data=cube(), one=labels(), two=labels() // 2)
    with pytest.raises(InputError, match=r"one and two may each label it; name one by label_key"):
        read_scene(path, image_key="data")
    scene = read_scene(path, image_key="data", label_key="two")
    np.testing.assert_array_equal(scene.labels, labels().astype(int) // 2 - 1)
    with pytest.raises(InputError, match=r"no variable 'three' \(label_key\) that labels the pixels"):
        read_scene(path, image_key="data", label_key="three")
    with pytest.raises(InputError, match=r"no numeric variable 'thing' \(image_key\)"):
        read_scene(path, image_key="thing")
    np.save(tmp_path / "a.npy", cube())
    with pytest.raises(InputError, match=r"has no variables; image_key and label_key name those of a \.mat file"):
        read_scene(str(tmp_path / "a.npy"), label_key="x")


@pytest.mark.parametrize("name", ["jasperRidge2_R198", "Samson"])
def test_our_reader_agrees_with_scipys_on_real_files(real_data: Path, name: str) -> None:
    path = str(real_data / "hyperspectral" / f"{name}.mat")
    expected = scipy.io.loadmat(path)
    names = [variable.name for variable in list_variables(path)]
    assert set(names) == {name for name in expected if not name.startswith("__")}
    for key, value in read_variables(path, names).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, expected[key])


def test_jasper_ridge(real_data: Path) -> None:
    """Where its water, its road and its trees lie, as a look at the picture shows; and what their spectra are like."""
    scene = read_scene(str(real_data / "hyperspectral" / "jasperRidge2_R198.mat"))
    assert scene.cube.shape == (198, 100, 100)
    assert scene.classes == ("1-tree", "2-water", "3-dirt", "4-road")
    assert np.bincount(scene.labels.ravel()).tolist() == [3493, 3326, 2428, 753]
    tree, water, _, road = range(4)
    assert (scene.labels[0, 30:48] == water).all()  # the lake leaves by the upper border, left of the middle
    assert (scene.labels[60:80, 20:45] == water).mean() > 0.9
    assert (scene.labels[0:40, 20:100] == road).sum() > (scene.labels[60:100, 0:60] == road).sum()
    infrared = scene.cube[60:100].mean(0)
    assert infrared[scene.labels == tree].mean() > 5 * infrared[scene.labels == water].mean()
    # Neighbours are alike along rows and along columns: a scene put together in the wrong order is torn.
    for axis in (1, 2):
        step = np.abs(np.diff(scene.cube[30].astype(float)[None], axis=axis)).mean()
        assert step < 0.3 * scene.cube[30].std()


def test_samson(real_data: Path) -> None:
    scene = read_scene(str(real_data / "hyperspectral" / "Samson.mat"))
    assert scene.cube.shape == (156, 95, 95)
    assert np.bincount(scene.labels.ravel()).tolist() == [3015, 3666, 2344]
    infrared = scene.cube[120:].mean(0)
    water = scene.labels == 2
    assert water[:, 0].all()  # the shore runs along the left border
    assert infrared[~water].mean() > 4 * infrared[water].mean()
