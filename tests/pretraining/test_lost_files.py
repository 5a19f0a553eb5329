"""A disk that is full, a folder that cannot be written to, images that vanish: done for real, told in one line."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

    # Before the test ends: pytest's own output may go to a file, which must not meet the limit.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", fit_with_callbacks)
        try:
            status = main(["pretrain", *arguments])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    return status, errors.strip().removeprefix("simclr-scale pretrain: error: ")


def files_of_at_most(size: int) -> None:
    """From now on the write that would make a file larger fails, as on a full disk; `failing` lifts that again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_no_room_for_a_checkpoint(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(images, tmp_path, "x", "--trainer.max_epochs", "3")]
    folder = tmp_path / "x" / "checkpoints"
    status, line = failing(command, capsys, At(7, partial(files_of_at_most, 24_000)))
    assert status == 1
    assert line == (
        f"the checkpoint of step 10 cannot be written to {folder}: File too large; {folder}/step=5.ckpt is whole, "
        "and --resume auto --name x continues from it"
    )
    assert sorted(os.listdir(folder)) == ["last.ckpt", "step=5.ckpt", "step=5.ckpt.sha256"]
    assert all(map(is_intact, checkpoints(folder)))
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
def read_only() -> Iterator[Path]:
    """A folder that nobody but root may write to, where this process is not root for as long as the test lasts."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    folder.rmdir()


def test_a_read_only_folder_of_runs(images: Path, read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resume in ((), ("--resume", "auto")):
        status, line = failing([*arguments(images, read_only, "x"), *resume], capsys)
        assert status == 2
        assert line == f"{read_only} cannot be written to (its permissions, or a read-only file system)"
    assert os.listdir(read_only) == []


@contextmanager
def turning_read_only(folder: Path) -> Iterator[Callable[[], None]]:
    """What makes a folder read-only in mid-run, for as long as the context lasts.

    Permissions do not bind root: for it the folder is mounted over itself, read-only, as a file system turns by itself
    after an error of its disk. Files that are open stay so.
    """
    made: list[Callable[[], object]] = []

    def mount() -> None:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        made.append(lambda: subprocess.run(["umount", folder], check=True))
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    def forbid() -> None:
        for place in (folder, folder / "checkpoints"):
            place.chmod(0o555)
            made.append(partial(place.chmod, 0o755))

    try:
        yield mount if os.geteuid() == 0 else forbid
    finally:
        for undo in made:
            undo()


@pytest.mark.parametrize("what", ["metrics", "checkpoints"])
def test_a_run_whose_folder_turns_read_only(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = tmp_path / "x"
    logged = ("--trainer.log_every_n_steps", "2" if what == "metrics" else "1000")
    command = [*arguments(images, tmp_path, "x", "--trainer.max_epochs", "3"), *logged]
    with turning_read_only(folder) as turn:
        status, line = failing(command, capsys, At(7, turn))
        assert not (folder / "summary.json").exists()
    assert status == 1
    why = "Read-only file system" if os.geteuid() == 0 else "Permission denied"
    if what == "metrics":
        assert line == (
            f"a file of the run cannot be read or written: {folder}/metrics.csv: {why}; once that is mended, "
            "--resume auto --name x continues from the last checkpoint"
        )
    else:
        assert line == (
            f"the checkpoint of step 10 cannot be written to {folder}/checkpoints: {why}; "
            f"{folder}/checkpoints/step=5.ckpt is whole, and --resume auto --name x continues from it"
        )
    assert sorted(os.listdir(folder / "checkpoints")) == ["last.ckpt", "step=5.ckpt", "step=5.ckpt.sha256"]
    pretrain([*command, "--resume", "auto"])
    if what == "metrics":
        pretrain(arguments(images, tmp_path, "unbroken", "--trainer.max_epochs", "3"))
        assert_same_run(tmp_path / "unbroken", folder)


def test_checkpoints_that_have_no_place_any_more(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x" / "checkpoints"

    def replace_by_a_file() -> None:
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("")

    command = arguments(images, tmp_path, "x", "--trainer.max_epochs", "3")
    status, line = failing(command, capsys, At(7, replace_by_a_file))
    assert status == 1
    assert line == f"the checkpoint of step 10 cannot be written to {folder}: File exists; there is no earlier one"


def test_no_room_for_the_metrics(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(images, tmp_path, "x", "--trainer.max_epochs", "3")
    status, line = failing(command, capsys, At(7, partial(files_of_at_most, 100)))
    assert status == 1
    assert line == (
        "a file of the run cannot be read or written: File too large; once that is mended, --resume auto --name x "
        "continues from the last checkpoint"
    )


def test_a_folder_of_runs_that_is_a_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("")
    status, line = failing(arguments(images, tmp_path / "runs", "x"), capsys)
    assert (status, line) == (
        2,
        f"{tmp_path}/runs is not a folder, so no run can be kept there: give another --runs_dir",
    )
