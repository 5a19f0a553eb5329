"""Google's colour operations and crops against TensorFlow itself, in a process and an environment of its own."""

import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from simclr_scale.data import color
from simclr_scale.data.augmentation import Augmentation, resolve
from simclr_scale.data.color import ORDERS, augment_colors
from simclr_scale.data.crops import MAX_TRIES, sample_boxes
from simclr_scale.data.draws import Draw, draw_views
from tests.data.test_color import awkward_images

pytestmark = pytest.mark.slow

PYTHON = "SIMCLR_SCALE_ORACLE_PYTHON"
SCRIPT = Path(__file__).with_name("tensorflow_oracle.py")
Arrays = dict[str, np.ndarray]
Oracle = Callable[..., Arrays]
# TensorFlow reckons in float32 too, and by way of HSV; a level of a byte is 4e-3.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tensorflow(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Runs a function of the script. Without TensorFlow these tests skip and say so; CI installs it and runs them."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"set {PYTHON} to a Python that has TensorFlow (pip install tensorflow-cpu) to run this")
    folder = tmp_path_factory.mktemp("tensorflow")

    def run(function: str, **inputs: np.ndarray) -> Arrays:
        source, target = folder / "inputs.npz", folder / "outputs.npz"
        np.savez(source, **inputs)
        done = subprocess.run(
            [python, str(SCRIPT), function, str(source), str(target)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(target) as loaded:
            return dict(loaded)

    return run


def for_tensorflow(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) bytes as (N, H, W, 3) float32 in [0, 1]."""
    return (images.permute(0, 2, 3, 1) / 255).numpy()


def from_tensorflow(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


FACTORS = np.linspace(0, 2, 9)
RANGES = {
    "scale_brightness": FACTORS,
    "add_brightness": np.linspace(-0.8, 0.8, 9),
    "adjust_contrast": FACTORS,
    "adjust_saturation": FACTORS,
    "adjust_hue": np.linspace(-0.5, 0.5, 9),
}
OURS = {
    "scale_brightness": color.scale_brightness,
    "add_brightness": color.add_brightness,
    "adjust_contrast": color.contrast_by_channel,
    "adjust_saturation": color.saturation_in_hsv,
    "adjust_hue": color.shift_hue,
}


def test_operations_are_tensorflows(tensorflow: Oracle) -> None:
    """Every awkward image with every factor: numbers of images and factors have no common divisor."""
    images = awkward_images(13, 17).repeat(9, 1, 1, 1)
    factors = {name: np.resize(values, len(images)).astype(np.float32) for name, values in RANGES.items()}
    theirs = tensorflow("operations", images=for_tensorflow(images), **factors)
    for name, function in OURS.items():
        actual = function(images / 255, torch.from_numpy(factors[name])[:, None, None, None]).clamp(0, 1)
        torch.testing.assert_close(actual, from_tensorflow(theirs[name]), rtol=0, atol=TOLERANCE, msg=name)
    actual = color.grey(images / 255)
    torch.testing.assert_close(actual, from_tensorflow(theirs["grey"]).expand_as(actual), rtol=0, atol=TOLERANCE)
    # torchvision's definitions would not pass.
    contrast = color.contrast_by_grey(images / 255, torch.from_numpy(factors["adjust_contrast"])[:, None, None, None])
    assert (contrast.clamp(0, 1) - from_tensorflow(theirs["adjust_contrast"])).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["multiplicative", "additive"])
def test_the_recipe_is_tensorflows_image_by_image(tensorflow: Oracle, mode: str) -> None:
    """Our draws, each image with its own order of jitters."""
    augmentation = resolve("natural", {"color_ops": "google", "brightness_mode": mode})
    views = awkward_images(40, 40).repeat(40, 1, 1, 1).unflatten(0, (-1, 2))
    draws = draw_views(augmentation, 0, 0, range(len(views)), np.array([40, 40]))
    flat = draws.reshape(-1, draws.shape[-1])
    assert set(flat[flat[:, Draw.JITTER] > 0, Draw.ORDER]) == set(range(24))
    theirs = tensorflow(
        "chains",
        images=for_tensorflow(views.flatten(0, 1)),
        additive=np.array(mode == "additive"),
        flip=flat[:, Draw.FLIP],
        jitter=flat[:, Draw.JITTER],
        sequences=np.array(ORDERS)[flat[:, Draw.ORDER].astype(int)],
        factors=flat[:, [Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE]],
        grey=flat[:, Draw.GREY],
        blur=flat[:, Draw.BLUR],
        kernel=np.array(color.blur_kernel_size(40)),
        sigma=flat[:, Draw.SIGMA],
    )["images"]
    actual = augment_colors(views, torch.from_numpy(draws), augmentation)
    expected = from_tensorflow(theirs).unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


COUNT = 20_000


def shares(boxes: np.ndarray, shape: tuple[int, int]) -> Arrays:
    """What is compared of boxes (N, 4)."""
    top, left, height, width = boxes.astype(np.float64).T
    return {
        "height": height,
        "width": width,
        "area": height * width / math.prod(shape),
        "aspect": width / height,
        "top": top / np.maximum(shape[0] - height, 1),
        "left": left / np.maximum(shape[1] - width, 1),
    }


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((375, 500), (0.08, 1.0)), ((500, 333), (0.08, 1.0)), ((100, 330), (0.08, 1.0)), ((375, 500), (0.2, 0.6))],
)
def test_crops_have_tensorflows_distribution(
    tensorflow: Oracle, shape: tuple[int, int], scale: tuple[float, float]
) -> None:
    google = Augmentation(crop_sampling="google", crop_scale=scale)
    inputs = {"shape": shape, "count": COUNT, "scale": scale, "ratio": google.crop_ratio}
    theirs = tensorflow("boxes", **{name: np.array(value) for name, value in inputs.items()})["boxes"]
    assert theirs.shape == (COUNT, 4)
    uniforms = np.random.default_rng(0).random((COUNT, 2 * MAX_TRIES + 2))
    sizes = np.broadcast_to(np.array(shape), (COUNT, 2))
    expected = shares(theirs, shape)
    for name, values in shares(sample_boxes(uniforms, sizes, google), shape).items():
        assert stats.ks_2samp(values, expected[name]).pvalue > 1e-3, name
    # The other distribution in use is told apart, in areas or in aspects.
    other = shares(sample_boxes(uniforms, sizes, Augmentation(crop_scale=scale)), shape)
    assert min(stats.ks_2samp(other[name], expected[name]).pvalue for name in ("area", "aspect")) < 1e-6
