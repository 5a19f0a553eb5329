"""Pictures of every kind as one channel: 8 bits as the luma of their RGB form, 16 bits as they are."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.decoding import decode_rgb
from simclr_scale.data.sources.grey import decode, decode_grey, to_grey
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601


def write_every_kind(folder: Path) -> dict[str, Path]:
    """One file of every kind that data sets hold, by what it is."""
    color = Image.fromarray(pixels(height=12, width=10))
    alpha = color.copy()
    alpha.putalpha(Image.fromarray(pixels(1, 12, 10)[..., 0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (12, 10), dtype=np.uint16))
    kinds = {
        "grey.png": (color.convert("L"), {}),
        "grey.jpg": (color.convert("L"), {"quality": 95}),
        "binary.png": (color.convert("1"), {}),
        "rgb.png": (color, {}),
        "cmyk.jpg": (color.convert("CMYK"), {"quality": 95}),
        "rgba.png": (alpha, {}),
        "grey_alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (color.quantize(16), {}),
        "palette.gif": (color.quantize(16), {"transparency": 3}),
        "rotated.jpg": (color, {"exif": exif, "quality": 95}),
        "rotated_grey.jpg": (color.convert("L"), {"exif": exif, "quality": 95}),
        "rotated_sixteen.png": (sixteen, {"exif": exif}),
        "progressive.jpg": (color, {"progressive": True, "quality": 95}),
        "sixteen.png": (sixteen, {}),
        "sixteen.tif": (sixteen, {}),
        "sixteen.ppm": (sixteen, {}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        files[name] = folder / name
        image.save(folder / name, **options)
    return files


def test_every_kind_is_the_luma_of_its_rgb_form_or_keeps_its_16_bits(tmp_path: Path) -> None:
    for name, path in write_every_kind(tmp_path).items():
        grey = decode(str(path), name, 1)
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112) == 6
        assert grey.size == ((12, 10) if turned else (10, 12)), name
        if "sixteen" in name:
            stored = np.random.default_rng(2).integers(0, 65536, (12, 10), dtype=np.uint16)
            assert grey.mode == "I;16", name
            # Orientation 6: what was the first row is the last column.
            np.testing.assert_array_equal(np.asarray(grey), np.rot90(stored, -1) if turned else stored, err_msg=name)
        else:
            rgb = decode(str(path), name, 3)
            assert (grey.mode, rgb.mode) == ("L", "RGB"), name
            np.testing.assert_allclose(np.asarray(grey), np.asarray(rgb) @ LUMA, atol=0.51, err_msg=name)


def test_grey_is_kept_to_the_digit(tmp_path: Path) -> None:
    values = pixels()[..., 0]
    for name in ("a.png", "a.bmp", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(decode_grey(str(tmp_path / name), name)), values)


def test_32_bit_integers_are_clipped_to_16() -> None:
    image = Image.fromarray(np.array([[-5, 0, 65535, 70000]], dtype=np.int32))
    assert np.asarray(to_grey(image)).tolist() == [[0, 0, 65535, 65535]]


def test_what_has_no_grey_form_names_the_culprit(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    (tmp_path / "b.png").write_bytes(b"no image")
    for name, reason in {"a.tif": "8 or 16 bits", "b.png": ""}.items():
        with pytest.raises(InputError, match=f"here: not a readable image .*{reason}"):
            decode_grey(str(tmp_path / name), "here")


def test_corrupted_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "PPM", "JPEG"):
        file = io.BytesIO()
        values = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
        Image.fromarray(values if kind != "JPEG" else (values // 256).astype(np.uint8)).save(file, kind)
        sound = np.frombuffer(file.getvalue(), np.uint8)
        for _ in range(100):
            damaged = sound.copy()
            damaged[rng.integers(0, min(sound.size, 200), 3)] = rng.integers(0, 256, 3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                try:
                    decode_grey(io.BytesIO(damaged.tobytes()), "here")
                except InputError:
                    refused += 1
    assert 100 <= refused < 300


def test_sources_opened_for_one_channel(tmp_path: Path) -> None:
    write_every_kind(tmp_path)
    for channels in (1, 3):
        source = open_source(str(tmp_path), channels=channels)
        assert source.channels == channels  # type: ignore[attr-defined]
        modes = {source.image(index).mode for index in range(len(source))}  # type: ignore[union-attr]
        assert modes == ({"L", "I;16"} if channels == 1 else {"RGB"})


def test_textures_of_one_channel_are_the_luma_of_the_others() -> None:
    color, grey = open_source("textures"), open_source("textures", channels=1)
    assert grey.channels == 1  # type: ignore[attr-defined]
    assert tuple(grey.pixels.shape) == (len(color), 1, 32, 32)  # type: ignore[attr-defined]
    expected = np.asarray(color.image(5).convert("L"))  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(grey.image(5)), expected)


def test_tables_and_torchvision_sets_of_one_channel(real_data: Path, tmp_path: Path) -> None:
    table = f"hfds/{real_data / 'cifar10'}"
    color, grey = (open_source(table, split="test", channels=channels) for channels in (3, 1))
    assert (color.channels, grey.channels) == (3, 1)  # type: ignore[attr-defined]
    image = grey.image(7)
    assert isinstance(image, Image.Image)
    assert image.mode == "L"
    np.testing.assert_allclose(np.asarray(image), np.asarray(color.image(7)) @ LUMA, atol=0.51)
    assert color.fingerprint() == grey.fingerprint()
    for seed, name in enumerate(("a/1.png", "b/1.png")):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels(seed)).save(tmp_path / name)
    folder = open_source("torch/ImageFolder", root=tmp_path, channels=1)
    assert folder.image(0).mode == "L"  # type: ignore[union-attr]


def test_chest_x_rays_are_the_same_grey_either_way(real_data: Path) -> None:
    color, grey = (open_source(str(real_data / "chest_xray"), channels=channels) for channels in (3, 1))
    for index in range(0, len(grey), 100):
        np.testing.assert_array_equal(np.asarray(grey.image(index)), np.asarray(color.image(index))[..., 0])
    with Image.open(color.describe(0)) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(decode_rgb(color.describe(0), ""))[..., 2], np.asarray(image))
