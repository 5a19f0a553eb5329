import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from simclr_scale.data.sources.decoding import decode_rgb, decode_tensor, to_rgb
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels


def encoded(image: Image.Image, format: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def decoded(image: Image.Image, format: str = "PNG", **options: Any) -> np.ndarray:
    result = decode_rgb(encoded(image, format, **options), "here")
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_kept(format: str) -> None:
    assert np.array_equal(decoded(Image.fromarray(pixels()), format), pixels())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(encoded(image, "PNG", exif=exif)))
    assert np.array_equal(decoded(image, exif=exif), np.asarray(upright))
    assert decoded(image, exif=exif).shape == ((8, 6, 3) if orientation >= 5 else (6, 8, 3))


def test_damaged_exif_costs_neither_image_nor_rotation() -> None:
    """A rational stored as four bytes: Pillow fails to rewrite such a tag, and warns of data beyond the end."""
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, b"\x06\0\0\0") + struct.pack("<HHI4s", 0x9286, 7, 900, b"\xff" * 4)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    file = encoded(Image.fromarray(pixels()), "JPEG", exif=exif)
    with pytest.warns(UserWarning, match="EXIF|Tag data"):
        Image.open(file).getexif().get(0x0112)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(file, "here").size == (6, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_that_is_none_is_upright(format: str) -> None:
    file = encoded(Image.fromarray(pixels()), format, exif=b"Exif\0\0neither byte order")
    assert decode_rgb(file, "here").size == (8, 6)


def test_progressive_jpeg() -> None:
    smooth = Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))
    file = encoded(smooth, "JPEG", progressive=True, quality=95)
    assert Image.open(file).info["progressive"]
    difference = np.asarray(decode_rgb(file, "here")).astype(int) - np.asarray(smooth)
    assert np.abs(difference).mean() < 3


def test_grey_and_binary_are_repeated_over_the_channels() -> None:
    grey = pixels()[..., 0]
    assert np.array_equal(decoded(Image.fromarray(grey)), np.repeat(grey[..., None], 3, axis=2))
    binary = grey > 127
    assert np.array_equal(decoded(Image.fromarray(binary)), np.repeat(255 * binary[..., None], 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_to_8_bit(format: str) -> None:
    grey = np.array([[0, 128, 129, 257], [256 * 257 // 2, 32767, 65406, 65535]], dtype=np.uint16)
    expected = np.round(grey / 65535 * 255).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1], [128, 127, 254, 255]]
    assert np.array_equal(decoded(Image.fromarray(grey), format), np.repeat(expected[..., None], 3, axis=2))


def test_8_bit_values_stored_in_16_bits_come_back() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(decoded(Image.fromarray(values * 257))[..., 0], values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    alpha = np.linspace(0, 255, 48).reshape(6, 8).astype(np.uint8)
    image = Image.fromarray(pixels()).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    opaque = np.asarray(image.convert("RGBA"))[..., :3]
    expected = 255 + (opaque - 255.0) * alpha[..., None] / 255
    assert np.abs(np.asarray(to_rgb(image)) - expected).max() <= 1


def test_palettes_with_and_without_a_transparent_colour() -> None:
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 1]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert decoded(image)[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90], [40, 50, 60]]
    transparent = decoded(image, transparency=1)[0].tolist()
    assert transparent == [[10, 20, 30], [255, 255, 255], [70, 80, 90], [255, 255, 255]]
    assert decoded(image, "GIF", transparency=1)[0].tolist() == transparent


def test_cmyk_jpeg_keeps_its_colours() -> None:
    blocks = np.zeros((8, 16, 3), np.uint8)
    blocks[:, :8], blocks[:, 8:] = (200, 30, 90), (20, 160, 220)
    image = Image.fromarray(blocks).convert("CMYK")
    assert np.abs(decoded(image, "JPEG", quality=100).astype(int) - blocks).max() <= 4


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"here: not a readable image .*8 or 16 bits"):
        decoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncated_and_foreign_files_name_the_culprit(format: str, tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(pixels(height=64, width=64)), format).getvalue()
    path = tmp_path / "broken.jpg"
    for content in (whole[: len(whole) // 2], b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            decode_rgb(str(path), str(path))
        assert str(caught.value).startswith(f"{path}: not a readable image")
        assert "\n" not in str(caught.value)


def test_corrupted_files_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    refused = 0
    for format in ("JPEG", "PNG", "WEBP", "BMP", "PPM"):
        sound = np.frombuffer(
            encoded(Image.fromarray(pixels()), format, **({"exif": exif} if format != "PPM" else {})).getvalue(),
            np.uint8,
        )
        for _ in range(300):
            damaged = sound.copy()
            damaged[rng.integers(0, min(sound.size, 200), 3)] = rng.integers(0, 256, 3)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    decode_rgb(io.BytesIO(damaged.tobytes()), "here")
            except InputError:
                refused += 1
    assert 0 < refused < 1500


# The faster way to a tensor.


def as_array(data: bytes) -> np.ndarray:
    tensor = decode_tensor(data, "here")
    assert tensor.dtype == torch.uint8
    # The channels of a pixel side by side, for the resize.
    assert tensor.stride()[0] == 1
    return tensor.permute(1, 2, 0).numpy()


def smooth(height: int = 57, width: int = 83) -> Image.Image:
    return Image.fromarray(pixels(height=5, width=6)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"quality": 100, "subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_rows": 1},
        {"optimize": True, "quality": 20},
    ],
)
def test_a_tensor_of_a_jpeg_is_pillows(mode: str, options: dict[str, Any]) -> None:
    data = encoded(smooth().convert(mode), "JPEG", **options).getvalue()
    expected = np.asarray(decode_rgb(io.BytesIO(data), "here")).astype(int)
    assert np.abs(as_array(data) - expected).max() <= 2


def test_a_tensor_of_a_jpeg_of_red_green_and_blue_is_pillows() -> None:
    data = encoded(smooth(), "JPEG", keep_rgb=True, quality=95).getvalue()
    assert np.abs(as_array(data) - np.asarray(decode_rgb(io.BytesIO(data), "here")).astype(int)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tensor_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(), "JPEG", exif=exif).getvalue()
    expected = np.asarray(decode_rgb(io.BytesIO(data), "here")).astype(int)
    assert expected.shape == ((83, 57, 3) if orientation >= 5 else (57, 83, 3))
    assert np.abs(as_array(data) - expected).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_tensors_of_other_formats_come_from_pillow(format: str) -> None:
    data = encoded(smooth(), format).getvalue()
    assert np.array_equal(as_array(data), np.asarray(decode_rgb(io.BytesIO(data), "here")))


@pytest.mark.filterwarnings("error")
def test_both_ways_refuse_the_same_damage() -> None:
    """Cut off anywhere, or with bytes changed: what one takes, the other takes, with the same pixels."""
    rng = np.random.default_rng(0)
    refused = taken = 0
    for options in ({}, {"progressive": True}):
        sound = encoded(smooth(), "JPEG", **options).getvalue()
        damaged = [sound[:length] for length in range(0, len(sound), len(sound) // 40)]
        for _ in range(60):
            changed = np.frombuffer(sound, np.uint8).copy()
            changed[rng.integers(0, len(sound), 2)] = rng.integers(0, 256, 2)
            damaged.append(changed.tobytes())
        for data in damaged:
            try:
                expected = np.asarray(decode_rgb(io.BytesIO(data), "here")).astype(int)
            except InputError as error:
                refusals = [error]
            else:
                refusals = []
            if refusals:
                with pytest.raises(InputError) as caught:
                    decode_tensor(data, "here")
                assert str(caught.value) == str(refusals[0])
                refused += 1
            else:
                assert np.abs(as_array(data) - expected).max() <= 2
                taken += 1
    assert refused > 60
    assert taken > 60


def test_real_photographs_decode_alike(real_data: Path) -> None:
    files = sorted((real_data / "clothing" / "test").rglob("*.jpg"))[::20]
    assert len(files) > 10
    for file in files:
        expected = np.asarray(decode_rgb(str(file), str(file))).astype(int)
        assert np.abs(as_array(file.read_bytes()) - expected).max() <= 2


# Hostile files.


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("protection", [89_478_485, None])
def test_too_many_pixels_are_refused_by_the_header(protection: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library has turned Pillow's own protection off, and never by decoding."""

    def never(image: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", protection)
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    data = bomb(14_000, 13_000)
    for decode in (lambda: decode_rgb(io.BytesIO(data), "here"), lambda: decode_tensor(data, "here")):
        with pytest.raises(
            InputError, match=r"here: not a readable image .*(exceeds limit|more than 178,956,970 pixels)"
        ):
            decode()
    with pytest.raises(AssertionError, match="decoded"):
        decode_rgb(io.BytesIO(bomb(14_000, 12_000)), "here")


def test_a_text_that_unpacks_to_gigabytes_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * (4 << 20), zip=True)
    data = encoded(smooth(), "PNG", pnginfo=info).getvalue()
    assert len(data) < 20_000
    with pytest.raises(InputError, match=r"here: not a readable image \(.*too large"):
        decode_rgb(io.BytesIO(data), "here")


def test_postscript_is_not_interpreted() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for decode in (lambda: decode_rgb(io.BytesIO(eps), "here"), lambda: decode_tensor(eps, "here")):
        with pytest.raises(InputError, match=r"^here: not a readable image \(no known image format\)$"):
            decode()
