"""What a run leaves behind."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from simclr_scale.bundle import load_encoder
from tests.cli.commands import SHORT, Outcome, TrainedRun, train, write_images

NAMES = ("raw_pixels", "color_histogram", "untrained", "trained")


def test_the_files_of_a_run(trained: TrainedRun) -> None:
    files = {str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "checkpoints/step=3.ckpt",
        "checkpoints/step=3.ckpt.sha256",
        "checkpoints/step=6.ckpt",
        "checkpoints/step=6.ckpt.sha256",
        "checkpoints/last.ckpt",
        "encoder/README.md",
        "encoder/config.json",
        "encoder/model.safetensors",
        "encoder/projection_head.safetensors",
    }


def test_checkpoints_have_the_checksum_beside_them_and_the_newest_is_the_last(trained: TrainedRun) -> None:
    folder = trained.folder / "checkpoints"
    for path in folder.glob("step=*.ckpt"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (folder / f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    assert (folder / "last.ckpt").read_bytes() == (folder / "step=6.ckpt").read_bytes()


def test_the_metrics_of_every_step(trained: TrainedRun) -> None:
    with open(trained.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert all(float(row["loss"]) > 0 for row in rows)
    assert float(rows[-1]["knn_top1"]) > 0
    # The warm-up of one epoch begins at 0 and ends at the peak, .04 * 16 / 256 in proportion to the batch.
    rate = yaml.safe_load((trained.folder / "config.yaml").read_text())["model"]["learning_rate"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] == 0
    assert max(rates) == rates[3] == pytest.approx(rate * 16 / 256)


def test_the_summary(trained: TrainedRun) -> None:
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert tuple(summary["knn_top1"]) == NAMES
    assert all(0 < value < 1 for value in summary["knn_top1"].values())
    facts = {"source": "textures", "epochs": 2, "steps": 6, "global_batch_size": 16, "devices": 1, "seed": 0}
    assert summary.items() >= facts.items()


def test_the_summary_is_printed_with_the_next_commands(trained: TrainedRun) -> None:
    scores = json.loads((trained.folder / "summary.json").read_text())["knn_top1"]
    for label, name in zip(("raw pixels", "colour histogram", "untrained", "trained"), NAMES, strict=True):
        assert any(label in line and f"{scores[name]:.1%}" in line for line in trained.printed.splitlines())
    assert str(trained.folder / "encoder") in trained.printed
    assert f"  simclr-scale knn --encoder {trained.folder} --data.source textures\n" in trained.printed


def test_the_encoder_is_that_of_the_last_checkpoint(trained: TrainedRun) -> None:
    x = torch.rand(2, 3, 32, 32)
    encoder, transform = load_encoder(trained.folder)
    from_checkpoint, transform_of_checkpoint = load_encoder(trained.folder / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(encoder(x), from_checkpoint(x))
    assert transform == transform_of_checkpoint
    facts = json.loads((trained.folder / "encoder" / "config.json").read_text())["simclr_scale"]["facts"]
    assert facts == json.loads((trained.folder / "summary.json").read_text())


def test_the_saved_configuration_holds_what_was_typed_and_every_default(trained: TrainedRun) -> None:
    saved = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert saved["data"]["global_batch_size"] == 16
    assert saved["trainer"].items() >= {"max_epochs": 2, "limit_train_batches": 3, "gradient_clip_val": None}.items()
    assert saved["model"].items() >= {"lr_scaling": "linear", "chunk_size": None}.items()
    assert not {"lr", "weight_decay"} & set(saved["model"]["optimizer"]["init_args"])
    assert not {"config", "name", "runs_dir", "resume", "override"} & set(saved)


def _metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, to the last digit, but for the one column that is a matter of time."""
    with open(run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "data_wait"} for row in csv.DictReader(file)]


def test_the_saved_configuration_runs_again_and_gives_the_same(run: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("pretrain", "--config", run / "config.yaml", "--name", "again")
    assert (outcome.status, outcome.err) == (0, "")
    again = run.with_name("again")
    assert (again / "config.yaml").read_text() == (run / "config.yaml").read_text()
    assert _metrics(again) == _metrics(run)
    weights = "encoder/model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()


def test_the_optimizer_has_the_rate_and_the_decay_of_the_model(tmp_path: Path) -> None:
    options = ("--model.optimizer=LARS", "--model.optimizer.trust_coefficient=0.01", "--model.weight_decay=0.5")
    run = train(tmp_path, *options, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}
    assert {group["trust_coefficient"] for group in groups} == {0.01}
    assert len({group["lr"] for group in groups}) == 1


def test_a_folder_without_labels_has_no_score(
    tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "flat", count=40)
    outcome = command(*SHORT, "--trainer.max_epochs", 1, "--data.source", "flat", "--name", "flat")
    assert (outcome.status, outcome.err) == (0, "")
    assert "knn_top1" not in json.loads(Path("runs/flat/summary.json").read_text())
    assert load_encoder("runs/flat")[1].config["input_size"] == (3, 20, 20)
