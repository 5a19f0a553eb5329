"""What becomes of one image when it is packed."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_scale.data.packed_images import encode, pack_image
from simclr_scale.data.sources.decoding import decode_rgb
from simclr_scale.errors import InputError


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, so that a JPEG of it is close."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    planes = [128 + 90 * np.sin(5 * x + 3 * y + shift) for shift in (0, 1, 2)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def packed(content: bytes, size: int = 32, quality: int = 90, lossless: bool = False) -> tuple[bytes, str]:
    return pack_image(content, "here", size, quality, lossless)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("size", [(32, 50), (20, 20)])
def test_what_is_small_stays_byte_for_byte(kind: str, extension: str, size: tuple[int, int]) -> None:
    content = file_of(photo(*size), kind)
    assert packed(content) == (content, extension)


def test_small_images_of_other_formats_keep_their_pixels() -> None:
    for kind in ("BMP", "GIF", "TIFF", "PPM"):
        content = file_of(photo(30, 40), kind)
        result, extension = packed(content)
        assert extension == "png"
        assert np.array_equal(
            np.asarray(opened(result).convert("RGB")), np.asarray(decode_rgb(io.BytesIO(content), ""))
        )


@pytest.mark.parametrize(
    ("before", "after"), [((100, 60), (53, 32)), ((60, 100), (32, 53)), ((33, 33), (32, 32)), ((33, 5000), (32, 4848))]
)
def test_the_shorter_side_is_the_size_asked_for(before: tuple[int, int], after: tuple[int, int]) -> None:
    assert opened(packed(file_of(photo(*before), "PNG"))[0]).size == after


def test_the_resize_is_bicubic_and_antialiased_from_the_original() -> None:
    """Against the definition: Keys's kernel (a = -0.5), stretched by the factor, in float64."""
    rng = np.random.default_rng(0)
    values = rng.integers(40, 216, (96, 80)).astype(np.uint8)
    result = np.asarray(opened(packed(file_of(Image.fromarray(values), "PNG"), lossless=True)[0])).astype(float)

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def weights(length: int, target: int) -> np.ndarray:
        factor = length / target
        centres = (np.arange(target) + 0.5) * factor
        table = kernel((np.arange(length) + 0.5 - centres[:, None]) / factor)
        return table / table.sum(1, keepdims=True)

    expected = weights(96, 38) @ values @ weights(80, 32).T
    assert result.shape == expected.shape == (38, 32)
    assert np.abs(result - expected).max() <= 1.5, "two roundings, one a direction"


def test_a_photo_made_smaller_is_a_jpeg_close_to_the_lossless_one() -> None:
    content = file_of(photo(200, 150), "PNG")
    result, extension = packed(content)
    assert (extension, opened(result).format, opened(result).mode) == ("jpg", "JPEG", "RGB")
    exact, exact_extension = packed(content, lossless=True)
    assert (exact_extension, opened(exact).format) == ("png", "PNG")
    difference = np.asarray(opened(result)).astype(int) - np.asarray(opened(exact))
    assert np.abs(difference).mean() < 3
    assert len(packed(content, quality=30)[0]) < len(result)


def test_grey_stays_grey() -> None:
    for mode in ("L", "1"):
        result, extension = packed(file_of(photo(100, 100, mode), "PNG"))
        assert (extension, opened(result).mode) == ("jpg", "L")


def test_sixteen_bits_stay_sixteen_bits() -> None:
    ramp = np.linspace(0, 65535, 100 * 80).reshape(80, 100)
    for image in (Image.fromarray(ramp.astype(np.uint16)), Image.fromarray(ramp.astype(np.int32))):
        result, extension = packed(file_of(image, "TIFF" if image.mode == "I" else "PNG"))
        small = opened(result)
        assert (extension, small.mode, small.size) == ("png", "I;16", (40, 32))
        values = np.asarray(small).astype(float)
        assert np.unique(values).size > 1000, "more than 8 bits can hold"
        # Away from the edges, the mean of what a pixel covers.
        means = ramp.reshape(40, 2, 50, 2).mean((1, 3))
        assert abs(values[16, 20] - means[20, 25]) < 400


def test_values_beyond_sixteen_bits_are_clipped() -> None:
    wide = np.full((100, 100), 70_000, dtype=np.int32)
    wide[:, :50] = -5
    values = np.asarray(opened(packed(file_of(Image.fromarray(wide), "TIFF"))[0]))
    assert (values[:, 0] == 0).all()
    assert (values[:, -1] == 65535).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_taken_sideways_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(photo(120, 90), "JPEG", exif=exif, quality=95)
    upright = decode_rgb(io.BytesIO(content), "")
    result = opened(packed(content)[0])
    assert result.getexif().get(0x0112, 1) == 1
    shorter = 32 / 90
    assert result.size == tuple(max(32, round(side * shorter)) for side in upright.size)
    difference = np.asarray(result).astype(int) - np.asarray(upright.resize(result.size, Image.Resampling.BICUBIC))
    assert np.abs(difference).mean() < 3


def test_transparency_cmyk_and_palettes_become_what_training_would_see() -> None:
    clear = photo(100, 100).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((100, 100)))
    for content in (
        file_of(clear, "PNG"),
        file_of(photo(100, 100, "CMYK"), "JPEG"),
        file_of(photo(100, 100).quantize(50), "PNG"),
        file_of(photo(100, 100, "LA"), "PNG"),
    ):
        expected = decode_rgb(io.BytesIO(content), "").resize((32, 32), Image.Resampling.BICUBIC)
        result = opened(packed(content, lossless=True)[0])
        assert result.mode == "RGB"
        assert np.array_equal(np.asarray(result), np.asarray(expected))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [photo(20, 20), photo(20, 20).rotate(90)]
    content = file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    result, extension = packed(content)
    assert extension == "png"
    assert np.array_equal(np.asarray(opened(result)), np.asarray(frames[0]))


@pytest.mark.parametrize("size", [20, 100])
def test_what_cannot_be_read_to_its_end_is_named(size: int) -> None:
    good = file_of(photo(size, size), "PNG")
    for content in (b"", b"GIF89a", good[: len(good) // 2], b"<html>", file_of(photo(9, 9, "F"), "TIFF")):
        with pytest.raises(InputError, match="here: not a readable image"):
            packed(content)


def test_the_same_image_gives_the_same_bytes() -> None:
    content = file_of(photo(200, 150), "PNG")
    assert packed(content) == packed(content)
    image = photo(200, 150)
    assert encode(image, 32, 90, False) == encode(image.copy(), 32, 90, False)
