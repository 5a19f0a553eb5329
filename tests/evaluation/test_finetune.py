"""Fine-tuning: the whole network trained by the papers' protocols, held against the same steps written out."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr_scale.bundle import ImageTransform, load_encoder
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources import open_source
from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    METRICS,
    TrainedClassifier,
    TrainingSettings,
    classify_images,
    encoder_fingerprint,
    evaluate_finetune,
    evaluate_linear,
    fine_tune,
)
from simclr_scale.evaluation.augmented_images import AugmentedImages
from simclr_scale.evaluation.finetune import Choices
from simclr_scale.models import ClassificationHead, ImageClassifier, PixelEncoder, ProjectionHead
from tests.evaluation.stripes import CLASSES, TRANSFORM, StripeSource, tiny_encoder, tiny_head
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder
from tests.gloo_pool import GlooPool

TRAIN, TEST = StripeSource(30), StripeSource(24, seed=1)
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 9}


def batches(images: int, size: int, epochs: int, seed: int) -> list[list[tuple[int, int]]]:
    """(epoch, index) of every step."""
    steps = []
    for epoch in range(epochs):
        order = np.argsort(generator(Purpose.ORDER, seed, epoch, 0).bit_generator.random_raw(images), kind="stable")
        steps += [
            [(epoch, int(index)) for index in order[start : start + size]]
            for start in range(0, images - size + 1, size)
        ]
    return steps


def by_hand(
    protocol: str, epochs: int, batch: int, seed: int, rate: float, decay: float
) -> tuple[nn.Module, list[float]]:
    """The network and the losses of the epochs, every step written out in float64."""
    encoder, head = tiny_encoder().double(), tiny_head().double()
    layers = 1 if protocol == "v2" else 0
    linear = nn.Linear(5 if layers else 8, 3).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    network = nn.Sequential(encoder, nn.Sequential(*head.layers[:layers]), linear).train()
    views = AugmentedImages(TRAIN, TRANSFORM, seed)
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    free = [name for name, p in network.named_parameters() if p.ndim == 1 or name.startswith("2.")]
    steps = batches(len(TRAIN), batch, epochs, seed)
    losses = []
    for step, keys in enumerate(steps):
        x = torch.stack([views[key][0] for key in keys]).double()
        y = torch.from_numpy(TRAIN.labels[[index for _, index in keys]])
        logits = network(x)
        loss = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(len(y)), y].mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        lr = rate * (batch / 256 if protocol == "v1" else math.sqrt(batch))
        lr *= 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        with torch.no_grad():
            for (name, p), g in zip(network.named_parameters(), gradients, strict=True):
                if name not in free:
                    g = g + decay * p
                if protocol == "v1":
                    velocity[name] = 0.9 * velocity[name] + g
                    p -= lr * (g + 0.9 * velocity[name])
                else:
                    trust = 1.0
                    if name not in free and p.norm() > 0 and g.norm() > 0:
                        trust = 0.001 * float(p.norm() / g.norm())
                    velocity[name] = 0.9 * velocity[name] + lr * trust * g
                    p -= velocity[name]
    each = len(steps) // epochs
    return network, [float(np.mean(losses[i : i + each])) for i in range(0, len(losses), each)]


def weights(network: nn.Module) -> np.ndarray:
    return np.concatenate([tensor.detach().double().flatten().numpy() for tensor in network.state_dict().values()])


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_every_step_is_that_of_the_formula(protocol: Any, decay: float) -> None:
    rate = {"v1": 1.0, "v2": 0.05}[protocol]
    tuned = fine_tune(
        tiny_encoder(),
        TRANSFORM,
        TRAIN,
        protocol=protocol,
        head=tiny_head(),
        learning_rate=rate,
        weight_decay=decay,
        seed=3,
        **QUICK,
    )
    expected, losses = by_hand(protocol, 2, 9, 3, rate, decay)
    np.testing.assert_allclose(tuned.losses, losses, rtol=1e-6)
    np.testing.assert_allclose(weights(tuned.network), weights(expected), rtol=1e-5, atol=2e-6)
    # It would see another seed, rate or decay.
    for other in ((4, rate, decay), (3, 0.9 * rate, decay), (3, rate, decay + 1.0)):
        assert np.abs(weights(by_hand(protocol, 2, 9, *other)[0]) - weights(expected)).max() > 1e-3


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_the_first_gradient_is_that_of_plain_autograd(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    make = TrainingSettings.make_optimizer

    def watched(self: TrainingSettings, network: ImageClassifier, size: int) -> torch.optim.Optimizer:
        optimizer = make(self, network, size)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append({name: p.grad.clone() for name, p in network.named_parameters()})  # type: ignore[union-attr,func-returns-value]
        )
        return optimizer

    monkeypatch.setattr(TrainingSettings, "make_optimizer", watched)
    fine_tune(tiny_encoder(), TRANSFORM, TRAIN, protocol=protocol, head=tiny_head(), epochs=1, batch_size=29)
    [first] = seen
    keys = batches(len(TRAIN), 29, 1, 0)[0]
    views = AugmentedImages(TRAIN, TRANSFORM, 0)
    x = torch.stack([views[key][0] for key in keys]).double()
    y = torch.from_numpy(TRAIN.labels[[index for _, index in keys]])
    h = tiny_encoder().double().train()(x)
    if protocol == "v2":
        h = tiny_head().double().train()(h, layers=1)
    # The logits are 0, so p is 1/3: the gradient of the weight is (1/3 - y)^T h / B and nothing reaches the encoder.
    residual = (1 / 3 - F.one_hot(y, 3).double()) / len(y)
    torch.testing.assert_close(first["head.linear.weight"].double(), residual.T @ h.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first["head.linear.bias"].double(), residual.sum(0), rtol=1e-4, atol=1e-6)
    assert all(not grad.any() for name, grad in first.items() if "linear" not in name)


@pytest.mark.parametrize(("layer", "num_layers"), [(1, 3), (2, 3), (3, 3), (1, 1)])
@torch.no_grad()
def test_the_classifier_reads_exactly_that_layer(layer: int, num_layers: int) -> None:
    """At a rate of nearly 0 the network is still encoder and head as given; only batch norm has seen images."""
    encoder, head = tiny_encoder(), tiny_head(num_layers)
    for module in (encoder, head):
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.momentum = 0.0
    with torch.enable_grad():
        tuned = fine_tune(
            encoder, TRANSFORM, TRAIN, head=head, from_head_layer=layer, learning_rate=1e-30, epochs=1, batch_size=30
        )
    x = torch.rand(6, 3, 12, 12)
    kept = tuned.network.head
    assert len(kept.layers) == layer
    h = encoder(x)
    for part in kept.layers:
        h = part(h)
    torch.testing.assert_close(h, head(encoder(x), layers=layer))
    torch.testing.assert_close(tuned.network(x), kept.linear(h))


def test_what_is_given_is_bitwise_what_it_was() -> None:
    encoder, head = tiny_encoder().train(), tiny_head()
    encoder.bn1.eval()
    before = encoder_fingerprint(encoder), encoder_fingerprint(head)
    modes = [module.training for module in encoder.modules()]
    state = torch.random.get_rng_state()
    tuned = fine_tune(encoder, TRANSFORM, TRAIN, protocol="v2", head=head, learning_rate=0.1, **QUICK)
    assert (encoder_fingerprint(encoder), encoder_fingerprint(head)) == before
    assert [module.training for module in encoder.modules()] == modes
    assert all(parameter.grad is None for parameter in (*encoder.parameters(), *head.parameters()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in tuned.network.modules())
    # All of it was trained, statistics included.
    ours = tuned.network.encoder.state_dict()
    assert not [key for key, value in encoder.state_dict().items() if torch.equal(value, ours[key])]
    assert not torch.equal(tuned.network.head.layers[0][0].weight, head.layers[0][0].weight)


def test_two_runs_of_a_seed_are_identical_with_workers_and_dropout_too() -> None:
    source = ColorSource([0, 1, 2] * 6, CLASSES)
    transform = ImageTransform((3, 6, 6))
    runs = [
        fine_tune(small_encoder(), transform, source, learning_rate=1.0, num_workers=workers, seed=seed, **QUICK)
        for workers, seed in ((0, 1), (2, 1), (0, 2))
    ]
    assert encoder_fingerprint(runs[0].network) == encoder_fingerprint(runs[1].network)
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


def _on_a_rank(
    rank: int, world_size: int, protocol: Any, batch_size: int
) -> tuple[np.ndarray, tuple[float, ...], list[int]]:
    tuned = fine_tune(
        tiny_encoder(),
        TRANSFORM,
        TRAIN,
        protocol=protocol,
        head=tiny_head(),
        learning_rate={"v1": 1.0, "v2": 0.02}[protocol],
        epochs=2,
        batch_size=batch_size,
    )
    unreadable: dict[int, str] = {}
    predicted, read = classify_images(tuned.network, TRANSFORM, TEST, batch_size=5, unreadable=unreadable)
    assert read.tolist() == list(range(24))
    return weights(tuned.network), tuned.losses, predicted.tolist()


@pytest.mark.parametrize(("protocol", "batch_size"), [("v1", 9), ("v2", 30)])
def test_two_ranks_arrive_where_one_does(gloo: GlooPool, protocol: str, batch_size: int) -> None:
    alone, losses, predicted = _on_a_rank(0, 1, protocol, batch_size)
    first, second = gloo(2, _on_a_rank, protocol, batch_size)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1:] == second[1:]
    assert first[1] == pytest.approx(losses, abs=1e-6)
    np.testing.assert_allclose(first[0], alone, rtol=1e-3, atol=1e-4)
    assert first[2] == predicted


def _evaluated(rank: int, world_size: int) -> tuple[tuple[float, ...], tuple[str, ...]]:
    train = DamagedSource([0, 1, 2] * 7, CLASSES, 0, {4, 5})
    test = DamagedSource([0, 1, 2] * 5, CLASSES, 1, {2})
    transform = ImageTransform((3, 6, 6))
    manifest = evaluate_finetune(PixelEncoder(6), transform, train, test, epochs=3, finetune_batch_size=8)
    return manifest.values, manifest.warnings


def test_an_evaluation_is_the_same_on_two_ranks(gloo: GlooPool) -> None:
    alone = _evaluated(0, 1)
    assert [warning.partition(" of ")[0] for warning in alone[1]] == ["2", "1", "trained for 6 steps in all, 8"]
    assert gloo(2, _evaluated) == [alone] * 2


def _refused(rank: int, world_size: int) -> str:
    with pytest.raises(InputError) as refusal:
        fine_tune(tiny_encoder(), TRANSFORM, StripeSource(2), epochs=1)
    return str(refusal.value)


def test_a_batch_smaller_than_the_ranks_is_refused_on_all(gloo: GlooPool) -> None:
    assert gloo(3, _refused) == ["batch_size: 2 images a step for 3 ranks; wanted at least one a rank"] * 3


@pytest.fixture(scope="module")
def learned() -> tuple[Any, TrainedClassifier]:
    """The manifest and the network of a training that is long enough to learn something."""
    kept: list[TrainedClassifier] = []
    manifest = evaluate_finetune(
        tiny_encoder(),
        TRANSFORM,
        StripeSource(90),
        StripeSource(60, seed=1),
        learning_rate=2.0,
        epochs=20,
        finetune_batch_size=18,
        keep=kept.append,
    )
    return manifest, kept[0]


def test_the_fine_tuned_network_beats_the_linear_score_of_the_random_one(
    learned: tuple[Any, TrainedClassifier],
) -> None:
    manifest, tuned = learned
    frozen = evaluate_linear(tiny_encoder(), TRANSFORM, StripeSource(90), StripeSource(60, seed=1), l2=1e-4)
    assert manifest.mean > frozen.mean + 0.2
    assert tuned.losses[-1] < 0.7 * tuned.losses[0]


def test_the_record_is_whole(learned: tuple[Any, TrainedClassifier]) -> None:
    manifest, tuned = learned
    assert manifest.task == "finetune"
    assert manifest.settings == {
        "protocol": "v1",
        "from_head_layer": 0,
        "optimizer": "sgd",
        "learning_rate": 2.0,
        "epochs": 20,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "peak_learning_rate": "learning_rate * batch / 256",
        "finetune_batch_size": 18,
        "schedule": "cosine",
        "augmentation": "random resized crop, flip",
        "seed": 0,
    }
    assert manifest.details == {"batch": 18, "losses": list(tuned.losses)}
    assert manifest.encoder.fingerprint == encoder_fingerprint(tiny_encoder())
    outcome = manifest.outcome
    assert METRICS["top1"](outcome.answers[0], outcome.targets) == manifest.mean
    assert outcome.indices.tolist() == list(range(60))
    with torch.no_grad():
        pictures = torch.stack([TRANSFORM(StripeSource(60, seed=1).image(i)) for i in range(60)])
        assert tuned.network(pictures).argmax(1).tolist() == outcome.answers[0].tolist()


def test_few_steps_are_told() -> None:
    assert TrainingSettings("sgd", 0.05, 60, 256).warnings(12_811) == ()  # 1% of ImageNet
    [warning] = TrainingSettings("sgd", 0.05, 30, 256).warnings(410)
    assert warning.startswith("trained for 30 steps in all, 256 of 410 images a step")
    assert TrainingSettings("sgd", 0.05, 300, 256).warnings(10) == ()


def test_draws_of_few_labels_are_trainings_of_their_own() -> None:
    manifest = evaluate_finetune(
        tiny_encoder(), TRANSFORM, TRAIN, TEST, epochs=2, labels="2-shot", protocol="v2", head=tiny_head(), seed=3
    )
    assert len(manifest.values) == len(manifest.outcome.answers) == 5  # type: ignore[union-attr]
    assert manifest.settings["seeds"] == [3, 4, 5, 6, 7]
    assert manifest.train.images == 6
    fits = manifest.details["fits"]
    assert [fit["batch"] for fit in fits] == [6] * 5
    assert len({tuple(fit["losses"]) for fit in fits}) == 5
    assert manifest.details["head_fingerprint"] == encoder_fingerprint(tiny_head())
    one = fine_tune(
        tiny_encoder(),
        TRANSFORM,
        TRAIN,
        manifest.details["chosen"][1]["ids"],
        protocol="v2",
        head=tiny_head(),
        epochs=2,
        seed=4,
    )
    assert list(one.losses) == fits[1]["losses"]


def test_classes_are_matched_by_name() -> None:
    other = StripeSource(24, seed=1, classes=("checker", "across", "along"))
    settings: dict[str, Any] = {"epochs": 3, "finetune_batch_size": 10, "learning_rate": 2.0}
    same, renamed = (evaluate_finetune(tiny_encoder(), TRANSFORM, TRAIN, test, **settings) for test in (TEST, other))
    assert same.values == renamed.values


@pytest.mark.parametrize(
    ("protocol", "share", "expected"),
    [
        ("v1", 0.01, ("sgd", 0.05, 60, 256, 0)),
        ("v1", 0.1, ("sgd", 0.05, 30, 256, 0)),
        ("v1", 1.0, ("sgd", 0.05, 30, 256, 0)),
        ("v2", 0.01, ("lars", 0.005, 60, 1024, 1)),
        ("v2", 1.0, ("lars", 0.005, 60, 1024, 1)),
    ],
)
def test_the_protocols_are_the_published_ones(protocol: Any, share: float, expected: tuple[Any, ...]) -> None:
    settings, layer = Choices(protocol, head=ProjectionHead(8)).settled(share)
    assert (settings.optimizer, settings.learning_rate, settings.epochs, settings.batch_size, layer) == expected
    assert settings.weight_decay == 0
    network = ImageClassifier(tiny_encoder(), ClassificationHead(8, CLASSES, tiny_head(), 1))
    optimizer = settings.make_optimizer(network, settings.batch_size)
    # .8 at 4096 and .16 at 1024, as published.
    assert optimizer.param_groups[0]["lr"] == pytest.approx({"v1": 0.05, "v2": 0.16}[protocol])
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["nesterov"] is (protocol == "v1")
    supervised = optimizer.param_groups[-1]
    assert {id(p) for p in supervised["params"]} == {id(p) for p in network.head.linear.parameters()}
    assert (supervised["adapt"], supervised["weight_decay"]) == (False, 0.0)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, network.parameters()))


def test_an_override_keeps_the_rule_of_its_optimizer() -> None:
    settings, layer = Choices("v1", optimizer="lars", head=ProjectionHead(8), from_head_layer=2, epochs=3).settled()
    assert (settings.optimizer, settings.learning_rate, settings.epochs, layer) == ("lars", 0.005, 3, 2)
    settings, layer = Choices("v2", from_head_layer=0, optimizer="sgd", learning_rate=0.2, batch_size=7).settled()
    assert (settings.optimizer, settings.learning_rate, settings.batch_size, layer) == ("sgd", 0.2, 7, 0)


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (TRAIN, {"protocol": "v3"}, "protocol: 'v3', wanted v1 or v2"),
        (TRAIN, {"protocol": "v2"}, "protocol: v2 starts from layer 1 of the projection head, and there is none"),
        (TRAIN, {"from_head_layer": 1}, "from_head_layer: 1, but no projection head was given"),
        (TRAIN, {"from_head_layer": 3, "head": tiny_head()}, "from_head_layer: 3, wanted at most 2"),
        (TRAIN, {"from_head_layer": -1}, "from_head_layer: -1"),
        (TRAIN, {"optimizer": "adam"}, "optimizer: 'adam', wanted sgd or lars"),
        (TRAIN, {"learning_rate": math.nan}, "learning_rate: nan"),
        (TRAIN, {"learning_rate": 0.0}, "learning_rate: 0.0"),
        (TRAIN, {"weight_decay": -1.0}, "weight_decay: -1.0"),
        (TRAIN, {"epochs": 0}, "epochs: 0"),
        (TRAIN, {"finetune_batch_size": 1}, "batch_size: 1, wanted at least 2"),
        (TRAIN, {"labels": "11-shot"}, "labels: 11-shot, but class 'across' has 10 labelled"),
        (TRAIN, {"labels": 0.01}, "labels: 0.01 of 30 images are 0, fewer than the 3 classes"),
        (ColorSource([-1] * 4, CLASSES), {}, "no image of the train part has a label"),
        (ColorSource([1] * 4, CLASSES), {}, "its training labels are all of class 'along'"),
        (ColorSource([0, 1] * 4, CLASSES), {}, "test images count as errors.*wanted the same classes in both parts"),
    ],
)
def test_bad_input_is_named_before_an_image_is_read(
    train: Any, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(type(train), "image", read)
    with pytest.raises(InputError, match=message):
        evaluate_finetune(tiny_encoder(), TRANSFORM, train, TEST, **settings)


@pytest.mark.parametrize(
    ("encoder", "transform", "message"),
    [
        (tiny_encoder(), ImageTransform((3, 6, 8)), "images of 6 x 8, but random crops are square"),
        (tiny_encoder(), ImageTransform((1, 12, 12)), "the encoder takes no images of 1 x 12 x 12"),
        (PixelEncoder(4), TRANSFORM, "pixel encoder: images are"),
        (nn.Conv2d(3, 4, 3), TRANSFORM, r"the encoder gives \(1, 4, 10, 10\) for 1 image, wanted \(1, features\)"),
        (nn.Flatten(), lambda image: image, "a function cannot crop at random"),
    ],
)
def test_an_encoder_that_does_not_fit_is_named(encoder: nn.Module, transform: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_finetune(encoder, transform, TRAIN, TEST, epochs=1)


def test_a_loss_that_is_not_finite_ends_the_training_and_says_so() -> None:
    with pytest.raises(
        InputError, match=r"learning_rate: the loss is (nan|inf) after \d+ epochs at 1e\+30; wanted a s"
    ):
        fine_tune(tiny_encoder(), TRANSFORM, TRAIN, learning_rate=1e30, epochs=3, batch_size=5)


def test_an_encoder_without_weights_is_a_baseline(real_data: Path) -> None:
    """Raw pixels of real photographs: only the linear layer learns."""
    source = open_source(str(real_data / "clothing"), split="train")
    encoder, transform = load_encoder("pixels:16")
    chosen = np.flatnonzero(source.labels >= 0)[:: max(1, len(source) // 40)]
    tuned = fine_tune(encoder, transform, source, chosen, learning_rate=0.1, epochs=8, batch_size=16)
    assert tuned.losses[-1] < tuned.losses[0]
    predicted, read = classify_images(tuned.network, transform, source, indices=chosen)
    assert len(predicted) == len(read) == len(chosen)
