"""Distillation: the loss against its formula in float64, the teacher untouched, labels unread, and learning."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    METRICS,
    TrainedClassifier,
    TrainingSettings,
    distil,
    distillation_loss,
    encoder_fingerprint,
    evaluate_distil,
    fine_tune,
)
from simclr_scale.evaluation.augmented_images import AugmentedImages
from simclr_scale.models import ClassificationHead, ImageClassifier, PixelEncoder
from tests.evaluation.stripes import CLASSES, TRANSFORM, StripeSource, tiny_encoder, tiny_head
from tests.evaluation.synthetic import ColorSource, DamagedSource
from tests.evaluation.test_finetune import batches, weights
from tests.gloo_pool import GlooPool

TRAIN, TEST = StripeSource(30), StripeSource(24, seed=1)
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 9}


class UnlabelledSource(StripeSource):
    """Whose labels may not be asked for, nor its classes."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self._count = count
        super().__init__(count, seed)

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        return str(self.seed)

    @property
    def labels(self) -> np.ndarray:
        raise AssertionError("labels were read")

    @labels.setter
    def labels(self, value: object) -> None:
        pass


def a_teacher(layer: int = 1) -> ImageClassifier:
    """With opinions."""
    classifier = ClassificationHead(8, CLASSES, tiny_head(), layer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        classifier.linear.weight.normal_(std=3)
        classifier.linear.bias.normal_()
    return ImageClassifier(tiny_encoder(), classifier).eval()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.5])
@pytest.mark.parametrize("shape", [(1, 2), (7, 3), (5, 11)])
def test_the_loss_and_its_gradient_are_those_of_the_formula(temperature: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(0, 3, shape), rng.normal(0, 3, shape)
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True) for x in (t, s))
    expected = [sum(-p[i, c] * math.log(q[i, c]) for c in range(shape[1])) * temperature**2 for i in range(shape[0])]
    student = torch.from_numpy(s).float().requires_grad_()
    loss = distillation_loss(student, torch.from_numpy(t).float(), temperature)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=2e-5, atol=1e-6)
    loss.sum().backward()
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), temperature * (q - p), rtol=1e-4, atol=1e-6)


def test_the_loss_is_finite_where_a_softmax_alone_is_not() -> None:
    student = torch.tensor([[3e4, -3e4], [0.0, 0.0]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[-3e4, 3e4], [3e4, -3e4]]), 0.5)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([6e4 * 0.5, math.log(2) * 0.25])
    assert student.grad is not None
    assert student.grad.isfinite().all()


def first_gradient(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, torch.Tensor]:
    seen: list[dict[str, torch.Tensor]] = []
    make = TrainingSettings.make_optimizer

    def watched(self: TrainingSettings, network: ImageClassifier, size: int) -> torch.optim.Optimizer:
        optimizer = make(self, network, size)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append({name: p.grad.clone() for name, p in network.named_parameters()})  # type: ignore[union-attr,func-returns-value]
        )
        return optimizer

    monkeypatch.setattr(TrainingSettings, "make_optimizer", watched)
    distil(a_teacher(), TRANSFORM, TRAIN, epochs=1, batch_size=29, **settings)
    return seen[0]


@pytest.mark.parametrize("labelled", [None, [0, 4, 7, 20]])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_a_step_is_that_of_the_paper(
    temperature: float, labelled: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha = 0.3
    chosen = None if labelled is None else np.array(labelled)
    grads = first_gradient(
        monkeypatch, temperature=temperature, labelled=chosen, alpha=alpha, student=tiny_encoder((4, 5, 6), seed=2)
    )
    keys = batches(len(TRAIN), 29, 1, 0)[0]
    views = AugmentedImages(TRAIN, TRANSFORM, 0)
    x = torch.stack([views[key][0] for key in keys]).double()
    index = [index for _, index in keys]
    t = a_teacher().double()(x).detach()
    h = tiny_encoder((4, 5, 6), seed=2).double().train()(x).detach()
    p = F.softmax(t / temperature, dim=1)
    slope = temperature * (1 / 3 - p) / len(x)  # the student's logits are 0
    if labelled is not None:
        y = F.one_hot(torch.from_numpy(TRAIN.labels[index]), 3)
        used = torch.tensor([i in labelled for i in index])[:, None]
        slope = alpha * slope + (1 - alpha) * used * (1 / 3 - y) * (30 / 4) / len(x)
    torch.testing.assert_close(grads["head.linear.weight"].double(), slope.T @ h, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads["head.linear.bias"].double(), slope.sum(0), rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_teacher_starts_with_its_classifier() -> None:
    teacher = a_teacher()
    made = distil(teacher, TRANSFORM, TRAIN, learning_rate=1e-30, epochs=1, batch_size=30)
    assert made.network is not teacher
    assert made.network.head.from_head_layer == 1
    ours, theirs = made.network.state_dict(), teacher.state_dict()
    learned = [name for name, _ in teacher.named_parameters()]
    for name in learned:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-20)


def test_the_teacher_is_bitwise_what_it_was_and_no_label_is_read() -> None:
    teacher = a_teacher().train()
    teacher.encoder.bn1.eval()
    before, modes = encoder_fingerprint(teacher), [module.training for module in teacher.modules()]
    student = tiny_encoder(seed=3)
    given = encoder_fingerprint(student)
    for learner in (None, student):
        made = distil(teacher, TRANSFORM, UnlabelledSource(30), student=learner, **QUICK)
        assert encoder_fingerprint(made.network) != before
    manifest = evaluate_distil(
        teacher, TRANSFORM, UnlabelledSource(30), TEST, epochs=1, finetune_batch_size=9, student=student
    )
    assert encoder_fingerprint(teacher) == before == manifest.encoder.fingerprint
    assert encoder_fingerprint(student) == given
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert manifest.train.classes == ()
    assert (manifest.train.images, manifest.train.unlabelled) == (30, 30)
    assert manifest.label_selection == "none: the teacher's answers"


def _on_a_rank(rank: int, world_size: int) -> tuple[np.ndarray, tuple[float, ...]]:
    made = distil(
        a_teacher(),
        TRANSFORM,
        TRAIN,
        student=tiny_encoder((4, 5, 6), seed=2),
        labelled=np.array([0, 1, 2, 9]),
        learning_rate=0.02,
        temperature=2.0,
        **QUICK,
    )
    return weights(made.network), made.losses


def test_two_ranks_arrive_where_one_does(gloo: GlooPool) -> None:
    alone, losses = _on_a_rank(0, 1)
    first, second = gloo(2, _on_a_rank)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1] == pytest.approx(losses, abs=1e-6)
    np.testing.assert_allclose(first[0], alone, rtol=1e-3, atol=1e-4)
    again, same = _on_a_rank(0, 1)
    np.testing.assert_array_equal(again, alone)
    assert same == losses


def test_a_smaller_student_learns_what_the_teacher_knows() -> None:
    teacher = fine_tune(tiny_encoder(), TRANSFORM, StripeSource(90), learning_rate=2.0, epochs=16, batch_size=18)
    kept: list[TrainedClassifier] = []
    test = StripeSource(120, seed=1)
    manifest = evaluate_distil(
        teacher.network,
        TRANSFORM,
        UnlabelledSource(90, seed=2),
        test,
        student=tiny_encoder((4, 4, 6), seed=3),
        optimizer="sgd",
        learning_rate=2.0,
        epochs=24,
        finetune_batch_size=18,
        student_spec="random:smaller",
        spec="teacher",
        keep=kept.append,
    )
    assert manifest.details["teacher_top1"] > 0.6
    assert manifest.mean > 1 / 3 + 0.2
    details = manifest.details
    assert details["student_parameters"] < details["teacher_parameters"]
    assert details["student_fingerprint"] == encoder_fingerprint(kept[0].network)
    assert details["losses"][-1] < details["losses"][0]
    assert manifest.settings["student"] == "random:smaller"
    outcome = manifest.outcome
    assert outcome is not None
    assert METRICS["top1"](outcome.answers[0], outcome.targets) == manifest.mean
    json.dumps(manifest.as_dict(), allow_nan=False)


def test_labels_beside_the_answers_are_named() -> None:
    manifest = evaluate_distil(a_teacher(), TRANSFORM, TRAIN, TEST, labels="0.2", epochs=1, seed=1, alpha=0.25)
    assert manifest.label_selection == "0.2 (class-balanced, seed 1), beside the teacher's answers"
    assert (manifest.settings["labels"], manifest.settings["alpha"]) == ("0.2", 0.25)
    [chosen] = manifest.details["chosen"]
    assert (chosen["images"], manifest.train.unlabelled) == (6, 24)


def test_images_that_cannot_be_read_are_left_out_and_named() -> None:
    train = DamagedSource([-1] * 9, CLASSES, 0, {4})
    test = DamagedSource([0, 1, 2] * 4, CLASSES, 1, {2, 3})
    teacher = ImageClassifier(PixelEncoder(8), ClassificationHead(192, CLASSES))
    manifest = evaluate_distil(teacher, ImageTransform((3, 8, 8)), train, test, epochs=1, finetune_batch_size=4)
    assert (manifest.train.images, manifest.test.images) == (8, 10)
    assert [warning.partition(" cannot")[0].partition(",")[0] for warning in manifest.warnings] == [
        "1 of 9 training images",
        "2 of 12 test images",
        "trained for 2 steps in all",
    ]
    assert manifest.outcome is not None
    assert manifest.outcome.indices.tolist() == [0, 1, *range(4, 12)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"learning_rate": math.nan}, "learning_rate: nan"),
        ({"optimizer": "adam"}, "optimizer: 'adam'"),
        ({"epochs": 0}, "epochs: 0"),
        ({"finetune_batch_size": 1}, "batch_size: 1, wanted at least 2"),
        ({"labels": "5-shot"}, "labels: 5-shot, whose scores take several draws"),
        ({"labels": "2"}, "labels: 2, a fraction lies above 0"),
        ({"student": PixelEncoder(4)}, "pixel encoder: images are"),
    ],
)
def test_bad_input_is_named_before_an_image_is_read(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(StripeSource, "image", read)
    with pytest.raises(InputError, match=message):
        evaluate_distil(a_teacher(), TRANSFORM, TRAIN, TEST, **settings)


def test_other_classes_than_the_teachers_are_named() -> None:
    test = ColorSource([0, 1, 2, 3], ("across", "along", "checker", "dots"))
    with pytest.raises(InputError, match="class 'dots' is none of the teacher's 3"):
        evaluate_distil(a_teacher(), TRANSFORM, TRAIN, test)
    with pytest.raises(InputError, match="class 'dots' is none of the teacher's 3"):
        evaluate_distil(a_teacher(), TRANSFORM, test, TEST, labels=1.0)
    with pytest.raises(InputError, match="no image of the test part has a label"):
        evaluate_distil(a_teacher(), TRANSFORM, TRAIN, ColorSource([-1] * 3, ()))
    with pytest.raises(InputError, match="no image of the train part has a label"):
        evaluate_distil(a_teacher(), TRANSFORM, ColorSource([-1] * 3, ()), TEST, labels=1.0)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(InputError, match=r"learning_rate: the loss is (nan|inf) after"):
        distil(a_teacher(), TRANSFORM, TRAIN, student=nn.Flatten(), learning_rate=1e38, epochs=3, batch_size=5)
