"""Transfer over suites: the paper's twelve in small, and local folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from simclr_scale.bundle import ImageTransform, load_encoder
from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.base import targets_of
from simclr_scale.errors import InputError
from simclr_scale.evaluation import (
    METRICS,
    Suite,
    SuiteEntry,
    TransferReport,
    TransferResult,
    encoder_fingerprint,
    evaluate_transfer,
    extract_features,
    image_loader,
    linear_probe,
    load_suite,
    multilabel_probe,
    top1,
)
from simclr_scale.evaluation import transfer as transfer_module
from simclr_scale.evaluation.transfer import ONE_SHOT_STRENGTH
from tests.cli.commands import write_images
from tests.data.sources import miniatures
from tests.data.sources.miniatures import write_twelve
from tests.gloo_pool import GlooPool

# One strong and one weak strength: 45 are for test_linear.
FEW = {"l2_values": (1e-4, 1.0), "num_workers": 0}


def suite_of(*entries: SuiteEntry) -> Suite:
    return Suite("ours", entries)


def one(results: tuple[TransferResult, ...]) -> Any:
    [result] = results
    assert result.manifest is not None
    return result.manifest


@pytest.fixture
def twelve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniatures, CIFAR's with md5 sums of their own."""
    write_twelve(tmp_path)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    return tmp_path


# Images by part, as the miniatures have them; the training images of a set with a validation split include it.
PARTS = {
    "Food-101": (18, 9, "top1"),
    "CIFAR-10": (50, 30, "top1"),
    "CIFAR-100": (300, 300, "top1"),
    "Birdsnap": (14, 8, "top1"),
    "SUN397": (12, 12, "top1"),
    "Stanford Cars": (15, 6, "top1"),
    "FGVC Aircraft": (12 + 9, 9, "mean_per_class"),
    "VOC2007": (44, 30, "voc2007_map"),
    "DTD": (12 + 12, 12, "top1"),
    "Oxford-IIIT Pets": (15, 9, "mean_per_class"),
    "Caltech-101": (90, 7, "mean_per_class"),
    "Oxford 102 Flowers": (9 + 9, 12, "mean_per_class"),
}
OWN_VALIDATION = {"FGVC Aircraft": 9, "VOC2007": 20, "DTD": 12, "Oxford 102 Flowers": 9}


def test_the_twelve_each_with_its_split_its_labels_and_its_metric(twelve: Path) -> None:
    encoder, transform = load_encoder("pixels:4")
    results = evaluate_transfer(encoder, transform, "twelve", root=twelve, **FEW)
    assert [result.entry.name for result in results] == list(PARTS)
    for result in results:
        manifest, (train, test, metric) = result.manifest, PARTS[result.entry.name]
        assert manifest is not None, result.skipped
        assert (manifest.train.images, manifest.test.images, manifest.metric) == (train, test, metric)
        # The classes are colours; a hundred of them are near one another, and VOC's images have several.
        least = {"CIFAR-100": 0.95, "VOC2007": 0.5}.get(result.entry.name, 1)
        assert manifest.values[0] >= least, result.entry.name
        own = OWN_VALIDATION.get(result.entry.name)
        assert manifest.settings["l2_chosen_on"] == (
            f"its own validation split, {own} images" if own else "a drawn share of 0.2"
        )
        outcome = manifest.outcome
        assert outcome is not None
        assert manifest.values == (METRICS[metric](outcome.answers[0], outcome.targets),)


def features_of(source: Any, transform: ImageTransform, spec: str = "pixels:4") -> torch.Tensor:
    return extract_features(load_encoder(spec)[0], image_loader(source, transform))[0]


def test_of_several_labels_it_is_the_functions_put_together(tmp_path: Path) -> None:
    """Chosen on the validation split, fitted to both, scored on the test; the mean over the classes that it has."""
    miniatures.voc2007(tmp_path)
    encoder, transform = load_encoder("pixels:4")
    entry = SuiteEntry("VOC", "archive/voc2007", "voc2007_map")
    manifest = one(evaluate_transfer(encoder, transform, suite_of(entry), root=tmp_path, **FEW))
    parts = [open_source("archive/voc2007", root=tmp_path, split=s) for s in ("train", "val", "test")]  # type: ignore[arg-type]
    crop = ImageTransform(**{**transform.config, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"})
    train, val, test = (features_of(part, crop) for part in parts)
    targets = np.concatenate([targets_of(parts[0]), targets_of(parts[1])])  # type: ignore[list-item]
    rows = np.arange(len(train), len(train) + len(val))
    probe = multilabel_probe(torch.cat([train, val]), targets, validation_rows=rows, l2_values=(1e-4, 1.0))
    assert manifest.values == (METRICS["voc2007_map"](probe.logits(test), targets_of(parts[2])),)
    assert manifest.details["l2"] == probe.l2
    assert manifest.train.classes[0] == "aeroplane"
    assert manifest.train.unlabelled == 0


def test_with_folders_of_splits_it_is_the_functions_put_together(tmp_path: Path) -> None:
    for part, count in (("train", 9), ("val", 4), ("test", 6)):
        write_images(tmp_path / "set" / part, "red", "green", "blue", count=count)
    encoder, transform = load_encoder("histogram:2")
    entry = SuiteEntry("Colours", "set", "mean_auc")
    before = encoder_fingerprint(encoder)
    manifest = one(evaluate_transfer(encoder, transform, suite_of(entry), root=tmp_path, **FEW))
    assert encoder_fingerprint(encoder) == before
    train, val, test = (open_source(str(tmp_path / "set"), split=s) for s in ("train", "val", "test"))  # type: ignore[arg-type]
    crop = ImageTransform(**{**transform.config, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"})
    x = torch.cat([features_of(part, crop, "histogram:2") for part in (train, val)])
    y = np.concatenate([train.labels, val.labels])
    rows = np.arange(len(train), len(x))
    probe = linear_probe(x, y, metric="mean_auc", validation_rows=rows, l2_values=(1e-4, 1.0))
    answers = probe.answers(features_of(test, crop, "histogram:2"), "mean_auc", 3)
    assert manifest.values == (METRICS["mean_auc"](answers, test.labels),)
    assert manifest.settings["l2_chosen_on"] == "its own validation split, 12 images"
    assert "crop_pct=1.0" in manifest.encoder.transform


def test_splits_of_unusual_names(tmp_path: Path) -> None:
    for part, count in (("a", 8), ("b", 5), ("c", 3)):
        write_images(tmp_path / "set" / part, "red", "green", count=count)
    entry = SuiteEntry("Colours", "set", "top1", splits={"train": "a", "val": "b", "test": "c"})
    manifest = one(evaluate_transfer(*load_encoder("pixels:4"), suite_of(entry), root=tmp_path, **FEW))
    assert (manifest.train.images, manifest.test.images) == (26, 6)
    assert manifest.settings["l2_chosen_on"] == "its own validation split, 10 images"


@pytest.mark.parametrize("labels", ["1-shot", "3-shot"])
def test_k_shot_has_five_draws_with_mean_and_spread(labels: str, tmp_path: Path) -> None:
    write_images(tmp_path / "set", "red", "green", "blue", count=20, size=8)
    entry = SuiteEntry("Colours", "set", "mean_per_class", root="below")
    (tmp_path / "below").mkdir()
    (tmp_path / "set").rename(tmp_path / "below" / "set")
    encoder, transform = load_encoder("pixels:2")
    results = evaluate_transfer(encoder, transform, suite_of(entry), root=tmp_path, labels=(labels, 1.0), **FEW)
    few, full = (result.manifest for result in results)
    assert few is not None
    assert full is not None
    assert [result.labels for result in results] == [labels, "1"]
    assert len(few.values) == 5
    assert few.std is not None
    assert full.std is None
    shots = int(labels[0])
    assert few.train.images == 3 * shots
    assert len({tuple(draw["ids"]) for draw in few.details["chosen"]}) == 5
    train = open_source(str(tmp_path / "below" / "set"))
    crop = ImageTransform(**{**transform.config, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"})
    draw = [[i for i in range(len(train)) if train.file_name(i) in d["ids"]] for d in few.details["chosen"]][2]  # type: ignore[attr-defined]
    x, y = features_of(train, crop, "pixels:2")[draw], train.labels[draw]
    variance = float(((x - x.mean(dim=0)) ** 2).sum(dim=1).mean())
    if shots == 1:
        assert few.settings["l2_chosen_on"] == "nothing, 0.01 of the features' variance"
        assert few.details["fits"][2]["l2"] == pytest.approx(ONE_SHOT_STRENGTH * variance, rel=1e-4)
        assert few.details["fits"][2]["validation"] == []
    else:
        assert few.details["fits"][2]["l2"] == linear_probe(x, y, seed=2, l2_values=(1e-4, 1.0)).l2


def test_of_few_labels_those_of_the_validation_split_are_no_part(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, "red", "green", count=6)
    entry = SuiteEntry("Colours", ".", "top1")
    results = evaluate_transfer(
        *load_encoder("pixels:4"), suite_of(entry), root=tmp_path, labels=("2-shot", 0.5), seeds=6, **FEW
    )
    for result, images in zip(results, (4, 6), strict=True):
        assert result.manifest is not None
        assert len(result.manifest.values) == 6
        assert result.manifest.train.images == images
        assert result.manifest.settings["l2_chosen_on"] == "a drawn share of 0.2"
        for draw in result.manifest.details["chosen"]:
            assert all(name.startswith("train/") for name in draw["ids"])


def test_several_labels_an_image_have_no_shots_and_that_is_said(tmp_path: Path) -> None:
    miniatures.voc2007(tmp_path)
    entry = SuiteEntry("VOC", "archive/voc2007", "mean_auc")
    shot, full = evaluate_transfer(
        *load_encoder("pixels:4"), suite_of(entry), root=tmp_path, labels=("5-shot", 1.0), **FEW
    )
    assert shot.manifest is None
    assert "drawn class by class, and its images have several classes each" in shot.skipped
    assert full.manifest is not None
    assert full.manifest.metric == "mean_auc"


def test_shots_of_a_set_with_a_test_split_leave_the_test_alone(tmp_path: Path) -> None:
    for part, count in (("train", 9), ("test", 4)):
        write_images(tmp_path / part, "red", "green", count=count)
    entry = SuiteEntry("Colours", ".", "top1", shots=5)
    manifest = one(evaluate_transfer(*load_encoder("pixels:4"), suite_of(entry), root=tmp_path, **FEW))
    assert (manifest.train.images, manifest.test.images) == (10, 8)
    assert manifest.train.split.startswith("5 images of every class (seed 0)")


def test_sets_that_are_not_there_are_named_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    miniatures.dtd(tmp_path)
    results = evaluate_transfer(*load_encoder("pixels:4"), "twelve", root=tmp_path, **FEW)
    there = [result.entry.name for result in results if result.manifest is not None]
    assert there == ["DTD"]
    assert all(
        result.skipped.startswith("not on disk: ") and str(tmp_path) in result.skipped
        for result in results
        if result.manifest is None
    )
    report = TransferReport(load_suite("twelve"), results)
    report.print_table()
    printed = " ".join(capsys.readouterr().out.split())
    for result in results:
        assert (f"skipped {result.entry.name}, labels 1: not on disk" in printed) == (result.manifest is None)
    record = json.loads(report.write(tmp_path / "t.json").read_text())
    assert [row["set"] for row in record["results"]] == list(PARTS)
    assert sum(row["manifest"] is None and row["skipped"].startswith("not on disk") for row in record["results"]) == 11
    [dtd] = [row for row in record["results"] if row["set"] == "DTD"]
    assert (dtd["published_percent"], dtd["manifest"]["metric"], dtd["labels"]) == (74.5, "top1", "1")


class Killed(Exception):
    pass


def test_a_call_that_was_killed_goes_on_after_the_last_fit_with_the_same_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "set", "red", "green", "blue", count=12, size=8)
    suite = suite_of(SuiteEntry("A", "set", "top1"), SuiteEntry("B", "set", "mean_auc"))
    call: dict[str, Any] = {"root": tmp_path, "labels": ("2-shot", 1.0), **FEW}
    encoder, transform = load_encoder("pixels:2")
    whole = [r.manifest.as_dict() for r in evaluate_transfer(encoder, transform, suite, **call) if r.manifest]
    fits: list[int] = []

    def counted(*arguments: Any, **settings: Any) -> Any:
        fits.append(1)
        if len(fits) == 8:
            raise Killed
        return linear_probe(*arguments, **settings)

    monkeypatch.setattr(transfer_module, "linear_probe", counted)
    with pytest.raises(Killed):
        evaluate_transfer(encoder, transform, suite, cache=tmp_path / "cache", **call)
    resumed = evaluate_transfer(encoder, transform, suite, cache=tmp_path / "cache", **call)
    assert len(fits) == 8 + 12 - 7  # seven of the twelve were kept
    for before, result in zip(whole, resumed, strict=True):
        assert result.manifest is not None
        assert {**result.manifest.as_dict(), "created": 0} == {**before, "created": 0}
        assert result.manifest.outcome is not None
    kept = sorted((tmp_path / "cache" / "fits").iterdir())
    kept[0].write_bytes(b"damaged")
    again = evaluate_transfer(encoder, transform, suite, cache=tmp_path / "cache", **call)
    assert len(fits) == 14
    assert [r.manifest.values for r in again if r.manifest] == [r.manifest.values for r in resumed if r.manifest]
    evaluate_transfer(encoder, transform, suite, cache=tmp_path / "cache", **{**call, "l2_values": (1e-3, 1.0)})
    assert len(fits) == 14 + 12  # other settings are other fits


def test_classes_without_test_images_are_left_out_of_the_mean_and_named(tmp_path: Path) -> None:
    miniatures.voc2007(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main"
    for name in ("cat", "sofa"):
        lines = (base / f"{name}_test.txt").read_text().replace("  1", " -1")
        (base / f"{name}_test.txt").write_text(lines)
    entry = SuiteEntry("VOC", "archive/voc2007", "voc2007_map")
    manifest = one(evaluate_transfer(*load_encoder("pixels:4"), suite_of(entry), root=tmp_path, **FEW))
    assert manifest.warnings[-1] == "the mean is over 18 of 20 classes: there are no test images of cat, sofa"


def test_top1_is_that_of_the_linear_probe(tmp_path: Path) -> None:
    write_images(tmp_path / "set", "red", "green", "blue", count=10, size=8)
    encoder, transform = load_encoder("random:simclr_resnet18")
    transform = ImageTransform(**{**transform.config, "input_size": (3, 32, 32)})
    manifest = one(
        evaluate_transfer(encoder, transform, suite_of(SuiteEntry("C", "set", "top1")), root=tmp_path, **FEW)
    )
    train, test = (open_source(str(tmp_path / "set"), split=s) for s in ("train", "test"))  # type: ignore[arg-type]
    crop = ImageTransform(**{**transform.config, "crop_pct": 1.0})
    x, z = (extract_features(encoder, image_loader(part, crop))[0] for part in (train, test))
    assert manifest.values == (top1(linear_probe(x, train.labels, l2_values=(1e-4, 1.0)).predict(z), test.labels),)


def _values(rank: int, world_size: int, root: str, cache: str | None) -> list[tuple[float, ...]]:
    suite = suite_of(SuiteEntry("A", "set", "top1"), SuiteEntry("B", "set", "mean_auc"))
    call: dict[str, Any] = {"root": root, "labels": ("2-shot", 1.0), "batch_size": 5, "cache": cache, **FEW}
    return [r.manifest.values for r in evaluate_transfer(*load_encoder("pixels:2"), suite, **call) if r.manifest]


@pytest.mark.parametrize("cached", [False, True])
def test_two_ranks_give_the_digits_of_one(cached: bool, gloo: GlooPool, tmp_path: Path) -> None:
    write_images(tmp_path / "set", "red", "green", "blue", count=12, size=8)
    alone = _values(0, 1, str(tmp_path), None)
    assert len(alone) == 4
    assert gloo(2, _values, str(tmp_path), str(tmp_path / "cache") if cached else None) == [alone, alone]


@pytest.mark.slow
def test_real_sets_of_folders_by_the_shipped_example(real_data: Path) -> None:
    """Chest X-rays without splits, clothing with train/ and test/: more labels are better, and beat chance."""
    results = evaluate_transfer(
        *load_encoder("pixels:8"), "local_example", root=real_data, labels=("1-shot", "10-shot"), l2_values=(1e-3, 0.1)
    )
    means = {(r.entry.name, r.labels): r.manifest.mean for r in results if r.manifest}
    assert len(means) == 4
    for name, chance in (("Chest X-rays", 0.5), ("Clothing", 0.1)):
        assert chance < means[name, "1-shot"] < means[name, "10-shot"]


def mistake(entries: list[SuiteEntry], root: Path, **settings: Any) -> str:
    def never(*_: Any) -> None:
        raise AssertionError("an image was read")

    encoder, transform = load_encoder("pixels:4")
    encoder.register_forward_pre_hook(never)
    with pytest.raises(InputError) as caught:
        evaluate_transfer(encoder, transform, suite_of(*entries), root=root, **settings)
    return str(caught.value)


def test_mistakes_are_named_before_any_image_is_read(tmp_path: Path) -> None:
    write_images(tmp_path / "good", "red", "green", count=6)
    write_images(tmp_path / "one" / "train", "red", count=6)
    write_images(tmp_path / "one" / "test", "red", "green", count=6)
    miniatures.voc2007(tmp_path)
    good = SuiteEntry("Good", "good", "top1")
    assert "One: " in mistake([good, SuiteEntry("One", "one", "top1")], tmp_path)
    assert "at least two classes" in mistake([good, SuiteEntry("One", "one", "top1")], tmp_path)
    assert "Good: good: labels: 9-shot, but class" in mistake([good], tmp_path, labels=("9-shot",))
    voc = SuiteEntry("VOC", "archive/voc2007", "top1")
    assert "VOC: metric: top1 takes one label an image, and these have several" in mistake([good, voc], tmp_path)
    many = SuiteEntry("Many", "good", "top1", shots=7)
    assert "Many: labels: 7-shot, but class 'green' has 6" in mistake([many], tmp_path)
    assert "seeds: 3, wanted at least 5 of 2-shot" in mistake([good], tmp_path, labels=("2-shot",), seeds=3)
    assert "labels: half" not in mistake([good], tmp_path, labels=("2",))
    assert "did you mean archive/dtd" in mistake([SuiteEntry("D", "archive/dtt", "top1")], tmp_path)
    nothing = mistake([SuiteEntry("A", "nowhere", "top1"), SuiteEntry("B", "archive/dtd", "top1")], tmp_path)
    assert nothing.startswith("ours: none of its 2 sets can be evaluated; not on disk: nowhere")
    assert "no split 'x' (test_split)" in mistake([SuiteEntry("S", "one", "top1", splits={"test": "x"})], tmp_path)
    list_file = tmp_path / "list.txt"
    list_file.write_text("0\n")
    assert "lists images of one set" in mistake([good], tmp_path, labels=(str(list_file),))
    assert "none given" in mistake([good], tmp_path, labels=())
