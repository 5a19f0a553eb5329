"""The folder of a run: never another's, whole at every moment."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from simclr_scale import load_encoder
from simclr_scale.bundle import ImageTransform, load_head
from simclr_scale.errors import InputError
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.pretraining.run_folder import RunFolder
from tests.pretraining.runs import QUIET, arguments, differences, last_checkpoint, pretrain

pytestmark = QUIET


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_run_leaves(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(arguments(images, tmp_path, "run", "--trainer.max_epochs", "2"))
    run = tmp_path / "run"
    events = {path.name for path in run.glob("events.out.tfevents.*")}
    assert len(events) == 1
    assert set(os.listdir(run)) == {"config.yaml", "metrics.csv", "checkpoints", "encoder", "summary.json", *events}

    summary = json.loads((run / "summary.json").read_text())
    assert summary["source"] == str(images)
    assert (summary["epochs"], summary["steps"], summary["global_batch_size"]) == (2, 10, 8)
    assert (summary["train_images"], summary["devices"], summary["seed"]) == (42, 1, 0)
    assert set(summary["knn_top1"]) == {"raw_pixels", "color_histogram", "untrained", "trained"}
    assert summary["knn_top1"]["raw_pixels"] > 0.4, "the class shows in the colour"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["warmup_epochs"] == 1
    assert not {"name", "runs_dir", "resume", "override", "config"} & config.keys()

    encoder, transform = load_encoder(run)
    trained = {key.removeprefix("encoder."): v for key, v in last_checkpoint(run)["state_dict"].items()}
    assert differences(dict(encoder.state_dict()), {key: trained[key] for key in encoder.state_dict()}) == []
    assert transform.config["input_size"] == (3, 16, 16)
    facts = json.loads((run / "encoder" / "config.json").read_text())["simclr_scale"]["facts"]
    assert facts == summary
    output = capsys.readouterr().out
    assert str(run / "encoder") in output
    assert f"{summary['knn_top1']['trained']:.1%}" in output


def test_a_head_of_another_kind_is_not_written(tmp_path: Path) -> None:
    module = SimpleNamespace(
        encoder=create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)),
        head=nn.Linear(4, 3),
        transform=ImageTransform((3, 16, 16)),
    )
    RunFolder(tmp_path, "", resumed=False)._replace_encoder(module.encoder, module.head, module.transform, {})
    assert set(os.listdir(tmp_path / "encoder")) == {"README.md", "config.json", "model.safetensors"}


def test_images_without_labels(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((images / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{index}.png")
    pretrain(arguments(flat, tmp_path, "run", "--trainer.max_epochs", "1"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not {"knn_top1", "knn"} & summary.keys()
    assert "has no labels" in capsys.readouterr().out
    load_encoder(tmp_path / "run")


def test_an_existing_run_is_left_untouched(images: Path, tmp_path: Path) -> None:
    command = arguments(images, tmp_path, "run", "--trainer.max_epochs", "1")
    pretrain(command)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"run .*run exists already; give another --name"):
        pretrain(command)
    assert contents(tmp_path / "run") == before


def test_a_run_that_appears_meanwhile_is_left_untouched(images: Path, tmp_path: Path) -> None:
    """Two starts with one name, of which the other was faster."""

    class Other(RunFolder):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "config.yaml").write_text("theirs")

    with pytest.raises(InputError, match="exists already"):
        pretrain(arguments(images, tmp_path, "run", "--trainer.max_epochs", "1"), Other(tmp_path, "", resumed=False))
    assert contents(tmp_path / "run") == {"config.yaml": b"theirs"}


def test_the_encoder_is_there_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(seed: int) -> Any:
        torch.manual_seed(seed)
        return SimpleNamespace(
            encoder=create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)),
            head=ProjectionHead(4, out_features=3),
            transform=ImageTransform((3, 16, 16)),
        )

    run = RunFolder(tmp_path, "", resumed=True)
    (tmp_path / ".encoder.partial").mkdir()
    (tmp_path / ".encoder.partial" / "half").write_text("of a former attempt")
    first = module(0)
    run._replace_encoder(first.encoder, first.head, first.transform, {"steps": 1})
    before = load_encoder(tmp_path)[0].state_dict()

    loaded: list[dict[str, torch.Tensor]] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        loaded.append(load_encoder(tmp_path)[0].state_dict())

    monkeypatch.setattr(os, "replace", watched)
    second = module(1)
    run._replace_encoder(second.encoder, second.head, second.transform, {"steps": 2})
    assert len(loaded) == 5, "the bundle in its place, and its four files"
    assert differences(dict(load_head(tmp_path).state_dict()), dict(second.head.state_dict())) == []
    after = second.encoder.state_dict()
    assert all(differences(state, before) == [] or differences(state, after) == [] for state in loaded)
    assert differences(dict(load_encoder(tmp_path)[0].state_dict()), dict(after)) == []
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["simclr_scale"]["facts"] == {"steps": 2}
    assert os.listdir(tmp_path) == ["encoder"]
