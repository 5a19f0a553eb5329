"""Images of one channel and of many, from files to an evaluated encoder by the commands alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_scale.bundle import load_encoder
from simclr_scale.data.pixels import to_pixels
from simclr_scale.data.sources import open_source
from tests.cli.commands import Outcome
from tests.pretraining.runs import QUIET

Command = Callable[..., Outcome]

CONFIG = """
threads: 1
model:
  encoder:
    class_path: simclr_scale.models.create_encoder
    init_args: {{name: simclr_resnet_tiny, channels: [4, 8, 8], in_chans: {channels}}}
  warmup_epochs: 0
data: {{preset: {preset}, global_batch_size: 16, num_workers: 0, image_size: 16}}
knn: {{k: 3}}
trainer: {{accelerator: cpu, max_epochs: 1, limit_train_batches: 2, log_every_n_steps: 1}}
"""


def grey_pictures(folder: Path) -> Path:
    """Classes of 12-bit values in files of 16 bits, one of them brighter."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for index in range(15):
            values = rng.integers(100 + 1500 * number, 2000 + 1500 * number, (20, 24), dtype=np.uint16)
            Image.fromarray(values).save(folder / name / f"{index}.png")
    return folder


def arrays(folder: Path) -> Path:
    """Classes of arrays (20, 20, 5), whose spectra tell them apart."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("wet", "dry")):
        (folder / name).mkdir(parents=True)
        for index in range(15):
            values = rng.normal(0, 1, (20, 20, 5)) + np.linspace(0, 3, 5) * (2 * number - 1)
            np.save(folder / name / f"{index}.npy", values.astype(np.float32))
    return folder


def config(folder: Path, channels: int, preset: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(CONFIG.format(channels=channels, preset=preset))
    return path


CASES = {
    "grey": (grey_pictures, 1, "grey_histogram"),
    "multiband": (arrays, 5, "band_histogram"),
}


@QUIET
@pytest.mark.parametrize("preset", CASES)
def test_from_files_to_an_evaluated_encoder(
    preset: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, channels, histogram = CASES[preset]
    source = write(tmp_path / "images")
    trained = command(
        "pretrain", "--config", config(tmp_path, channels, preset), "--data.source", source, "--name", "x"
    )
    assert trained.status == 0, trained.err
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert set(summary["knn_top1"]) == {"raw_pixels", histogram, "untrained", "trained"}
    assert f"{'grey histogram' if channels == 1 else 'histogram of each band'}" in trained.out

    _, transform = load_encoder("runs/x")
    assert transform.channels == channels
    assert transform.value_range is not None
    values = np.concatenate([np.asarray(image).ravel() for image in stored(source, channels)])
    if channels == 1:
        assert transform.value_range[0] == pytest.approx(np.percentile(values, [0.1, 99.9]), rel=0.02)

    for task in ("knn", "linear"):
        options = ("--k", 3) if task == "knn" else ("--l2", 0.01)
        manifest = tmp_path / f"{task}.json"
        what = ("--encoder", "runs/x", "--data.source", source, "--data.num_workers", 0)
        assert command(task, *what, *options, "--output", manifest).status == 0
        record = json.loads(manifest.read_text())
        assert record["encoder"]["transform"] == repr(transform)
        if task == "knn":
            assert record["value"]["mean"] == pytest.approx(summary["knn_top1"]["trained"], abs=1e-4)


def stored(source: Path, channels: int) -> list[Any]:
    train = open_source(str(source), channels=channels)
    return [train.image(index) for index in range(len(train))]


@pytest.mark.parametrize("form", ["pixels:4", "histogram:3"])
def test_baselines_take_arrays_and_measure_their_range(form: str, tmp_path: Path, command: Command) -> None:
    source, manifest = arrays(tmp_path / "images"), tmp_path / "m.json"
    what = ("--encoder", form, "--data.source", source, "--data.num_workers", 0, "--k", 3)
    outcome = command("knn", *what, "--output", manifest)
    assert outcome.status == 0, outcome.err
    record = json.loads(manifest.read_text())
    assert record["value"]["mean"] == 1  # the classes are spectra
    assert "value_range=(5 bands within" in record["encoder"]["transform"]


def test_an_encoder_for_other_channels_is_refused_at_the_start(tmp_path: Path, refusal: Callable[..., str]) -> None:
    grey, five = grey_pictures(tmp_path / "grey"), arrays(tmp_path / "five")
    start = ("pretrain", "--name", "x", "--config")
    line = refusal(*start, config(tmp_path, 3, "grey"), "--data.source", grey)
    assert line == (
        "model.encoder takes images of 3 channels, and those of the data have 1: "
        "set model.encoder.init_args.in_chans to 1, or another data.preset"
    )
    line = refusal(*start, config(tmp_path, 3, "multiband"), "--data.source", five)
    assert "set model.encoder.init_args.in_chans to 5" in line
    line = refusal(*start, config(tmp_path, 5, "natural"), "--data.source", five)
    assert "the images have 5 channels" in line
    assert "data.preset multiband" in line
    line = refusal(*start, config(tmp_path, 1, "grey"), "--data.source", "textures", "--data.value_range", "[0,9]")
    assert line == "data.value_range is for arrays and 16-bit pictures; those of textures have 8 bits"
    line = refusal("knn", "--encoder", "random:simclr_resnet_tiny", "--data.source", five)
    assert line == f"--encoder random:simclr_resnet_tiny takes images of 3 channels, those of {five} have 5"


@QUIET
def test_a_given_value_range_is_that_of_training_and_bundle(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = grey_pictures(tmp_path / "images")
    what = ("--config", config(tmp_path, 1, "grey"), "--data.source", source, "--name", "x")
    assert command("pretrain", *what, "--data.value_range", "[0,4095]").status == 0
    _, transform = load_encoder("runs/x")
    assert transform.value_range == ((0.0, 4095.0),)
    image = open_source(str(source), channels=1).image(0)
    assert to_pixels(image, transform.value_range).max() > 100  # by all 16 bits it would be 8
    assert torch.isfinite(transform(image)).all()


@QUIET
@pytest.mark.parametrize(
    ("recipe", "source", "channels"),
    [
        ("chest_xray", "chest_xray", 1),
        pytest.param("hyperspectral", "patches/hyperspectral/jasperRidge2_R198.mat", 198, marks=pytest.mark.slow),
    ],
)
def test_recipes_take_their_first_steps_on_real_data(
    recipe: str, source: str, channels: int, real_data: Path, tmp_path: Path, command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = (
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=3",
        "--data.global_batch_size=32",
        "--model.warmup_epochs=0",
    )
    what = ("--config", recipe, "--data.source", source, "--data.root", real_data, "--data.num_workers=0")
    outcome = command("pretrain", *what, *options, "--knn.max_train_images=200", "--name", "x")
    assert outcome.status == 0, outcome.err
    summary = json.loads(Path("runs/x/summary.json").read_text())
    assert summary["steps"] == 3
    assert len(summary["knn_top1"]) == 4
    encoder, transform = load_encoder("runs/x")
    assert transform.channels == channels
    assert (transform.value_range is None) == (recipe == "chest_xray")
    assert encoder.num_features > 0
