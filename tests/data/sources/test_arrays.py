"""Arrays on disk: orientation and values to the digit, and that no file runs anything or passes for what it is not."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import tifffile
import torch
from PIL import Image

from simclr_scale.data.sources import arrays as arrays_module
from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.arrays import find_channel_axis, map_npy, read_array
from simclr_scale.errors import InputError

TYPES = ["uint8", "uint16", "int16", "float32", "float64", "float16", "int32"]


def values(dtype: str = "uint16", shape: tuple[int, ...] = (5, 7, 3), seed: int = 0) -> np.ndarray:
    """No two elements that are expected at different places are likely to be alike."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 100, shape).astype(dtype)
    bounds = np.iinfo(dtype)
    # float32 holds whole numbers up to 2^24.
    return rng.integers(max(bounds.min, -(2**24)), min(bounds.max, 2**24), shape, dtype=dtype)


def write(path: Path, array: np.ndarray) -> Path:
    """In the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".mat":
        scipy.io.savemat(path, {"image": array})
    else:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig" if array.ndim == 3 else None)
    return path


def only_image(folder: Path, **options: Any) -> torch.Tensor:
    source = open_source(str(folder), arrays=True, **options)
    assert len(source) == 1
    image = source.image(0)
    assert isinstance(image, torch.Tensor)
    assert image.is_contiguous()
    assert source.channels == len(image)
    return image


@pytest.mark.parametrize("extension", [".npy", ".mat"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_kept_to_the_digit(tmp_path: Path, extension: str, dtype: str) -> None:
    if extension == ".mat" and dtype == "float16":
        dtype = "float64"  # MATLAB has no half precision
    array = values(dtype)
    write(tmp_path / f"a{extension}", array)
    image = only_image(tmp_path, channel_axis=-1)
    assert image.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    np.testing.assert_array_equal(image, array.astype(np.float32).transpose(2, 0, 1))


@pytest.mark.parametrize("extension", [".npy", ".mat"])
def test_which_axis_is_that_of_the_channels(tmp_path: Path, extension: str) -> None:
    array = values(shape=(4, 5, 6))
    write(tmp_path / f"a{extension}", array)
    np.testing.assert_array_equal(only_image(tmp_path, channel_axis=0), array)
    np.testing.assert_array_equal(only_image(tmp_path, channel_axis=-1), np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", ">f4"])
def test_memory_order_and_byte_order_do_not_matter(tmp_path: Path, order: str, dtype: str) -> None:
    array = np.asarray(values("uint16", (8, 9)).astype(dtype), order=order)
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(only_image(tmp_path)[0], array.astype(np.float32))


def test_two_axes_are_one_channel(tmp_path: Path) -> None:
    array = values("int16", (5, 7))
    for name in ("a.npy", "b.mat", "c.tif"):
        write(tmp_path / name, array)
    source = open_source(str(tmp_path), arrays=True)
    assert source.channels == 1
    for index in range(3):
        np.testing.assert_array_equal(source.image(index), array[None].astype(np.float32))


def test_tiff_bands_and_pages(tmp_path: Path) -> None:
    array = values("uint16", (5, 7, 6))
    planes = list(array.transpose(2, 0, 1))
    folders = [tmp_path / name for name in ("interleaved", "planar", "pages", "pages_by_pillow", "four_of_8_bits")]
    for folder in folders:
        folder.mkdir()
    tifffile.imwrite(folders[0] / "a.tif", array, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(folders[1] / "a.tiff", np.stack(planes), photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(folders[2] / "a.tif", np.stack(planes), photometric="minisblack")
    first, *rest = [Image.fromarray(plane) for plane in planes]
    first.save(folders[3] / "a.tif", save_all=True, append_images=rest)
    eight = values("uint8", (5, 7, 4))
    Image.fromarray(eight).save(folders[4] / "a.tif")
    for folder in folders[:4]:
        np.testing.assert_array_equal(only_image(folder), array.transpose(2, 0, 1).astype(np.float32))
    np.testing.assert_array_equal(only_image(folders[4]), eight.transpose(2, 0, 1))


def test_floating_point_tiff(tmp_path: Path) -> None:
    array = values("float32", (5, 7))
    Image.fromarray(array).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(only_image(tmp_path)[0], array)


def test_matlab_indexes_rows_first(tmp_path: Path) -> None:
    """Element (row, column, band) of MATLAB, whose files go down the columns first."""
    content = np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4, order="F")
    scipy.io.savemat(tmp_path / "a.mat", {"cube": content})
    image = only_image(tmp_path, channel_axis=-1)
    assert image[3, 1, 2] == content[1, 2, 3] == 1 + 2 * 2 + 3 * 6


def test_the_variable_of_a_matlab_file(tmp_path: Path) -> None:
    array = values("uint8", (6, 6, 3))
    scipy.io.savemat(tmp_path / "a.mat", {"image": array, "other": array + 1, "name": "x", "mask": array[..., 0]})
    with pytest.raises(InputError, match=r"a\.mat: holds several arrays, image, other; name the image's .* image_key"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"no numeric variable 'thing' \(image_key\); it has image, other, mask"):
        open_source(str(tmp_path), image_key="thing")
    np.testing.assert_array_equal(only_image(tmp_path, image_key="other"), array.transpose(2, 0, 1) + 1)
    scipy.io.savemat(tmp_path / "a.mat", {"image": array, "mask": array[..., 0], "scale": 2.0, "row": np.ones((1, 9))})
    np.testing.assert_array_equal(only_image(tmp_path), array.transpose(2, 0, 1))


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("wet/1.npy", "dry/1.npy", "dry/2.npy")):
        write(tmp_path / name, values(shape=(8, 8, 5), seed=number))
    train, test = (open_source(str(tmp_path), split=split) for split in ("train", "test"))
    assert train.classes == ("dry", "wet")
    assert (len(train), len(test), train.channels, test.channels) == (2, 1, 5, 5)


def test_pictures_or_arrays(tmp_path: Path) -> None:
    Image.fromarray(values("uint8", (8, 8, 3))).save(tmp_path / "a.png")
    Image.fromarray(values("uint16", (8, 8))).save(tmp_path / "b.tif")
    write(tmp_path / "c.npy", values("uint16", (8, 8)))
    pictures = open_source(str(tmp_path))
    assert [os.path.basename(pictures.describe(i)) for i in range(len(pictures))] == ["a.png", "b.tif"]
    assert all(isinstance(pictures.image(i), Image.Image) for i in range(2))
    arrays = open_source(str(tmp_path), arrays=True)
    assert [os.path.basename(arrays.describe(i)) for i in range(len(arrays))] == ["b.tif", "c.npy"]
    assert all(isinstance(arrays.image(i), torch.Tensor) for i in range(2))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.tif").unlink()
    assert isinstance(open_source(str(tmp_path)).image(0), torch.Tensor)
    with pytest.raises(InputError, match=r"image_key and label_key belong to hfds/ and wds/ sources and \.mat files"):
        open_source(str(tmp_path), label_key="x")


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([(64, 64, 3)], -1),
        ([(3, 64, 64)], 0),
        ([(9, 9, 198)], -1),
        ([(198, 9, 9)], 0),
        ([(48, 64, 3)], -1),
        ([(4, 48, 64)], 0),
        ([(48, 64, 12), (40, 50, 12)], -1),
        ([(12, 48, 64), (12, 40, 50)], 0),
    ],
)
def test_the_axis_is_found_where_it_shows(shapes: list[tuple[int, ...]], axis: int) -> None:
    assert find_channel_axis("here", shapes) == axis


@pytest.mark.parametrize(
    "shapes", [[(20, 100, 198)], [(100, 120, 10)], [(7, 7, 7)], [(4, 64, 4)], [(12, 48, 64), (12, 40, 64)]]
)
def test_the_axis_is_asked_for_where_it_does_not(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"here: arrays of shape .* may have .*; say which by data.channel_axis, 0 or"):
        find_channel_axis("here", shapes)


def test_all_images_have_the_same_channels(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", values(shape=(8, 8, 3)))
    write(tmp_path / "b.npy", values(shape=(8, 8, 4)))
    with pytest.raises(InputError, match=r"a\.npy has 3 channels and b\.npy has 4; all images need the same"):
        open_source(str(tmp_path))
    (tmp_path / "b.npy").unlink()
    source = open_source(str(tmp_path))
    write(tmp_path / "a.npy", values(shape=(8, 8, 4)))
    with pytest.raises(InputError, match=r"a\.npy: has 4 channels, the other images have 3"):
        source.image(0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_a_bad_file(tmp_path: Path, bad: float) -> None:
    array = values("float64", (8, 8))
    array[3, 4] = bad
    write(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"a\.npy: holds NaN or infinity"):
        open_source(str(tmp_path)).image(0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4), complex), "values of type complex128"),
        (np.zeros((3, 4), bool), "values of type bool"),
        (np.zeros(12, np.uint8), r"an array of shape \(12,\); an image is \(H, W\)"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"an array of shape \(2, 3, 4, 5\)"),
        (np.zeros((0, 4), np.uint8), r"an array of shape \(0, 4\)"),
        (np.zeros((3, 4), [("a", "u1"), ("b", "u1")]), "values of type"),
    ],
)
def test_what_is_no_image(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        read_array(str(tmp_path / "a.npy"))


def test_an_image_above_the_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.npy", values(shape=(8, 9)))
    write(tmp_path / "b.mat", values(shape=(8, 9)))
    source = open_source(str(tmp_path))
    monkeypatch.setattr(arrays_module, "MAX_PIXELS", 71)
    with pytest.raises(InputError, match=r"a\.npy: 8 x 9 pixels are more than an image may have .71."):
        source.image(0)
    monkeypatch.setattr(arrays_module, "_MAX_VALUES", 71)
    monkeypatch.setattr(arrays_module, "read_variables", lambda *_: pytest.fail("was read"))
    for index in range(2):
        with pytest.raises(InputError, match="is larger than any image may be"):
            source.image(index)


class Intruder:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_is_refused_without_being_unpickled(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "a.npy"
    np.save(path, np.array([[Intruder(trace)]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy: not a readable \.npy array"):
        open_source(str(tmp_path)).image(0)
    path.write_bytes(pickle.dumps(Intruder(trace)))
    with pytest.raises(InputError, match=r"a\.npy: not a readable \.npy array"):
        open_source(str(tmp_path)).image(0)
    assert not trace.exists()
    np.load(path, allow_pickle=True)  # the same file, opened as it must not be
    assert trace.exists()


def test_an_archive_is_no_array(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npy", "w") as archive:
        file = io.BytesIO()
        np.save(file, values())
        archive.writestr("image.npy", file.getvalue())
    with pytest.raises(InputError, match=r"not a readable \.npy array"):
        map_npy(str(tmp_path / "a.npy"))


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (10**6, 10**6)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(100))
    with pytest.raises(InputError, match=r"not a readable \.npy array"):
        read_array(str(tmp_path / "a.npy"))


def test_matlab_7_3_is_refused_in_words(tmp_path: Path) -> None:
    version = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + bytes([0, 2]) + b"IM"
    (tmp_path / "a.mat").write_bytes(version.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(InputError, match=r"a\.mat: .*it is of MATLAB 7\.3 .*save it with '-v7', or as \.npy"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["a.npy", "a.mat", "a.tif"])
def test_damaged_files_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    sound = write(tmp_path / name, values("uint16", (16, 16, 5))).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"damaged{name[1:]}"
    contents = [b"", sound[:40], sound[: len(sound) // 2], b"no array at all"]
    for _ in range(150):
        damaged = np.frombuffer(sound, np.uint8).copy()
        damaged[rng.integers(0, min(len(damaged), 300), 4)] = rng.integers(0, 256, 4)
        contents.append(damaged.tobytes())
    refusals = []
    for content in contents:
        path.write_bytes(content)
        try:
            read_array(str(path))
        except InputError as error:
            refusals.append(str(error))
    assert 4 <= len(refusals) < len(contents)
    assert all(refusal.startswith(str(path)) and "\n" not in refusal for refusal in refusals)
