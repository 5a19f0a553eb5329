"""Colours against torchvision's functional operations and NumPy transcriptions of TensorFlow's, image by image.

All references are in float64; the tolerance of 2e-5 is a two-hundredth of one of the 255 levels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy.ndimage import correlate1d
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from simclr_scale.data import color
from simclr_scale.data.augmentation import Augmentation, resolve
from simclr_scale.data.color import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    ORDERS,
    SATURATION,
    augment_by_masks,
    augment_colors,
    order_places,
)
from simclr_scale.data.draws import Draw, draw_views

SIZES = [(1, 1), (3, 8), (13, 7), (33, 50)]
FACTORS = [0.0, 0.2, 0.77, 1.0, 1.3, 1.8, 2.0]
TURNS = [-0.5, -0.2, -0.071, 0.0, 1 / 6, 0.2, 0.5]


def awkward_images(height: int, width: int) -> Tensor:
    """(8, 3, height, width) bytes: noise, black, white, one colour, pure colours, greys, one hue, nearly grey."""
    rng = np.random.default_rng(height * width)
    shape = (3, height, width)
    noise = rng.integers(0, 256, (2, *shape))
    pure = rng.integers(0, 2, shape) * 255
    greys = np.broadcast_to(rng.integers(0, 256, (1, height, width)), shape)
    one_color = np.broadcast_to(np.array([200, 31, 90])[:, None, None], shape)
    one_hue = np.stack([noise[0, 0], noise[0, 0] // 2, noise[0, 0] // 4])
    nearly_grey = 128 + rng.integers(0, 2, shape)
    images = [noise[1], np.zeros(shape), np.full(shape, 255), one_color, pure, greys, one_hue, nearly_grey]
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected), rtol=0, atol=2e-5)


# TensorFlow's operations on one image (3, H, W) of float64 in [0, 1], before the clip.


def tf_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """tf.image.adjust_contrast: about the mean of each channel."""
    mean = image.mean((1, 2), keepdims=True)
    return (image - mean) * factor + mean


def tf_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """tf.image.adjust_saturation: S of HSV is multiplied and clipped."""
    hsv = rgb_to_hsv(np.moveaxis(image, 0, -1))
    hsv[..., 1] = (hsv[..., 1] * factor).clip(0, 1)
    return np.moveaxis(hsv_to_rgb(hsv), -1, 0)


def tf_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """tf.image.adjust_hue: H of HSV is shifted around the circle."""
    hsv = rgb_to_hsv(np.moveaxis(image, 0, -1))
    hsv[..., 0] = (hsv[..., 0] + turns) % 1
    return np.moveaxis(hsv_to_rgb(hsv), -1, 0)


def tf_blur(image: np.ndarray, size: int, sigma: float) -> np.ndarray:
    """data_util.py, gaussian_blur: two depthwise convolutions with 'SAME' padding, which is zeros."""
    x = np.arange(-(size // 2), size // 2 + 1)
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    return correlate1d(correlate1d(image, kernel, axis=1, mode="constant"), kernel, axis=2, mode="constant")


def by_numpy(function: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    return lambda image, *args: torch.from_numpy(function(image.numpy(), *args))


REFERENCE: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    color.scale_brightness: tv.adjust_brightness,
    color.contrast_by_grey: tv.adjust_contrast,
    color.saturation_by_grey: tv.adjust_saturation,
    color.contrast_by_channel: by_numpy(tf_contrast),
    color.saturation_in_hsv: by_numpy(tf_saturation),
    color.add_brightness: lambda image, delta: image + delta,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", REFERENCE, ids=lambda function: function.__name__)
def test_an_operation_is_its_reference(operation: Callable[..., Tensor], size: tuple[int, int]) -> None:
    images = awkward_images(*size) / 255
    for shift in range(len(FACTORS)):
        factors = np.resize(np.roll(FACTORS, shift), len(images))
        expected = [REFERENCE[operation](image, float(f)) for image, f in zip(images.double(), factors, strict=True)]
        actual = operation(images, torch.from_numpy(factors).float()[:, None, None, None])
        close(actual.clamp(0, 1), torch.stack(expected).clamp(0, 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reference", [tv.adjust_hue, by_numpy(tf_hue)], ids=["torchvision", "HSV"])
def test_hue_is_a_shift_of_the_circle(reference: Callable[..., Tensor], size: tuple[int, int]) -> None:
    images = awkward_images(*size) / 255
    for shift in range(len(TURNS)):
        turns = np.resize(np.roll(TURNS, shift), len(images))
        expected = [reference(image, float(t)) for image, t in zip(images.double(), turns, strict=True)]
        close(color.shift_hue(images, torch.from_numpy(turns).float()[:, None, None, None]), torch.stack(expected))


def test_a_shift_of_the_hue_by_thirds_permutes_the_channels() -> None:
    images = awkward_images(9, 5) / 255
    third = torch.full((len(images), 1, 1, 1), 1 / 3)
    close(color.shift_hue(images, third), images.roll(1, dims=1).double())
    close(color.shift_hue(images, -third), images.roll(-1, dims=1).double())


@pytest.mark.parametrize("size", SIZES)
def test_grey_is_torchvisions(size: tuple[int, int]) -> None:
    images = awkward_images(*size) / 255
    close(color.grey(images), tv.rgb_to_grayscale(images.double(), num_output_channels=3))


@pytest.mark.parametrize("size", [(20, 31), (41, 23), (97, 70), (64, 64)])
@pytest.mark.parametrize("blur", [color.blur_in_blocks, color.blur_by_matrices])
def test_blur_is_its_reference(blur: Callable[..., Tensor], size: tuple[int, int]) -> None:
    images = awkward_images(*size) / 255
    kernel = color.blur_kernel_size(size[0])
    sigmas = torch.linspace(0.1, 2, len(images))
    pairs = list(zip(images.double(), sigmas.tolist(), strict=True))
    reflected = [tv.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) for image, sigma in pairs]
    close(blur(images, sigmas, "reflect"), torch.stack(reflected))
    zero_padded = [tf_blur(image.numpy(), kernel, sigma) for image, sigma in pairs]
    close(blur(images, sigmas, "constant"), np.stack(zero_padded))


def test_blur_kernel_is_a_tenth_of_the_image() -> None:
    """23 at 224: reference/recipe.md and data_util.py, random_blur."""
    sizes = {8: 1, 19: 1, 20: 3, 32: 3, 64: 7, 96: 9, 128: 13, 160: 17, 224: 23, 331: 33}
    assert {size: color.blur_kernel_size(size) for size in sizes} == sizes


def test_orders_are_all_permutations() -> None:
    assert len(set(ORDERS)) == 24
    assert all(sorted(order) == [BRIGHTNESS, CONTRAST, SATURATION, HUE] for order in ORDERS)


# The whole chain: for each image flip, jitter in its own order, grey, blur, clipped after each step.


def chain(image: Tensor, draw: np.ndarray, augmentation: Augmentation) -> Tensor:
    """(3, H, W) bytes -> float64, one functional call after the other."""
    x = image.double() / 255
    google = augmentation.color_ops == "google"
    brightness = (lambda y, delta: y + delta) if augmentation.brightness_mode == "additive" else tv.adjust_brightness
    operations: dict[int, tuple[Callable[..., Tensor], Draw]] = {
        BRIGHTNESS: (brightness, Draw.BRIGHTNESS),
        CONTRAST: (by_numpy(tf_contrast) if google else tv.adjust_contrast, Draw.CONTRAST),
        SATURATION: (by_numpy(tf_saturation) if google else tv.adjust_saturation, Draw.SATURATION),
        HUE: (by_numpy(tf_hue) if google else tv.adjust_hue, Draw.HUE),
    }
    if draw[Draw.FLIP]:
        x = tv.horizontal_flip(x)
    if draw[Draw.JITTER]:
        for operation in ORDERS[int(draw[Draw.ORDER])]:
            function, column = operations[operation]
            x = function(x, float(draw[column])).clamp(0, 1)
    if draw[Draw.GREY]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3).clamp(0, 1)
    if draw[Draw.BLUR]:
        size, sigma = color.blur_kernel_size(x.shape[-2]), float(draw[Draw.SIGMA])
        x = (
            torch.from_numpy(tf_blur(x.numpy(), size, sigma))
            if google
            else tv.gaussian_blur(x, [size] * 2, [sigma] * 2)
        )
    return x.clamp(0, 1)


SETS = {
    "torchvision": resolve("natural", {}),
    "google": resolve("natural", {"color_ops": "google"}),
    "google_v1": resolve("natural", {"color_ops": "google", "brightness_mode": "additive"}),
}


def views_and_draws(augmentation: Augmentation, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Every awkward image six times as (24, 2, 3, H, W), and for each a draw of its own that holds all 24 orders."""
    views = awkward_images(height, width).repeat(6, 1, 1, 1).unflatten(0, (24, 2))
    rng = np.random.default_rng(0)
    draws = np.zeros((24, 2, len(Draw)), dtype=np.float32)
    for flag, rate in ((Draw.FLIP, 0.5), (Draw.JITTER, 0.9), (Draw.GREY, 0.2), (Draw.BLUR, 0.5)):
        draws[..., flag] = rng.random((24, 2)) < rate
    for factor in (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION):
        draws[..., factor] = rng.uniform(0.2, 1.8, (24, 2))
    if augmentation.brightness_mode == "additive":
        draws[..., Draw.BRIGHTNESS] = rng.uniform(-0.8, 0.8, (24, 2))
    draws[..., Draw.HUE] = rng.uniform(-0.2, 0.2, (24, 2))
    draws[..., Draw.ORDER] = np.stack([rng.permutation(24), rng.permutation(24)], 1)
    draws[..., Draw.SIGMA] = rng.uniform(0.1, 2, (24, 2))
    return views, torch.from_numpy(draws)


@pytest.mark.parametrize("size", [(5, 4), (27, 40)])
@pytest.mark.parametrize("name", SETS)
def test_the_pipeline_is_the_chain_of_each_image(name: str, size: tuple[int, int]) -> None:
    augmentation = SETS[name]
    views, draws = views_and_draws(augmentation, *size)
    actual = augment_colors(views, draws, augmentation)
    assert actual.dtype == torch.float32
    expected = [chain(views[i, view], draws[i, view].numpy(), augmentation) for view in (0, 1) for i in range(24)]
    close(actual, torch.stack(expected))


def test_the_two_definitions_differ() -> None:
    """Else one of them would be tested against the other's reference without notice."""
    views, draws = views_and_draws(SETS["torchvision"], 27, 40)
    torchvision, google = (augment_colors(views, draws, SETS[name]) for name in ("torchvision", "google"))
    assert (torchvision - google).abs().amax((1, 2, 3)).median() > 0.05


def test_result_is_all_first_views_then_all_second_views() -> None:
    views = torch.arange(6, dtype=torch.uint8).view(3, 2, 1, 1, 1).expand(3, 2, 3, 4, 4)
    inputs = augment_colors(views, torch.zeros(3, 2, len(Draw)), Augmentation())
    assert inputs.shape == (6, 3, 4, 4)
    assert (inputs[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 4, 1, 3, 5]


def test_without_any_flag_the_pixels_are_untouched() -> None:
    views, draws = views_and_draws(SETS["torchvision"], 20, 20)
    draws[..., [Draw.FLIP, Draw.JITTER, Draw.GREY, Draw.BLUR]] = 0
    torch.testing.assert_close(
        augment_colors(views, draws, SETS["torchvision"]), views.transpose(0, 1).flatten(0, 1) / 255, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", SETS)
def test_groups_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    augmentation = SETS[name]
    views, draws = views_and_draws(augmentation, 27, 40)
    results = []
    for size in (1, 5 * 3 * 27 * 40 * 4, 1 << 30):  # one, five and all images at once
        monkeypatch.setattr(color, "_GROUP_BYTES_ON_CPU", size)
        results.append(augment_colors(views, draws, augmentation))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_bytes_and_floats_agree(name: str) -> None:
    views, draws = views_and_draws(SETS[name], 21, 20)
    assert torch.equal(augment_colors(views, draws, SETS[name]), augment_colors(views.float(), draws, SETS[name]))


@pytest.mark.parametrize("images", [1, 24])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_its_arguments_stay_as_they_are(images: int, dtype: torch.dtype) -> None:
    views, draws = (part[:images] for part in views_and_draws(SETS["torchvision"], 20, 20))
    views = views.to(dtype)
    before = views.clone(), draws.clone()
    first = augment_colors(views, draws, SETS["torchvision"])
    assert torch.equal(views, before[0])
    assert torch.equal(draws, before[1])
    assert torch.equal(augment_colors(views, draws, SETS["torchvision"]), first)


# Images of other channels: grey ones, and bands that are no colours.


def channel_chain(image: Tensor, draw: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """(C, H, W) bytes -> float64 without a colour operation, one step after the other; contrast is each channel's."""
    x, channels = image.double().numpy() / 255, len(image)
    whole = len(Draw)
    brightness, contrast, drop = draw[whole:].reshape(3, channels) if len(draw) > whole else (None, None, None)
    if draw[Draw.FLIP]:
        x = x[:, :, ::-1]
    if draw[Draw.JITTER]:
        for operation in ORDERS[int(draw[Draw.ORDER])]:
            for c in range(channels):
                if operation == BRIGHTNESS:
                    factor = brightness[c] if augmentation.per_channel else draw[Draw.BRIGHTNESS]
                    x = np.stack([*x[:c], x[c] * factor, *x[c + 1 :]])
                if operation == CONTRAST:
                    factor = contrast[c] if augmentation.per_channel else draw[Draw.CONTRAST]
                    mean = x[c].mean()
                    x = np.stack([*x[:c], (x[c] - mean) * factor + mean, *x[c + 1 :]])
            x = x.clip(0, 1)
    if augmentation.channel_drop:
        x = np.stack([band * (0 if dropped else 1) for band, dropped in zip(x, drop, strict=True)])
    if draw[Draw.BLUR]:
        size, sigma = [color.blur_kernel_size(x.shape[-2])] * 2, [float(draw[Draw.SIGMA])] * 2
        x = tv.gaussian_blur(torch.from_numpy(x.copy()), size, sigma).numpy()
    return x.clip(0, 1)


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("preset", ["grey", "multiband"])
def test_presets_without_colors_are_the_chain_of_each_image(preset: str, channels: int) -> None:
    augmentation = resolve(preset, {} if channels > 1 else {"channel_drop": 0.0})
    augmentation.require_channels(channels)
    rng = np.random.default_rng(channels)
    views = torch.from_numpy(rng.integers(0, 256, (24, 2, channels, 27, 40), dtype=np.uint8))
    draws = torch.from_numpy(draw_views(augmentation, 0, 0, range(24), np.array([27, 40]), channels))
    actual = augment_colors(views, draws, augmentation)
    expected = [channel_chain(views[i, v], draws[i, v].numpy(), augmentation) for v in (0, 1) for i in range(24)]
    # On three channels, contrast that is the same for all is about the grey mean, as for photographs.
    if channels == 3 and preset == "grey":
        expected = [chain(views[i, v], draws[i, v].numpy(), augmentation) for v in (0, 1) for i in range(24)]
    close(actual, np.stack(expected))


def test_sixteen_bits_are_not_rounded_to_eight() -> None:
    augmentation = resolve("grey", {"blur": 0.0})
    deep = torch.rand(6, 2, 1, 9, 9, dtype=torch.float64) * 255
    draws = torch.from_numpy(draw_views(augmentation, 0, 0, range(6), np.array([9, 9]), 1))
    draws[..., [Draw.FLIP, Draw.JITTER]] = 0
    close(augment_colors(deep.float(), draws, augmentation), (deep / 255).transpose(0, 1).flatten(0, 1))


# Accelerators, where the host must not ask what was drawn.

EVERYWHERE = {**SETS, "grey": resolve("grey", {}), "multiband": resolve("multiband", {"blur": 1.0})}


def views_of(name: str, height: int = 27, width: int = 40) -> tuple[Tensor, Tensor]:
    """(24, 2, C, H, W) and draws, for each set of EVERYWHERE."""
    if name in SETS:
        return views_and_draws(SETS[name], height, width)
    channels = {"grey": 1, "multiband": 6}[name]
    images = awkward_images(height, width).repeat(6, channels, 1, 1)[:, :channels]
    draws = draw_views(EVERYWHERE[name], 3, 0, range(24), np.array([height, width]), channels)
    return images.unflatten(0, (24, 2)), torch.from_numpy(draws)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_masks_choose_what_groups_choose(name: str) -> None:
    views, draws = views_of(name)
    images, own = (part.transpose(0, 1).flatten(0, 1) for part in (views, draws))
    by_masks = augment_by_masks(images, own, EVERYWHERE[name])
    torch.testing.assert_close(by_masks, augment_colors(views, draws, EVERYWHERE[name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_masks_never_wait_for_the_device(name: str) -> None:
    """Tensors without values: whatever reads one, or has a shape that depends on one, raises."""
    images, draws = (part.transpose(0, 1).flatten(0, 1).to("meta") for part in views_of(name))
    augmented = augment_by_masks(images, draws, EVERYWHERE[name])
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.float32


@pytest.mark.parametrize("read", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item(), torch.unique])
def test_a_look_at_the_device_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)meta"):
        read(torch.ones(3, device="meta"))


@pytest.mark.parametrize("name", ["google_v1", "multiband"])
def test_masks_are_one_graph_for_the_compiler(name: str) -> None:
    images, draws = (part.transpose(0, 1).flatten(0, 1) for part in views_of(name))
    compiled = torch.compile(augment_by_masks, fullgraph=True, backend="eager")
    expected = augment_by_masks(images, draws, EVERYWHERE[name])
    torch.testing.assert_close(compiled(images, draws, EVERYWHERE[name]), expected, rtol=0, atol=1e-6)
    torch._dynamo.reset()


def test_order_by_arithmetic_is_that_of_the_table() -> None:
    places = order_places(torch.arange(24.0))
    assert torch.equal(torch.stack(places, 1), torch.tensor(ORDERS))


def test_without_a_compiler_the_operations_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*arguments: Any) -> Tensor:
        calls.append(arguments)
        raise torch._dynamo.exc.TorchDynamoException("no C compiler\nand more")

    monkeypatch.setattr(color, "_compile", lambda: broken)
    monkeypatch.setattr(color, "_compiler_failed", False)
    images, draws = (part.transpose(0, 1).flatten(0, 1) for part in views_of("torchvision"))
    expected = augment_by_masks(images, draws, SETS["torchvision"])
    with pytest.warns(UserWarning, match=r"torch\.compile failed \(no C compiler\)$"):
        assert torch.equal(color._compiled(images, draws, SETS["torchvision"]), expected)
    assert torch.equal(color._compiled(images, draws, SETS["torchvision"]), expected)
    assert len(calls) == 1, "a failure is not repeated at every batch"
