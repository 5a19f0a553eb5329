"""Where crops lie, against torchvision's sampler and TensorFlow's algorithm; what they hold, against torchvision."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.crops import MAX_TRIES, cut, cut_batch, sample_boxes

TORCHVISION, GOOGLE = Augmentation(crop_sampling="torchvision"), Augmentation(crop_sampling="google")
# ImageNet's usual photograph, one taller than wide, CIFAR's, odd and tiny ones, and a panorama.
SHAPES = [(375, 500), (500, 333), (32, 32), (7, 5), (1, 9), (2, 2), (60, 400)]
WIDE = (100, 330)


def uniforms(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((count, 2 * MAX_TRIES + 2))


def boxes_of(shape: tuple[int, int], augmentation: Augmentation, count: int, seed: int = 0) -> NDArray[np.float64]:
    return sample_boxes(uniforms(count, seed), np.broadcast_to(np.array(shape), (count, 2)), augmentation)


def google_box(u: NDArray[np.float64], height: int, width: int, a: Augmentation) -> tuple[int, ...]:
    """One box by TensorFlow's sample_distorted_bounding_box_op.cc, try by try, for the whole image as the object."""
    least, most = (share * width * height for share in a.crop_scale)
    for aspect_uniform, height_uniform in u[:-2].reshape(-1, 2):
        aspect = a.crop_ratio[0] + (a.crop_ratio[1] - a.crop_ratio[0]) * aspect_uniform
        crop_height = round(math.sqrt(least / aspect))
        max_height = round(math.sqrt(most / aspect))
        if round(max_height * aspect) > width:
            max_height = int((width + 0.5 - 1e-7) / aspect)
            if round(max_height * aspect) > width:
                max_height -= 1
        max_height = min(max_height, height)
        crop_height = min(crop_height, max_height)
        if crop_height < max_height:
            crop_height += int(height_uniform * (max_height - crop_height + 1))
        crop_width = round(crop_height * aspect)
        if crop_height * crop_width < least:
            crop_height += 1
            crop_width = round(crop_height * aspect)
        if crop_height * crop_width > most:
            crop_height -= 1
            crop_width = round(crop_height * aspect)
        area = crop_height * crop_width
        if area < least or area > most or not (0 < crop_height <= height and 0 < crop_width <= width):
            continue
        top = int(u[-2] * (height - crop_height)) if crop_height < height else 0
        left = int(u[-1] * (width - crop_width)) if crop_width < width else 0
        if area / (height * width) >= 0.1:  # min_object_covered
            return top, left, crop_height, crop_width
    return 0, 0, height, width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "augmentation",
    [
        GOOGLE,
        Augmentation(crop_sampling="google", crop_scale=(0.2, 0.6), crop_ratio=(0.5, 1.1)),
        Augmentation(crop_sampling="google", crop_scale=(0.01, 0.12)),
        Augmentation(crop_sampling="google", crop_scale=(0.99, 1.0), crop_ratio=(1.0, 1.0)),
    ],
)
def test_googles_boxes_are_those_of_its_algorithm(shape: tuple[int, int], augmentation: Augmentation) -> None:
    actual = boxes_of(shape, augmentation, 300)
    np.testing.assert_array_equal(actual, [google_box(u, *shape, augmentation) for u in uniforms(300)])


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), WIDE])
def test_torchvisions_distribution(shape: tuple[int, int]) -> None:
    """Two samples of 20,000 boxes; on the wide image torchvision gives up on ten tries for a tenth of them."""
    count = 20_000
    ours = boxes_of(shape, TORCHVISION, count)
    image = torch.empty(1, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale, ratio = list(TORCHVISION.crop_scale), list(TORCHVISION.crop_ratio)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])
    for statistic in (area, log_aspect, top_share, left_share):
        assert stats.ks_2samp(statistic(ours, shape), statistic(theirs, shape)).pvalue > 1e-3, statistic.__name__
    if shape == WIDE:
        centre = np.array([0, 98, 100, 133])
        share_ours, share_theirs = (np.mean((boxes == centre).all(1)) for boxes in (ours, theirs))
        assert share_theirs > 0.02
        assert share_ours == pytest.approx(share_theirs, abs=0.005)


def area(boxes: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    return boxes[:, 2] * boxes[:, 3] / math.prod(shape)


def log_aspect(boxes: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.log(boxes[:, 3] / boxes[:, 2])


def top_share(boxes: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    return boxes[:, 0] / np.maximum(shape[0] - boxes[:, 2], 1)


def left_share(boxes: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    return boxes[:, 1] / np.maximum(shape[1] - boxes[:, 3], 1)


@pytest.mark.parametrize(("augmentation", "mean", "small"), [(TORCHVISION, 0.43, 0.25), (GOOGLE, 0.39, 0.33)])
def test_areas_on_imagenets_usual_photograph(augmentation: Augmentation, mean: float, small: float) -> None:
    """The mean area of a crop and the share below a quarter, of 500 x 375 pixels."""
    areas = area(boxes_of((375, 500), augmentation, 40_000), (375, 500))
    assert areas.mean() == pytest.approx(mean, abs=0.005)
    assert (areas < 0.25).mean() == pytest.approx(small, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("augmentation", [TORCHVISION, GOOGLE])
def test_boxes_lie_in_the_image_and_keep_to_the_ranges(shape: tuple[int, int], augmentation: Augmentation) -> None:
    height, width = shape
    boxes = boxes_of(shape, augmentation, 5_000)
    top, left, h, w = boxes.T
    assert np.array_equal(boxes, boxes.round())
    assert ((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top + h <= height) & (left + w <= width)).all()
    drawn = ~((h == height) & (w == width)) if augmentation is GOOGLE else np.ones(len(boxes), dtype=bool)
    low, high = augmentation.crop_ratio
    # Both sides are rounded, by at most half a pixel.
    assert (w[drawn] + 0.5 >= low * (h[drawn] - 0.5)).all()
    assert (w[drawn] - 0.5 <= high * (h[drawn] + 0.5)).all()
    if augmentation is GOOGLE:
        assert (h * w >= 0.1 * height * width).all()
    else:
        usual = np.abs(np.log(width / height)) < math.log(4 / 3)
        assert not usual or ((h + 0.5) * (w + 0.5) >= 0.08 * height * width).all()


def test_both_ends_of_the_room_are_reached_or_not() -> None:
    """torchvision draws the last place; TensorFlow's exclusive bound leaves it out."""
    square = {"crop_scale": (0.25, 0.25), "crop_ratio": (1.0, 1.0)}
    shape, count = (8, 8), 2_000
    for sampling, places in (("torchvision", {0, 1, 2, 3, 4}), ("google", {0, 1, 2, 3})):
        boxes = boxes_of(shape, Augmentation(crop_sampling=sampling, **square), count)
        assert set(boxes[:, 2]) == set(boxes[:, 3]) == {4}
        for side in (0, 1):
            values, counts = np.unique(boxes[:, side], return_counts=True)
            assert set(values) == places
            assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (11, 400), (400, 11), (31, 47)])
def test_torchvision_gives_up_with_the_largest_centre_crop(shape: tuple[int, int]) -> None:
    """All tries ask for the whole area in a shape that does not fit, whatever the aspect."""
    scale, ratio = (1.0, 1.0), (3 / 4, 4 / 3)
    theirs = RandomResizedCrop.get_params(torch.empty(1, *shape), list(scale), list(ratio))
    augmentation = Augmentation(crop_scale=scale, crop_ratio=ratio)
    np.testing.assert_array_equal(boxes_of(shape, augmentation, 50), np.tile(theirs, (50, 1)))


def test_torchvision_gives_up_with_the_whole_image_where_its_aspect_is_allowed() -> None:
    widest = np.full((1, 2 * MAX_TRIES + 2), 1 - 1e-9)  # 4 : 3, a little wider than the photograph
    np.testing.assert_array_equal(sample_boxes(widest, np.array([[380, 500]]), TORCHVISION), [[0, 0, 380, 500]])


def test_google_gives_up_with_the_whole_image() -> None:
    boxes = boxes_of((20, 1000), GOOGLE, 500)
    np.testing.assert_array_equal(boxes, np.tile([0, 0, 20, 1000], (500, 1)))


@pytest.mark.parametrize("augmentation", [TORCHVISION, GOOGLE])
def test_a_box_depends_on_its_own_image_alone(augmentation: Augmentation) -> None:
    sizes = np.array(SHAPES)
    numbers = uniforms(2 * len(sizes)).reshape(len(sizes), 2, -1)
    together = sample_boxes(numbers, sizes[:, None], augmentation)
    assert together.shape == (len(sizes), 2, 4)
    for i, view in np.ndindex(len(sizes), 2):
        alone = sample_boxes(numbers[i, view], sizes[i], augmentation)
        np.testing.assert_array_equal(together[i, view], alone)


# What a crop holds.


def photographs(count: int, height: int, width: int) -> Tensor:
    """Smooth images without values near 0 or 255, whose resize never overshoots and is never clipped."""
    rng = np.random.default_rng(height + width)
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    rows, columns, phase = rng.uniform(-9, 9, (3, count, 3, 1, 1))
    return torch.from_numpy((128 + 90 * np.sin(rows * y + columns * x + phase)).round().astype(np.uint8))


def noise(count: int, height: int, width: int) -> Tensor:
    """The hardest case: every edge overshoots."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def corner_boxes(height: int, width: int) -> Tensor:
    """(3, 5, 4): the whole image, its corners, edges and middle, a row, a column and a pixel."""
    h, w = max(height // 3, 1), max(width // 2, 1)
    boxes = [
        (0, 0, height, width),
        (0, 0, h, w),
        (height - h, width - w, h, w),
        (0, width - w, h, w),
        (height - h, 0, h, w),
        (height // 4, width // 4, h, w),
        (0, 0, height, 1),
        (0, width - 1, height, 1),
        (height - 1, 0, 1, width),
        (height // 2, width // 2, 1, 1),
        (0, 0, height, w),
        (height - h, 0, h, width),
        (height - 1, width - 1, 1, 1),
        (0, 0, 1, 1),
        (0, 0, max(height - 1, 1), max(width - 1, 1)),
    ]
    return torch.tensor(boxes, dtype=torch.float32).view(3, 5, 4)


SIZES = [(32, 32, 32), (37, 53, 16), (37, 53, 64), (5, 7, 9), (96, 96, 11), (1, 1, 3), (210, 301, 33)]


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("images", [photographs, noise])
def test_a_batch_of_crops_is_torchvisions_float_resize(
    images: Callable[..., Tensor], height: int, width: int, size: int
) -> None:
    pixels, boxes = images(3, height, width), corner_boxes(height, width)
    crops = cut_batch(pixels, boxes, size)
    assert crops.shape == (3, 5, 3, size, size)
    assert crops.dtype == torch.float32
    for i, view in np.ndindex(3, 5):
        box = [int(value) for value in boxes[i, view]]
        expected = tv.resized_crop(
            pixels[i].double(), *box, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        torch.testing.assert_close(crops[i, view].double(), expected.clamp(0, 255), rtol=0, atol=0.01)


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_a_batch_of_crops_is_the_single_crop_to_rounding(height: int, width: int, size: int) -> None:
    """Each of the two passes of the resize of bytes rounds, so the result is off by little more than 1 / 255."""
    pixels, boxes = photographs(3, height, width), corner_boxes(height, width)
    crops = cut_batch(pixels, boxes, size)
    for i, view in np.ndindex(3, 5):
        single = cut(pixels[i], boxes[i, view].numpy(), size)
        assert single.dtype == torch.uint8
        torch.testing.assert_close(crops[i, view], single.float(), rtol=0, atol=1.3)


def test_a_crop_at_its_own_size_is_the_pixels() -> None:
    pixels = noise(2, 20, 30)
    boxes = torch.tensor([[[3.0, 5.0, 12.0, 12.0]], [[8.0, 18.0, 12.0, 12.0]]])
    expected = torch.stack([pixels[0, :, 3:15, 5:17], pixels[1, :, 8:20, 18:30]])
    torch.testing.assert_close(cut_batch(pixels, boxes, 12)[:, 0], expected.float(), rtol=0, atol=1e-4)
    for i in (0, 1):
        assert torch.equal(cut(pixels[i], boxes[i, 0].numpy(), 12), expected[i])


def test_pixels_beyond_the_box_do_not_leak_in() -> None:
    inside, boxes = torch.full((1, 3, 24, 24), 100, dtype=torch.uint8), torch.tensor([[[8.0, 4.0, 9.0, 13.0]]])
    framed = torch.full_like(inside, 255)
    framed[..., 8:17, 4:17] = 100
    for size in (5, 40):
        torch.testing.assert_close(cut_batch(framed, boxes, size), cut_batch(inside, boxes, size), rtol=0, atol=1e-3)
