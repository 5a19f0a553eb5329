"""A disk that is full, a folder that cannot be written to, images that vanish: done for real, told in one line."""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from simclr_scale.cli import main
from simclr_scale.pretraining.checkpointing import checkpoints, is_intact
from tests.pretraining.runs import QUIET, arguments, assert_same_run, pretrain, write_classes

pytestmark = QUIET

NOBODY = 65534


class At(pl.Callback):
    """Does something when a step starts."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str], *callbacks: pl.Callback) -> tuple[int, str]:
    """Exit status and the line on standard error."""
    fit = pl.Trainer.fit

    def fit_with_callbacks(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks = [*callbacks, *trainer.callbacks]  # type: ignore[attr-defined]
        fit(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", fit_with_callbacks)
        status = main(["pretrain", *arguments])
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    return status, errors.strip().removeprefix("simclr-scale pretrain: error: ")


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Call it, and no file may grow beyond 24 kB: the write that would make it does fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_files: Any
) -> None:
    command = [*arguments(images, tmp_path, "x", "--trainer.max_epochs", "3")]
    folder = tmp_path / "x" / "checkpoints"
    status, line = failing(command, capsys, At(7, small_files))
    assert status == 1
    assert line == (
        f"the checkpoint of step 10 cannot be written to {folder}: File too large; {folder}/step=5.ckpt is whole, "
        "and --resume auto --name x continues from it"
    )
    assert sorted(os.listdir(folder)) == ["last.ckpt", "step=5.ckpt", "step=5.ckpt.sha256"]
    assert all(map(is_intact, checkpoints(folder)))
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    pretrain([*command, "--resume", "auto"])
    pretrain(arguments(images, tmp_path, "unbroken", "--trainer.max_epochs", "3"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "x")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_that_vanish(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    images = write_classes(tmp_path / "images")
    options = ("--data.in_memory", "false", "--data.num_workers", workers, "--trainer.max_epochs", "1000")
    status, line = failing(arguments(images, tmp_path, "x", *options), capsys, At(7, lambda: shutil.rmtree(images)))
    assert status == 1
    assert line == (
        f"data.source {images} is gone; once it is back, --resume auto --name x continues from the last checkpoint"
    )
    [newest, *_] = checkpoints(tmp_path / "x" / "checkpoints")
    assert is_intact(newest)


@pytest.fixture
def own() -> Iterator[Path]:
    """A folder with images and runs of a user who is not root, as whom this process works as long as the test lasts."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    write_classes(folder / "images")
    (folder / "runs").mkdir()
    yield folder
    if root:
        os.seteuid(0)
    for path in (folder / "runs", *(folder / "runs").rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_of_runs(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "runs").chmod(0o555)
    for resume in ((), ("--resume", "auto")):
        status, line = failing([*arguments(own / "images", own / "runs", "x"), *resume], capsys)
        assert status == 2
        assert line == f"{own}/runs cannot be written to (its permissions, or a read-only file system)"
    assert os.listdir(own / "runs") == []


def test_a_folder_that_becomes_read_only(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own / "runs" / "x" / "checkpoints"
    command = arguments(own / "images", own / "runs", "x", "--trainer.max_epochs", "3")
    status, line = failing(command, capsys, At(7, lambda: folder.chmod(0o555)))
    assert status == 1
    assert line == (
        f"the checkpoint of step 10 cannot be written to {folder}: Permission denied; {folder}/step=5.ckpt is whole, "
        "and --resume auto --name x continues from it"
    )
    status, line = failing([*command, "--resume", "auto"], capsys)
    assert (status, line) == (2, f"{folder} cannot be written to (its permissions, or a read-only file system)")
    folder.chmod(0o755)
    pretrain([*command, "--resume", "auto"])


def test_metrics_that_cannot_be_written(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = own / "runs" / "x"
    action = lambda: (run / "metrics.csv").chmod(0o444)  # noqa: E731
    command = arguments(own / "images", own / "runs", "x", "--trainer.max_epochs", "3")
    status, line = failing(command, capsys, At(7, action))
    assert status == 1
    assert line == (
        f"{run}/metrics.csv: Permission denied; once that is mended, --resume auto --name x continues from the last "
        "checkpoint"
    )


def test_a_folder_of_runs_that_is_a_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("")
    status, line = failing(arguments(images, tmp_path / "runs", "x"), capsys)
    assert (status, line) == (
        2,
        f"{tmp_path}/runs is not a folder, so no run can be kept there: give another --runs_dir",
    )
