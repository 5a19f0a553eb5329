"""The kNN score of a run: the same on any number of ranks, on labelled images alone, and beside its baselines."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from simclr_scale.bundle import ImageTransform, load_encoder
from simclr_scale.data.sources import open_source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import extract_features, image_loader
from simclr_scale.evaluation.knn import knn_classify
from simclr_scale.models import create_encoder
from simclr_scale.pretraining.knn_monitor import KNNMonitor, labelled_images
from tests.pretraining.runs import QUIET, arguments, differences, pretrain

TRANSFORM = ImageTransform((3, 16, 16), crop_pct=1.0)


def seen_by_the_monitor(images: Path, *, unknown: slice = slice(None, None, 7)) -> Any:
    """A trainer on these images, as far as the monitor looks at it; some labels are unknown."""
    data = SimpleNamespace(worker_count=lambda: 0, unreadable={}, unreadable_held_out={})
    for split in ("train", "test"):
        source = open_source(str(images), split=split)
        source.labels = source.labels.copy()
        source.labels[unknown] = -1
        setattr(data, f"{split}_source", source)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(datamodule=data, strategy=strategy, callbacks=[])


def encoder() -> Any:
    torch.manual_seed(0)
    return create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))


def score(rank: int, world_size: int, images: Path, max_train_images: int | None = None) -> float:
    monitor = KNNMonitor(k=5, batch_size=10, max_train_images=max_train_images)
    return monitor.top1(seen_by_the_monitor(images), encoder(), TRANSFORM)


def test_is_knn_on_the_labelled_images(images: Path) -> None:
    data = seen_by_the_monitor(images).datamodule
    features = []
    for source in (data.train_source, data.test_source):
        every, labels, _ = extract_features(encoder(), image_loader(source, TRANSFORM))
        features.append((every[labels >= 0], labels[labels >= 0]))
    (train, train_labels), (test, test_labels) = features
    assert (len(train), len(test)) == (36, 15)
    expected = (knn_classify(train, train_labels, test, 5) == test_labels).float().mean().item()
    assert score(0, 1, images) == pytest.approx(expected)
    assert 1 / 3 < expected < 1


def test_ranks_find_the_same(gloo, images: Path) -> None:
    scores = {limit: score(0, 1, images, limit) for limit in (None, 9)}
    assert scores[None] != scores[9]
    for limit, alone in scores.items():
        assert gloo(2, score, images, limit) == [alone, alone]


def test_a_part_is_evenly_spaced() -> None:
    source: Any = SimpleNamespace(labels=np.array([0, -1, 1, 2, -1, 0, 1, 2]))
    assert labelled_images(source) == labelled_images(source, 6) == [0, 2, 3, 5, 6, 7]
    assert labelled_images(source, 3) == [0, 3, 7]
    assert labelled_images(source, 1) == [0]


def test_leaves_the_encoder_as_it_was(images: Path) -> None:
    model = encoder().train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    KNNMonitor(k=5).top1(seen_by_the_monitor(images), model, TRANSFORM)
    assert (model.training, model.bn1.training, model.layer1[0].bn1.training) == (True, False, True)
    assert differences(before, dict(model.state_dict())) == []


@QUIET
def test_a_run_measures_each_epoch_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    top1 = KNNMonitor.top1

    def counted(self: KNNMonitor, trainer: Any, encoder: Any, transform: Any) -> float:
        measured.append(f"{type(encoder).__name__} {trainer.global_step}")
        return top1(self, trainer, encoder, transform)

    monkeypatch.setattr(KNNMonitor, "top1", counted)
    options = ("--trainer.max_epochs", "3", "--knn.every_n_epochs", "2")
    pretrain(arguments(images, tmp_path, "run", *options))
    ours = [f"SimCLRResNet {step}" for step in (0, 10, 15)]
    assert measured == [*ours, "PixelEncoder 15", "ColorHistogramEncoder 15"]


@QUIET
def test_the_trained_score_is_that_of_the_encoder_that_is_saved(images: Path, tmp_path: Path) -> None:
    """Also where training ended in the middle of an epoch, after the last measurement."""
    options = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "12", "--knn.every_n_epochs", "2")
    pretrain(arguments(images, tmp_path, "run", *options))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn"] == {
        "k": 5, "temperature": 0.07, "train_images": 42, "test_images": 18, "test_split": summary["knn"]["test_split"],
    }  # fmt: skip
    again = KNNMonitor(k=5).top1(seen_by_the_monitor(images, unknown=slice(0)), *load_encoder(tmp_path / "run"))
    assert summary["knn_top1"]["trained"] == pytest.approx(again, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "knn.every_n_epochs must be at least 1"),
        ({"k": 0}, "knn.k must be at least 1"),
        ({"batch_size": 0}, "knn.batch_size must be at least 1"),
        ({"max_train_images": 0}, "knn.max_train_images must be at least 1"),
        ({"temperature": 0.0}, "knn.temperature must be above 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KNNMonitor(**options)
