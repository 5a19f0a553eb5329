"""The whole health report: from an encoder and images to the record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from simclr_scale import SimCLRDataModule
from simclr_scale.bundle import ImageTransform
from simclr_scale.data.augmentation import resolve
from simclr_scale.data.sources.joined import JoinedSource
from simclr_scale.errors import InputError
from simclr_scale.evaluation import alignment, evaluate_health, extract_features, image_loader, rankme, uniformity
from simclr_scale.evaluation.health import alpha_req
from tests.cli.commands import write_images
from tests.evaluation.synthetic import ColorSource, DamagedSource, small_encoder

CLASSES = ("a", "b", "c")
SOURCE = ColorSource([0, 1, -1] * 9, CLASSES)
TRANSFORM = ImageTransform((3, 8, 8), crop_pct=1.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
SMALL = resolve("small", {})


class Still(nn.Module):
    """Features that no view changes."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_ones(len(images), 4) * torch.arange(1, 5)


def test_it_is_the_functions_put_together(tmp_path: Path) -> None:
    encoder = small_encoder()
    report = evaluate_health(encoder, TRANSFORM, SOURCE, SMALL, batch_size=5, spec="small")
    features, _, _ = extract_features(encoder, image_loader(SOURCE, TRANSFORM))
    assert report.values["rankme"] == pytest.approx(rankme(features), rel=1e-6)
    assert report.values["rankme_centered"] == pytest.approx(rankme(features, centered=True), rel=1e-6)
    assert report.values["alpha_req"] == pytest.approx(alpha_req(features), rel=1e-4)
    assert report.values["uniformity"] == pytest.approx(uniformity(features), rel=1e-5)
    assert encoder.training
    record = json.loads(report.write(tmp_path / "health.json").read_text())
    assert record["task"] == "health"
    assert record["values"] == dict(report.values)
    assert (record["images"]["images"], record["encoder"]["spec"]) == (27, "small")
    assert record["settings"]["augmentation"]["strength"] == 0.5
    with pytest.raises(InputError, match="exists already"):
        report.write(tmp_path / "health.json")


def test_the_views_are_those_of_the_data_module(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=12, size=20)
    data = SimCLRDataModule(str(folder), global_batch_size=12, image_size=16, num_workers=0, preset="small", seed=5)
    source = data.open_training_images()
    transform = ImageTransform((3, 16, 16), crop_pct=1.0, mean=TRANSFORM.config["mean"], std=TRANSFORM.config["std"])
    report = evaluate_health(small_encoder(), transform, source, SMALL, batch_size=6, seed=5)
    data.setup()
    [batch] = data.train_dataloader()
    inputs = data.on_after_batch_transfer(batch, 0)["inputs"]
    mean, std = (torch.tensor(transform.config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        first, second = small_encoder().eval()((inputs - mean) / std).chunk(2)
    assert report.values["alignment"] == pytest.approx(alignment(first, second), rel=1e-4)
    other = evaluate_health(small_encoder(), transform, source, SMALL, batch_size=6, seed=6)
    assert other.values["alignment"] != report.values["alignment"]


def test_views_that_no_encoder_tells_apart() -> None:
    report = evaluate_health(Still(), TRANSFORM, SOURCE, SMALL)
    assert report.values["alignment"] == 0
    assert report.values["rankme"] == pytest.approx(1)
    assert report.values["uniformity"] == pytest.approx(0, abs=1e-12)
    assert report.values["alpha_req"] is None
    assert report.values["constant_features"] == 4
    assert report.warnings[0].startswith("complete collapse")
    assert any(warning.startswith("no alpha_req") for warning in report.warnings)


def test_neither_batches_nor_workers_change_it() -> None:
    reports = [
        evaluate_health(small_encoder(), TRANSFORM, SOURCE, SMALL, batch_size=size, num_workers=workers)
        for size, workers in ((4, 0), (4, 1), (100, 0), (1, 0))
    ]
    assert reports[0].values == reports[1].values
    for report in reports[2:]:
        assert report.values == pytest.approx(dict(reports[0].values), rel=1e-4)


def test_images_that_cannot_be_read_are_left_out_and_named() -> None:
    damaged = DamagedSource(SOURCE.labels.tolist(), CLASSES, 0, (3, 20))
    report = evaluate_health(small_encoder(), TRANSFORM, damaged, SMALL, batch_size=4)
    assert report.images.images == 25
    assert len(report.images.unreadable) == 2
    assert report.warnings[-1].startswith("2 of 27 images cannot be read and are left out; the first: image 3")
    features, _, _ = extract_features(small_encoder(), image_loader(damaged, TRANSFORM), unreadable={})
    assert report.values["uniformity"] == pytest.approx(uniformity(features), rel=1e-5)


def test_the_encoder_is_left_as_it_was() -> None:
    encoder = small_encoder()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    evaluate_health(encoder, TRANSFORM, SOURCE, SMALL)
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_what_makes_no_sense_is_refused_before_work_starts() -> None:
    with pytest.raises(InputError, match="8 x 9 pixels, and views are square"):
        evaluate_health(small_encoder(), ImageTransform((3, 8, 9)), SOURCE, SMALL)
    with pytest.raises(InputError, match=r"augmentation\.channel_drop|hue"):
        evaluate_health(small_encoder(), ImageTransform((1, 8, 8)), SOURCE, SMALL)
    with pytest.raises(InputError, match="1 image can be read"):
        evaluate_health(small_encoder(), TRANSFORM, ColorSource([0], CLASSES), SMALL)


def test_parts_joined_are_one_source() -> None:
    parts = [ColorSource([0, 1], CLASSES, seed=1), ColorSource([2, 0, 1], CLASSES, seed=2)]
    joined = JoinedSource(parts)
    assert len(joined) == 5
    assert joined.labels.tolist() == [0, 1, 2, 0, 1]
    for index, (part, place) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]):
        assert np.array_equal(np.asarray(joined.image(index)), np.asarray(parts[part].image(place)))
        assert joined.describe(index) == parts[part].describe(place)
    assert joined.fingerprint() != JoinedSource(parts[::-1]).fingerprint()
    assert joined.split_description == "seed 1 and seed 2"
    with pytest.raises(InputError, match="differ in classes"):
        JoinedSource([parts[0], ColorSource([0], ("x",))])
    with pytest.raises(InputError, match="no parts"):
        JoinedSource([])
