"""Checkpoints appear whole, late enough, and in the right number."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.strategies import DDPStrategy

from simclr_scale.errors import InputError, RunFailed
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.agreement import Agreement
from simclr_scale.pretraining.checkpointing import (
    LAST,
    RunCheckpoint,
    checkpoints,
    is_intact,
    newest_intact,
    publish,
)
from tests.pretraining.runs import QUIET, KillAt, Killed, fit
from tests.pretraining.test_ranks import Pool

pytestmark = QUIET


class Watch(pl.Callback):
    """Which checkpoints lie there when a step starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen[trainer.global_step] = names(self.folder)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def train(
    folder: Path,
    *callbacks: pl.Callback,
    every_n_epochs: int = 1,
    every_n_steps: int | None = None,
    keep: int = 2,
    **trainer: Any,
) -> Any:
    """Four epochs of three steps."""
    checkpoint = RunCheckpoint(every_n_epochs, every_n_steps, keep)
    checkpoint.folder = folder
    model = SimCLR(create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)), warmup_epochs=0)
    return fit(model, *callbacks, checkpoint, enable_checkpointing=True, **{"max_epochs": 4, **trainer})


@pytest.mark.parametrize(
    ("options", "seen", "left"),
    [
        ({}, {4: ["step=3.ckpt"], 10: ["step=9.ckpt", "step=6.ckpt"]}, ["step=12.ckpt", "step=9.ckpt"]),
        ({"keep": 1}, {10: ["step=9.ckpt"]}, ["step=12.ckpt"]),
        ({"every_n_epochs": 3}, {9: [], 11: ["step=9.ckpt"]}, ["step=12.ckpt", "step=9.ckpt"]),
        ({"every_n_epochs": 9}, {11: []}, ["step=12.ckpt"]),
        # 6 and 12 are due twice, 3 and 9 are ends of an epoch.
        ({"every_n_steps": 2, "keep": 9}, {6: ["step=4.ckpt", "step=3.ckpt", "step=2.ckpt"]}, None),
    ],
)
def test_when_and_how_many(tmp_path: Path, options: dict[str, int], seen: dict, left: list[str] | None) -> None:
    watch = Watch(tmp_path)
    # Before the checkpoint in the list of callbacks, so it sees what the step before has left.
    train(tmp_path, watch, **options)
    assert {step: watch.seen[step] for step in seen} == seen
    assert names(tmp_path) == (left or [f"step={step}.ckpt" for step in (12, 10, 9, 8, 6, 4, 3, 2)])


class WatchingLogger(DummyLogger):
    """Which checkpoints lie there when a row is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen[step] = names(self.folder)


def test_appears_after_the_row_of_its_last_step(tmp_path: Path) -> None:
    """Killed at any moment, a run has on the disk the rows of all steps that its newest checkpoint has seen."""
    logger = WatchingLogger(tmp_path)
    train(tmp_path, every_n_steps=2, logger=logger, log_every_n_steps=1)
    assert sorted(logger.seen) == list(range(12))
    for step, lying in logger.seen.items():
        assert f"step={step + 1}.ckpt" not in lying
    assert logger.seen[4] == ["step=4.ckpt", "step=3.ckpt"]


class Clock(pl.Callback):
    """A minute passes in each step; the second rank's clock is ahead, as clocks are."""

    now = 0.0

    def __init__(self, ahead: float = 0.0) -> None:
        Clock.now = ahead

    def on_train_batch_start(self, *args: Any) -> None:
        Clock.now += 60.0


def train_by_minutes(rank: int, world_size: int, folder: str) -> list[str]:
    checkpoint = RunCheckpoint(every_n_epochs=9, every_n_minutes=2.5, keep=9)
    checkpoint.folder = Path(folder)
    options: dict[str, Any] = {"max_epochs": 3}
    if world_size > 1:
        strategy = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo")
        options |= {"devices": world_size, "strategy": strategy, "use_distributed_sampler": False}
    with mock.patch("simclr_scale.pretraining.checkpointing.time", SimpleNamespace(monotonic=lambda: Clock.now)):
        model = SimCLR(create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)), warmup_epochs=0)
        fit(model, Clock(), JumpAt(2 if rank else 99), Agreement(), checkpoint, enable_checkpointing=True, **options)
    return names(Path(folder))


class JumpAt(pl.Callback):
    """The clock of one rank goes forward by two minutes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            Clock.now += 120.0


def test_every_n_minutes(tmp_path: Path) -> None:
    """Nine steps of a minute in three epochs: after two and a half minutes comes the end of the third, and so on."""
    assert train_by_minutes(0, 1, str(tmp_path)) == ["step=9.ckpt", "step=6.ckpt", "step=3.ckpt"]


def test_every_n_minutes_where_clocks_differ(gloo, tmp_path: Path) -> None:
    """The first clock that is due decides for all, and a checkpoint sets all of them back."""
    left = gloo(2, train_by_minutes, str(tmp_path))
    assert left[0] == ["step=9.ckpt", "step=8.ckpt", "step=5.ckpt", "step=2.ckpt"]


def test_minutes_need_an_agreement(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_minutes=1)
    checkpoint.folder = tmp_path
    model = SimCLR(create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)), warmup_epochs=0)
    with pytest.raises(InputError, match="every_n_minutes needs the callback Agreement"):
        fit(model, checkpoint, enable_checkpointing=True)


@pytest.mark.parametrize("minutes", [0, -1.0, float("inf"), float("nan")])
def test_minutes_out_of_range(minutes: float) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.every_n_minutes must be above 0, got "):
        RunCheckpoint(every_n_minutes=minutes)


def test_last_is_the_newest_and_checksums_hold(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    last = torch.load(tmp_path / LAST, weights_only=True)
    assert last["global_step"] == trainer.global_step == 12
    assert (tmp_path / LAST).samefile(tmp_path / "step=12.ckpt")
    for path in checkpoints(tmp_path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (tmp_path / f"{path.name}.sha256").read_text() == f"{digest}  {path.name}\n"
    kept = {"last.ckpt", *(f"step={step}.ckpt{end}" for step in (9, 12) for end in ("", ".sha256"))}
    assert set(os.listdir(tmp_path)) == kept


def test_a_run_stopped_by_steps_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    train(tmp_path, every_n_epochs=5, max_epochs=-1, max_steps=7)
    assert names(tmp_path) == ["step=7.ckpt"]
    progress = torch.load(tmp_path / LAST, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert progress["processed"] == 2, "the third epoch is not done"


def test_a_run_stopped_by_steps_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    train(tmp_path, every_n_epochs=5, max_epochs=-1, max_steps=6)
    assert names(tmp_path) == ["step=6.ckpt"]


def test_an_exception_does_not_cost_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, KillAt(4), every_n_steps=4)
    assert names(tmp_path) == ["step=4.ckpt", "step=3.ckpt"]
    assert newest_intact(tmp_path) == (tmp_path / "step=4.ckpt", [])


def test_a_write_that_fails_leaves_the_former_ones(tmp_path: Path) -> None:
    """Half a file is nobody's checkpoint, and does not stay."""
    save = pl.Trainer.save_checkpoint

    def full_disk(trainer: pl.Trainer, path: Path) -> None:
        if trainer.global_step < 9:
            return save(trainer, path)
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("no space left on device")

    with mock.patch.object(pl.Trainer, "save_checkpoint", full_disk), pytest.raises(RunFailed, match="no space"):
        train(tmp_path)
    assert names(tmp_path) == ["step=6.ckpt", "step=3.ckpt"]
    assert all(map(is_intact, checkpoints(tmp_path)))
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 6
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".step=9.ckpt.partial").write_bytes(b"of a run that was killed")
    train(tmp_path)
    assert not list(tmp_path.glob(".*")), "the next start sweeps up"


def write(folder: Path, step: int) -> Path:
    beside, path = folder / "beside", folder / f"step={step}.ckpt"
    beside.write_text(f"weights of step {step}" * 100)
    publish(beside, path)
    return path


def test_newest_intact(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) == (None, [])
    paths = [write(tmp_path, step) for step in (5, 10, 100, 20)]
    for other in ("step=7.ckpt.partial", "step=x.ckpt", "epoch=3.ckpt"):
        (tmp_path / other).write_text("")
    assert checkpoints(tmp_path) == [paths[2], paths[3], paths[1], paths[0]]
    assert newest_intact(tmp_path) == (paths[2], [])
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    (tmp_path / "step=20.ckpt.sha256").unlink()
    assert newest_intact(tmp_path) == (paths[1], [paths[2], paths[3]])
    for path in (paths[0], paths[1]):
        path.write_text("")
    assert newest_intact(tmp_path) == (None, [paths[2], paths[3], paths[1], paths[0]])


@pytest.mark.parametrize("option", ["every_n_epochs", "every_n_steps", "keep"])
def test_arguments_out_of_range(option: str) -> None:
    with pytest.raises(InputError, match=f"checkpoint.{option} must be at least 1, got 0"):
        RunCheckpoint(**{option: 0})


def written_folder(folder: Path, step: int, content: str = "x") -> Path:
    beside = folder / f".step={step}.ckpt.partial"
    beside.mkdir()
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (beside / name).write_text(f"{content}{name}")
    publish(beside, path := folder / f"step={step}.ckpt")
    return path


def test_a_folder_of_shards_is_whole_or_passed_over(tmp_path: Path) -> None:
    first, second = written_folder(tmp_path, 1), written_folder(tmp_path, 2)
    assert (tmp_path / "last.ckpt").resolve() == second.resolve()
    assert newest_intact(tmp_path) == (second, [])
    done = subprocess.run(["sha256sum", "-c", "step=2.ckpt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("OK")) == (0, 3)
    for damage in (
        lambda folder: (folder / "__1_0.distcp").unlink(),
        lambda folder: (folder / "__1_0.distcp").write_text("other"),
        lambda folder: (folder / "more").write_text("more"),
        lambda folder: shutil.rmtree(folder),
    ):
        damage(second)
        found, damaged = newest_intact(tmp_path)
        assert found == first
        assert damaged == ([second] if second.exists() else [])
        shutil.rmtree(second, ignore_errors=True)
        second = written_folder(tmp_path, 2)


def test_a_folder_takes_the_place_of_a_file_and_a_file_that_of_a_folder(tmp_path: Path) -> None:
    (beside := tmp_path / ".partial").write_text("whole")
    publish(beside, tmp_path / "step=1.ckpt")
    assert newest_intact(tmp_path) == (written_folder(tmp_path, 1), [])
    assert newest_intact(tmp_path) == (written_folder(tmp_path, 1, "again"), [])
    beside.write_text("whole")
    publish(beside, tmp_path / "step=1.ckpt")
    assert newest_intact(tmp_path) == (tmp_path / "step=1.ckpt", [])
    assert (tmp_path / "last.ckpt").read_text() == "whole"
    assert not (tmp_path / "last.ckpt").is_symlink()
