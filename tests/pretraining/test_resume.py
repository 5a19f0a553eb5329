"""A run that was interrupted and resumed ends as the run without a stop: bit for bit, and row for row."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from simclr_scale.pretraining.checkpointing import checkpoints
from tests.data.damaged import damage
from tests.pretraining.runs import (
    QUIET,
    STEPS_AN_EPOCH,
    KillAt,
    Killed,
    StepsSeen,
    StopAfter,
    arguments,
    assert_same_run,
    differences,
    last_checkpoint,
    metrics,
    pretrain,
    write_classes,
)

pytestmark = QUIET

VIT = (
    *("--model.encoder.name", "test_vit", "--model.encoder.channels", "null", "--model.encoder.img_size", "16"),
    *("--model.encoder.patch_size", "8", "--model.encoder.drop_path_rate", "0.5", "--model.encoder.drop_rate", "0.1"),
)
ADAMW = ("--model.optimizer", "torch.optim.AdamW", "--model.learning_rate", "0.01")
FROM_FILES = ("--data.in_memory", "false")
MID_EPOCH = ("--checkpoint.every_n_steps", "4")


@pytest.mark.parametrize(
    ("epochs", "kill_at", "resumes_at", "options"),
    [
        pytest.param(10, 25, 25, ("--checkpoint.every_n_epochs", "5", "--knn.every_n_epochs", "2"), id="epoch 5 of 10"),
        pytest.param(
            10, 28, 25, ("--checkpoint.every_n_epochs", "5", "--knn.every_n_epochs", "5"), id="later in epoch 6"
        ),
        pytest.param(4, 13, 12, (*MID_EPOCH, "--knn.every_n_epochs", "1"), id="mid-epoch"),
        pytest.param(
            4, 8, 8, (*MID_EPOCH, *ADAMW, "--trainer.precision", "bf16-mixed"), id="mid-epoch bf16-mixed AdamW"
        ),
        pytest.param(4, 10, 10, ("--trainer.precision", "bf16-mixed"), id="epoch end bf16-mixed"),
        pytest.param(3, 9, 8, (*MID_EPOCH, *VIT), id="mid-epoch, dropout and drop path"),
        pytest.param(3, 9, 8, (*MID_EPOCH, "--model.chunk_size", "6", "--model.channels_last", "true"), id="chunks"),
        pytest.param(3, 9, 8, (*MID_EPOCH, "--data.num_workers", "1"), id="mid-epoch, a worker"),
        pytest.param(3, 6, 5, ("--data.num_workers", "1"), id="epoch end, a worker"),
        pytest.param(
            *(3, 9, 8, (*MID_EPOCH, "--data.num_workers", "2")), id="mid-epoch, two workers", marks=pytest.mark.slow
        ),
        pytest.param(3, 9, 8, (*MID_EPOCH, *FROM_FILES, "--data.num_workers", "0"), id="mid-epoch, from files"),
        pytest.param(
            *(3, 9, 8, (*MID_EPOCH, *FROM_FILES, "--data.num_workers", "2")),
            id="mid-epoch, files, two workers",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, 3, 0, (), id="before the first checkpoint"),
    ],
)
def test_ends_as_the_unbroken_run(
    images: Path, tmp_path: Path, epochs: int, kill_at: int, resumes_at: int, options: tuple[str, ...]
) -> None:
    def command(name: str, *more: str) -> list[str]:
        return arguments(images, tmp_path, name, "--trainer.max_epochs", str(epochs), *options, *more)

    pretrain(command("unbroken"))
    with pytest.raises(Killed):
        pretrain(command("broken"), KillAt(kill_at))
    seen = StepsSeen()
    pretrain(command("broken", "--resume", "auto"), seen)
    assert seen.steps == list(range(resumes_at, epochs * STEPS_AN_EPOCH))
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


class ImagesSeen(pl.Callback):
    """Records which images each step was given, of which labels, and the loss."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[list[int], list[int]]] = {}
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        self.steps[trainer.global_step] = batch["index"].tolist(), batch["label"].tolist()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses[trainer.global_step - 1] = outputs["loss"].item()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*FROM_FILES, "--data.num_workers", "0"), id="no workers"),
        pytest.param((*FROM_FILES, "--data.num_workers", "2"), id="two workers", marks=pytest.mark.slow),
        pytest.param((), id="in memory"),
    ],
)
def test_each_remaining_image_once_with_bad_files_among_them(tmp_path: Path, options: tuple[str, ...]) -> None:
    images = write_classes(tmp_path / "images")
    for name, harm in {"class0/3": "truncated", "class1/0": "empty", "class2/13": "foreign"}.items():
        damage(images / "train" / f"{name}.png", harm)
    damage(images / "test" / "class1" / "2.png", "truncated")

    def command(name: str) -> list[str]:
        more = ("--trainer.max_epochs", "3", "--data.max_bad_fraction", "0.1", *MID_EPOCH, *options)
        return [*arguments(images, tmp_path, name, *more), "--resume", "auto"]

    unbroken, before, after = ImagesSeen(), ImagesSeen(), ImagesSeen()
    pretrain(command("unbroken"), unbroken)
    with pytest.raises(Killed):
        pretrain(command("broken"), before, KillAt(9))
    named = (tmp_path / "broken" / "bad_files.txt").read_text()
    pretrain(command("broken"), after)

    assert list(after.steps) == list(range(8, 15))
    rest_of_the_epoch = [index for step in (8, 9) for index in after.steps[step][0]]
    done = [index for step in (5, 6, 7) for index in before.steps[step][0]]
    assert len({*done, *rest_of_the_epoch}) == len(done) + len(rest_of_the_epoch) == STEPS_AN_EPOCH * 8
    for step, shown in {**before.steps, **after.steps}.items():
        assert shown == unbroken.steps[step]
    for step, loss in {**before.losses, **after.losses}.items():
        assert abs(loss - unbroken.losses[step]) <= 1e-6
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")

    lines = {run: (tmp_path / run / "bad_files.txt").read_text() for run in ("unbroken", "broken")}
    assert lines["broken"].startswith(named)
    for text in lines.values():
        paths = [line.partition("\t")[0] for line in text.splitlines()]
        assert sorted(path.rpartition("images/")[2] for path in paths) == [
            "test/class1/2.png",
            "train/class0/3.png",
            "train/class1/0.png",
            "train/class2/13.png",
        ]
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert summary["unreadable_images"] == 3
    assert summary["knn"]["unreadable_images"] == 4


def test_twice(images: Path, tmp_path: Path) -> None:
    command = lambda name: arguments(images, tmp_path, name, "--trainer.max_epochs", "4", *MID_EPOCH)  # noqa: E731
    pretrain(command("unbroken"))
    for step in (7, 13):
        with pytest.raises(Killed):
            pretrain([*command("broken"), "--resume", "auto"], KillAt(step))
    pretrain([*command("broken"), "--resume", "auto"])
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_time_limit_in_the_middle_of_an_epoch(images: Path, tmp_path: Path) -> None:
    """No checkpoint was due, and the epoch was not at its end: what is left of it is not skipped."""
    command = lambda name: arguments(images, tmp_path, name, "--trainer.max_epochs", "3")  # noqa: E731
    pretrain(command("unbroken"))
    pretrain(command("broken"), StopAfter(8))
    assert [path.name for path in checkpoints(tmp_path / "broken" / "checkpoints")] == ["step=8.ckpt", "step=5.ckpt"]
    seen = StepsSeen()
    pretrain([*command("broken"), "--resume", "auto"], seen)
    assert seen.steps == list(range(8, 15))
    before, after = (last_checkpoint(tmp_path / name) for name in ("unbroken", "broken"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "probe_optimizer"):
        assert differences(before[part], after[part]) == []


def test_from_an_older_checkpoint(images: Path, tmp_path: Path) -> None:
    """The run goes back: what lies after that checkpoint is forgotten, and comes again."""
    command = lambda name: arguments(images, tmp_path, name, "--trainer.max_epochs", "3")  # noqa: E731
    pretrain(command("unbroken"))
    pretrain(command("broken"))
    folder = tmp_path / "broken" / "checkpoints"
    with pytest.raises(Killed):
        pretrain(
            [*command("broken"), "--resume", str(folder / "step=10.ckpt"), "--checkpoint.every_n_steps", "3"],
            KillAt(13),
        )
    assert [path.name for path in checkpoints(folder)] == ["step=12.ckpt", "step=10.ckpt"]
    pretrain([*command("broken"), "--resume", "auto"])
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_damaged_newest_checkpoint_is_passed_over(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = lambda name: arguments(images, tmp_path, name, "--trainer.max_epochs", "3")  # noqa: E731
    pretrain(command("unbroken"))
    with pytest.raises(Killed):
        pretrain(command("broken"), KillAt(11))
    newest = tmp_path / "broken" / "checkpoints" / "step=10.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    seen = StepsSeen()
    pretrain([*command("broken"), "--resume", "auto"], seen)
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert seen.steps[0] == 5
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_finished_run_stays_as_it_is(images: Path, tmp_path: Path) -> None:
    command = arguments(images, tmp_path, "done", "--trainer.max_epochs", "1")
    pretrain(command)
    shutil.copytree(tmp_path / "done", tmp_path / "copy")
    seen = StepsSeen()
    pretrain([*command, "--resume", "auto"], seen)
    assert seen.steps == []
    assert_same_run(tmp_path / "copy", tmp_path / "done")
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("copy", "done"))
    assert before["scaling"]["steps_timed"] == STEPS_AN_EPOCH - 1
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def kill_when(appears: Path, command: list[str]) -> None:
    """SIGKILL, to all processes of a run, at the moment a file is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "simclr_scale", "pretrain", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not appears.exists():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("appears", ["step=10.ckpt", "step=12.ckpt", "step=25.ckpt"])
def test_killed_the_moment_a_checkpoint_appears(images: Path, tmp_path: Path, appears: str) -> None:
    """There is no time for anything then: every row of the steps in the checkpoint must be on the disk already."""
    options = ("--trainer.max_epochs", "10", "--knn.every_n_epochs", "1", *MID_EPOCH)
    pretrain(arguments(images, tmp_path, "unbroken", *options))
    command = [*arguments(images, tmp_path, "broken", *options), "--resume", "auto"]
    kill_when(tmp_path / "broken" / "checkpoints" / appears, command)
    pretrain(command)
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
def test_begun_on_four_processes_gone_on_with_on_two_and_ended_on_one(images: Path, tmp_path: Path) -> None:
    """In the middle of an epoch: all see the same images in the same order, whoever takes which, at the same rate."""
    options = ("--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "1", *MID_EPOCH)
    pretrain(arguments(images, tmp_path, "unbroken", *options))
    command = [*arguments(images, tmp_path, "broken", *options), "--resume", "auto"]
    for count, checkpoint in ((4, "step=4.ckpt"), (2, "step=12.ckpt")):
        some = ("--trainer.devices", str(count), "--trainer.strategy", "ddp")
        kill_when(tmp_path / "broken" / "checkpoints" / checkpoint, [*command, *some])
    seen = StepsSeen()
    pretrain(command, seen)
    assert seen.steps[0] >= 12
    before, after = (metrics(tmp_path / name) for name in ("unbroken", "broken"))
    assert [row["step"] for row in before] == [row["step"] for row in after]
    for row, other in zip(before, after, strict=True):
        assert row["learning_rate"] == other["learning_rate"]
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)
    before_state, after_state = (last_checkpoint(tmp_path / name)["state_dict"] for name in ("unbroken", "broken"))
    for key, value in before_state.items():
        torch.testing.assert_close(after_state[key], value, rtol=1e-4, atol=1e-4, msg=key)
