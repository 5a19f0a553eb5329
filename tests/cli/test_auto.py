"""--config auto, end to end."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from simclr_scale.bundle import load_encoder
from tests.cli.commands import Outcome, write_images

Command = Callable[..., Outcome]
AUTO = ("pretrain", "--config", "auto", "--trainer.accelerator", "cpu", "--trainer.devices", 1)


def write_grey(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 255, (24, 24, 1), dtype=np.uint8).repeat(3, 2)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(("kind", "size", "channels"), [("rgb", 20, 3), ("grey", 24, 1)])
def test_a_folder_is_trained_on_by_its_own_recipe(
    kind: str, size: int, channels: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_images(tmp_path / "rgb", count=40) if kind == "rgb" else write_grey(tmp_path / "grey")
    outcome = command(*AUTO, "--data.source", folder.name, "--trainer.max_steps", 3, "--name", "x")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert f"auto: data.image_size {size}: images of at most 64 px are taken as they are" in lines
    told, started = (next(i for i, line in enumerate(lines) if line.startswith(what)) for what in ("auto: ", "run "))
    assert told < started
    saved = yaml.safe_load((tmp_path / "runs/x/config.yaml").read_text())
    assert saved["data"].items() >= {"image_size": size, "global_batch_size": 16}.items()
    assert saved["data"]["preset"] == {"rgb": "small", "grey": "grey"}[kind]
    assert saved["model"]["encoder"]["init_args"]["name"] == "simclr_resnet_tiny"
    assert json.loads((tmp_path / "runs/x/summary.json").read_text())["steps"] == 3
    assert load_encoder("runs/x")[1].config["input_size"] == (channels, size, size)
    # Looking once more gives the same.
    assert command(*AUTO, "--data.source", folder.name, "--trainer.max_steps", 3, "--name", "y").status == 0
    assert (tmp_path / "runs/y/config.yaml").read_text() == (tmp_path / "runs/x/config.yaml").read_text()


def test_a_file_of_that_name_is_taken_as_it_is(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "auto").write_text("modle: 3")
    assert "there is no option modle" in refusal(*AUTO, "--data.source", "textures")


MISTAKES = [
    ((), "--config auto looks at the images: give --data.source"),
    (("--data.source", "nowhere"), "no such folder"),
    (("--data.source", "two", "--trainer.devices", "4"), "2 training images are fewer than 2 for each of 4 processes"),
    (("--data.source", "two", "--data.global_batch_size", "many"), "data.global_batch_size: expected int; got many"),
    (("--data.source", "two", "--data.preset", "smal"), "data.preset: expected one of"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: tuple[str, ...], line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    write_images(tmp_path / "two", count=2)
    assert line in refusal(*AUTO, *options)
