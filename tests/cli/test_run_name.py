"""The name of a run that was given none: all processes of one start must come to the same."""

import os
from pathlib import Path

import pytest
from jsonargparse import Namespace

from simclr_scale.cli.pretrain import _default_name
from simclr_scale.cli.resume import find_start
from simclr_scale.errors import InputError


@pytest.fixture(autouse=True)
def _launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test says of a launcher is forgotten after it."""
    for name in ("LOCAL_RANK", "SIMCLR_SCALE_RUN_NAME", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def name_in(**environment: str) -> str:
    os.environ.update(environment)
    return _default_name(Namespace(config=["configs/pretrain/quickstart.yaml"]))


def test_the_recipe_and_the_time() -> None:
    assert name_in().startswith("quickstart-2")
    assert _default_name(Namespace(config=None)).startswith("pretrain-2")


def test_the_processes_that_are_launched_are_handed_it_down() -> None:
    name_in()
    assert name_in(SIMCLR_SCALE_RUN_NAME="quickstart-1", LOCAL_RANK="1") == "quickstart-1"


def test_a_second_start_in_a_process_has_a_name_of_its_own() -> None:
    assert name_in(SIMCLR_SCALE_RUN_NAME="quickstart-1") != "quickstart-1"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_gives_all_its_processes_one(rank: str) -> None:
    assert name_in(TORCHELASTIC_RUN_ID="1f3a", WORLD_SIZE="2", LOCAL_RANK=rank) == "quickstart-1f3a"


def test_slurm_gives_that_of_its_job() -> None:
    assert name_in(SLURM_JOB_ID="4711") == "quickstart-4711"


def test_processes_that_share_nothing_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --name"):
        name_in(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", LOCAL_RANK="0")
    told = Namespace(runs_dir=str(tmp_path), name="told", resume=None)
    assert find_start(told, name_in).folder == tmp_path / "told"
