import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.commands import Outcome, TrainedRun, files_below, run_command, train

# What launchers and schedulers tell the processes they start.
_LAUNCHERS = (
    "LOCAL_RANK",
    "RANK",
    "SIMCLR_SCALE_RUN_NAME",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
)


@pytest.fixture(autouse=True, scope="session")
def _clean_process() -> Iterator[None]:
    """A process that nobody launched; and what a command changes in it for good is changed back."""
    before, threads = dict(os.environ), torch.get_num_threads()
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    # Lightning calls a method of jsonargparse by the name that it had before.
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``command("knn", "--k", 3)``: exit status and output of a command, run in this process."""
    return lambda *arguments: run_command(capfd, *arguments)


@pytest.fixture
def refusal(command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must be refused, with status 2, in one line and without a trace; returns the line."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: object) -> str:
        before = files_below(tmp_path)
        outcome = command(*arguments)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1), outcome
        prefix = f"simclr-scale {arguments[0]}: error: "
        assert outcome.err.startswith(prefix)
        assert files_below(tmp_path) == before
        return outcome.err.removeprefix(prefix).strip()

    return refuse


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A finished run of two epochs of three steps; not to be changed."""
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, runs/x below the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.folder, "runs/x", symlinks=True)
    return Path("runs/x")
