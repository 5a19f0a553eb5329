from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr_scale.cli import recipes
from simclr_scale.cli.pretrain import PretrainCLI
from simclr_scale.cli.recipes import find_recipe, shipped_recipes
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.errors import InputError
from simclr_scale.pretraining import SimCLR
from tests.cli.commands import CHECKOUT

FILES = sorted((CHECKOUT / "configs" / "pretrain").glob("*.yaml"))
HERE = {"accelerator": "cpu", "devices": "1", "strategy": "auto", "precision": "32-true"}


def test_all_files_are_shipped() -> None:
    assert sorted(shipped_recipes("pretrain").values()) == FILES
    assert {"quickstart", "cifar10", "cifar10_small", "cifar10_tiny", "imagenet_resnet50"} <= set(
        shipped_recipes("pretrain")
    )
    assert shipped_recipes("bake") == {}


def test_an_installed_package_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "mine.yaml").touch()
    monkeypatch.setattr(recipes, "_FOLDERS", (tmp_path, *recipes._FOLDERS))
    assert shipped_recipes("pretrain") == {"mine": tmp_path / "pretrain" / "mine.yaml"}


def test_a_file_is_taken_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("pretrain", "quickstart") == CHECKOUT / "configs" / "pretrain" / "quickstart.yaml"
    Path("quickstart").touch()
    assert find_recipe("pretrain", "quickstart") == Path("quickstart")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_recipe("pretrain", "~/quickstart") == tmp_path / "quickstart"


def test_neither_file_nor_recipe() -> None:
    with pytest.raises(InputError, match=r"no configuration file or recipe 'quickstrt'; did you mean quickstart\?"):
        find_recipe("pretrain", "quickstrt")
    with pytest.raises(
        InputError, match="shipped recipes are chest_xray, cifar10, cifar10_barlow_twins, cifar10_sigmoid"
    ):
        find_recipe("pretrain", "nothing.yaml")


def leaves(node: Any, *keys: str) -> dict[str, Any]:
    if not isinstance(node, dict):
        return {".".join(keys): node}
    return {key: value for name, child in node.items() for key, value in leaves(child, *keys, name).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_read_as_it_is_written_and_builds(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(path.read_text())
    source = [] if "source" in written["data"] else ["--data.source", "textures"]
    cli = PretrainCLI(["--config", path.stem, *source, *(f"--trainer.{key}={value}" for key, value in HERE.items())])
    assert isinstance(cli.model, SimCLR)
    assert isinstance(cli.datamodule, SimCLRDataModule)
    assert cli.trainer.max_epochs == written["trainer"]["max_epochs"]
    read = leaves(yaml.safe_load(cli.saved_config()))
    for key, value in leaves(written).items():
        if key.endswith("class_path"):
            assert read[key].rpartition(".")[2] == value.rpartition(".")[2]
        elif key.removeprefix("trainer.") not in HERE:
            assert read[key] == value, key
    assert list(tmp_path.iterdir()) == []
