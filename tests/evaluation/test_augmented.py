"""The paper's linear protocol: SGD on augmented images, held against the same steps in NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.draws import Draw, draw_views
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.errors import InputError
from simclr_scale.evaluation import augmented_probe, encoder_fingerprint, evaluate_linear, extract_features, top1
from simclr_scale.evaluation.features import image_loader
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder
from tests.gloo_pool import GlooPool

CLASSES = ("a", "b", "c", "d")
LABELS = [0, 1, 2, -1, 3] * 7
TRAIN = ColorSource(LABELS, CLASSES)
TEST = ColorSource([3, 2, 1, 0] * 10, CLASSES, seed=1)
TRANSFORM = ImageTransform((3, 6, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def view(source: ColorSource, seed: int, epoch: int, index: int) -> torch.Tensor:
    """One augmented image by hand."""
    crop_and_flip = Augmentation(jitter=0, grey=0, blur=0)
    draws = draw_views(crop_and_flip, seed, epoch, [index], np.array([8, 8]))[0, 0]
    top, left, height, width = (int(draws[column]) for column in (Draw.TOP, Draw.LEFT, Draw.HEIGHT, Draw.WIDTH))
    pixels = np.array(source.image(index))[top : top + height, left : left + width]
    crop = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(crop, (6, 6), mode="bicubic", antialias=True)[0].numpy() / 255
    if draws[Draw.FLIP]:
        resized = resized[..., ::-1]
    normalised = (resized - np.array(TRANSFORM.config["mean"])[:, None, None]) / np.array(TRANSFORM.config["std"])[
        :, None, None
    ]
    return torch.from_numpy(normalised.copy()).float()


def by_hand(epochs: int, batch_size: int, seed: int, learning_rate: float, decay: float) -> tuple[np.ndarray, ...]:
    """Weight (C, D), bias (C,) and the losses of the epochs, in NumPy and float64."""
    encoder = small_encoder().eval()
    chosen = np.flatnonzero(TRAIN.labels >= 0)
    batches = len(chosen) // batch_size
    weight, bias = np.zeros((4, 8)), np.zeros(4)
    velocity, bias_velocity = np.zeros((4, 8)), np.zeros(4)
    losses = []
    for epoch in range(epochs):
        raw = generator(Purpose.ORDER, seed, epoch, 0).bit_generator.random_raw(len(chosen))
        order = chosen[np.argsort(raw, kind="stable")]
        total = 0.0
        for step in range(batches):
            index = order[step * batch_size : (step + 1) * batch_size]
            with torch.no_grad():
                pictures = torch.stack([view(TRAIN, seed, epoch, int(i)) for i in index])
                x = encoder(pictures).double().numpy()
            logits = x @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            hit = np.arange(batch_size), TRAIN.labels[index]
            total -= np.log(p[hit]).mean()
            p[hit] -= 1
            rate = learning_rate * batch_size / 256
            rate *= 0.5 * (1 + math.cos(math.pi * (epoch * batches + step) / (epochs * batches)))
            g, g_bias = p.T @ x / batch_size + decay * weight, p.mean(0)
            velocity, bias_velocity = 0.9 * velocity + g, 0.9 * bias_velocity + g_bias
            weight = weight - rate * (g + 0.9 * velocity)
            bias = bias - rate * (g_bias + 0.9 * bias_velocity)
        losses.append(total / batches)
    return weight, bias, np.array(losses)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("batch_size", [9, 28])
def test_every_step_is_that_of_the_formula(batch_size: int, decay: float) -> None:
    probe = augmented_probe(
        small_encoder(),
        TRANSFORM,
        TRAIN,
        learning_rate=8.0,
        weight_decay=decay,
        epochs=3,
        batch_size=batch_size,
        seed=5,
    )
    weight, bias, losses = by_hand(3, batch_size, 5, 8.0, decay)
    assert probe.classes.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.bias.numpy(), bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.losses, losses, rtol=1e-5)
    # It would see another seed, rate or decay.
    for other in ((3, batch_size, 6, 8.0, decay), (3, batch_size, 5, 7.0, decay), (3, batch_size, 5, 8.0, decay + 0.1)):
        assert np.abs(by_hand(*other)[0] - weight).max() > 1e-3


def test_the_encoder_is_bitwise_what_it_was() -> None:
    encoder = small_encoder().train()
    encoder[2].eval()
    before, modes = encoder_fingerprint(encoder), [module.training for module in encoder.modules()]
    augmented_probe(encoder, TRANSFORM, TRAIN, epochs=2, batch_size=8)
    assert encoder_fingerprint(encoder) == before
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_workers_change_nothing_and_the_seed_does() -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8}
    first = augmented_probe(small_encoder(), TRANSFORM, TRAIN, **settings)
    again = augmented_probe(small_encoder(), TRANSFORM, TRAIN, num_workers=2, **settings)
    assert torch.equal(first.weight, again.weight)
    assert first.losses == again.losses
    assert augmented_probe(small_encoder(), TRANSFORM, TRAIN, seed=1, **settings).losses != first.losses


def _on_a_rank(rank: int, world_size: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    del rank, world_size
    probe = augmented_probe(small_encoder(), TRANSFORM, TRAIN, learning_rate=8.0, epochs=3, batch_size=batch_size)
    return probe.weight, probe.bias, probe.losses


@pytest.mark.parametrize("batch_size", [9, 28])
def test_two_ranks_arrive_where_one_does(gloo: GlooPool, batch_size: int) -> None:
    weight, bias, losses = _on_a_rank(0, 1, batch_size)
    first, second = gloo(2, _on_a_rank, batch_size)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
    torch.testing.assert_close(first[0], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[1], bias, rtol=1e-4, atol=1e-5)
    assert first[2] == pytest.approx(losses, abs=1e-6)


def _refused(rank: int, world_size: int) -> str:
    del rank, world_size
    with pytest.raises(InputError) as refusal:
        augmented_probe(small_encoder(), TRANSFORM, TRAIN, batch_size=1)
    return str(refusal.value)


def test_a_batch_smaller_than_the_ranks_is_refused_on_all(gloo: GlooPool) -> None:
    assert gloo(2, _refused) == ["batch_size: 1 images a step for 2 ranks; wanted at least one a rank"] * 2


def test_the_loss_falls_and_the_test_images_are_told_apart() -> None:
    settings: dict[str, Any] = {"learning_rate": 10.0, "epochs": 40, "probe_batch_size": 14}
    manifest = evaluate_linear(small_encoder(), TRANSFORM, TRAIN, TEST, method="sgd", seed=2, **settings)
    probe = augmented_probe(small_encoder(), TRANSFORM, TRAIN, learning_rate=10.0, epochs=40, batch_size=14, seed=2)
    features, labels, _ = extract_features(small_encoder(), image_loader(TEST, TRANSFORM))
    assert manifest.values == (top1(probe.predict(features), labels),)
    assert manifest.mean > 0.7
    assert probe.losses[-1] < probe.losses[0] / 1.5
    assert manifest.details["losses"] == list(probe.losses)
    assert manifest.settings == {
        "method": "sgd",
        "augmentation": "random resized crop, flip",
        "learning_rate": 10.0,
        "epochs": 40,
        "probe_batch_size": 14,
        "momentum": 0.9,
        "seed": 2,
    }


def test_it_takes_few_labels_and_leaves_out_what_cannot_be_read() -> None:
    damaged = DamagedSource(LABELS, CLASSES, 0, {0, 6})
    manifest = evaluate_linear(small_encoder(), TRANSFORM, damaged, TEST, method="sgd", epochs=1)
    assert manifest.train.images == 26
    assert manifest.warnings[0].startswith("2 of 28 training images cannot be read")
    few = evaluate_linear(small_encoder(), TRANSFORM, TRAIN, TEST, method="sgd", epochs=1, labels="1-shot")
    assert len(few.values) == 5
    assert few.train.images == 4


@pytest.mark.parametrize("shape", [(9, 13), (31, 8)])
def test_a_crop_is_the_box_resized(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    transform = ImageTransform((3, 5, 5), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    # A box of the result's size needs no resizing.
    cropped = transform.cropped(picture, np.array([2, 1, 5, 5], dtype=np.float32))
    expected = (pixels[2:7, 1:6].transpose(2, 0, 1) / 255 - np.array([[[0.5]], [[0.4]], [[0.3]]])) / np.array(
        [[[0.2]], [[0.3]], [[0.4]]]
    )
    np.testing.assert_allclose(cropped.numpy(), expected, atol=1e-6)
    mirrored = transform.cropped(picture, np.array([2, 1, 5, 5], dtype=np.float32), flip=True)
    assert torch.equal(mirrored, cropped.flip(-1))
    # An array of bytes is a picture of that many channels.
    array = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(transform.cropped(array, np.array([2, 1, 5, 5], dtype=np.float32)), cropped)
    with pytest.raises(InputError, match="takes images of 3 channels, not 2"):
        transform.cropped(array[:2], np.array([2, 1, 5, 5], dtype=np.float32))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (ColorSource([-1] * 4, ()), {}, "training takes images with labels"),
        (TRAIN, {"indices": [0, 3]}, "training takes images with labels, and some of those chosen have none"),
        (TRAIN, {"indices": [0, 5]}, "all labels are of class 0; a classifier needs at least two"),
        (TRAIN, {"learning_rate": 0.0}, "learning_rate: 0.0"),
        (TRAIN, {"learning_rate": 1e9, "weight_decay": 1e9, "batch_size": 2}, "diverged at .*; wanted a smaller one"),
        (TRAIN, {"weight_decay": -1.0}, "weight_decay: -1.0"),
        (TRAIN, {"epochs": 0}, "epochs: 0"),
        (TRAIN, {"batch_size": 0}, "batch_size: 0"),
        (DamagedSource(LABELS, CLASSES, 0, {6}), {}, r"image 6: not a readable image \(cut off\)"),
    ],
)
def test_bad_input_is_named(source: ColorSource, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        augmented_probe(small_encoder(), TRANSFORM, source, **settings)


def test_what_cannot_crop_is_named() -> None:
    with pytest.raises(InputError, match="images of 6 x 8, but random crops are square"):
        augmented_probe(small_encoder(), ImageTransform((3, 6, 8)), TRAIN)
