"""SIGTERM and SIGUSR1, sent for real: a checkpoint of the step under way, and the run continues bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from simclr_scale.errors import Preempted, RunFailed
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.agreement import Agreement
from simclr_scale.pretraining.checkpointing import RunCheckpoint, checkpoints
from simclr_scale.pretraining.preemption import Preemption
from tests.pretraining.runs import (
    QUIET,
    StepsSeen,
    arguments,
    assert_same_run,
    fit,
    pretrain,
)
from tests.pretraining.test_killed_worker import children
from tests.pretraining.test_ranks import Pool

pytestmark = QUIET

STEPS = 10
CHECKOUT = Path(__file__).parents[2]
HANGS_AFTER = 300.0


class Signal(pl.Callback):
    """Sends this process a signal while a step is under way."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def command(images: Path, runs: Path, name: str, *options: str) -> list[str]:
    """Two epochs of five steps."""
    return [*arguments(images, runs, name, "--trainer.max_epochs", "2", "--knn.every_n_epochs", "1"), *options]


@pytest.mark.parametrize("step", [0, 2, 4, 7, 9])
def test_sigterm_in_any_step(images: Path, tmp_path: Path, step: int) -> None:
    """The first of all, the middle of an epoch, the last of an epoch, the last of all."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    pretrain(command(images, tmp_path, "unbroken"))
    message = f"ended by SIGTERM with a checkpoint of step {step + 1}; --resume auto --name broken continues"
    with pytest.raises(Preempted, match=message):
        pretrain(command(images, tmp_path, "broken"), Signal(step))
    assert {number: signal.getsignal(number) for number in before} == before
    assert checkpoints(tmp_path / "broken" / "checkpoints")[0].name == f"step={step + 1}.ckpt"
    assert not (tmp_path / "broken" / "summary.json").exists(), "a run that was told to end does not take its time"
    seen = StepsSeen()
    pretrain(command(images, tmp_path, "broken", "--resume", "auto"), seen)
    assert seen.steps == list(range(step + 1, STEPS))
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_sigusr1_outside_slurm_is_a_checkpoint_and_the_run_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    pretrain(command(images, tmp_path, "unbroken"))
    pretrain(command(images, tmp_path, "x", "--checkpoint.keep", "9"), Signal(6, signal.SIGUSR1))
    names = [path.name for path in checkpoints(tmp_path / "x" / "checkpoints")]
    assert names == ["step=10.ckpt", "step=7.ckpt", "step=5.ckpt"]
    assert_same_run(tmp_path / "unbroken", tmp_path / "x")


def job_of_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    """An environment as srun makes it for one task, with a scontrol that is a shell script; returns its record."""
    record = folder / "scontrol.txt"
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nls {folder}/x/checkpoints > {record}\necho "$@" >> {record}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    for name, value in {"JOB_ID": "17", "JOB_NAME": "x", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    return record


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
@pytest.mark.parametrize("array", [False, True])
def test_sigusr1_requeues_the_job(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: bool) -> None:
    record = job_of_slurm(monkeypatch, tmp_path, "")
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Preempted, match="ended and requeued by SIGUSR1 with a checkpoint of step 7"):
        pretrain(command(images, tmp_path, "x"), Signal(6, signal.SIGUSR1))
    *there, call = record.read_text().splitlines()
    assert call == ("requeue 16_3" if array else "requeue 17")
    assert "step=7.ckpt" in there, "the job may be gone as soon as it is queued: its checkpoint lies in place before"
    assert sorted(path.name for path in (tmp_path / "x").rglob("*ckpt")) == ["last.ckpt", "step=5.ckpt", "step=7.ckpt"]


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo Access denied >&2\nexit 4", r"scontrol requeue 17 failed with status 4 \(Access denied\)"),
        (None, r"scontrol requeue 17 cannot be run \(No such file or directory\)"),
    ],
)
def test_a_requeue_that_fails(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, complaint: str
) -> None:
    job_of_slurm(monkeypatch, tmp_path, script or "")
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunFailed, match=f"the checkpoint of step 3 is written, but {complaint}; submit the job again"):
        pretrain(command(images, tmp_path, "x"), Signal(2, signal.SIGUSR1))
    assert [path.name for path in checkpoints(tmp_path / "x" / "checkpoints")] == ["step=3.ckpt"]


def signal_one_of(rank: int, world_size: int, folder: str) -> tuple[str, int]:
    """What ends the run, and the step of its newest checkpoint."""
    module = SimCLR(create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)), warmup_epochs=0)
    checkpoint = RunCheckpoint(every_n_epochs=9)
    checkpoint.folder = Path(folder)
    one = [Signal(4)] if rank == 1 else []
    strategy = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo")
    options = {"devices": world_size, "strategy": strategy, "use_distributed_sampler": False, "max_epochs": 4}
    try:
        fit(module, *one, Agreement(), Preemption("x"), checkpoint, enable_checkpointing=True, **options)
    except Preempted as error:
        return str(error), torch.load(Path(folder) / "last.ckpt", weights_only=True)["global_step"]
    return "the run went on", module.trainer.global_step


def test_one_rank_is_enough(gloo, tmp_path: Path) -> None:
    """Three steps an epoch; the second rank alone gets the signal, in the fifth step."""
    message = "ended by SIGTERM with a checkpoint of step 5; --resume auto --name x continues"
    assert gloo(2, signal_one_of, str(tmp_path)) == [(message, 5)] * 2


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "simclr_scale", "pretrain", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, sys.path)]),
        },
    )


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANGS_AFTER
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline, f"{path.name} does not come"
        time.sleep(0.01)


def assert_gone(processes: list[int]) -> None:
    """All have ended: not running, nor waiting for a parent to take note of it, but for orphans that nobody has yet."""
    deadline = time.monotonic() + HANGS_AFTER
    while left := [pid for pid in processes if state(pid) not in ("", "Z")]:
        assert time.monotonic() < deadline, f"{left} go on"
        time.sleep(0.05)


def state(pid: int) -> str:
    """The letter that the system has for it; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def family(pid: int) -> list[int]:
    return [pid, *(relative for child in children(pid) for relative in family(child))]


@pytest.mark.slow
def test_all_processes_of_two_ranks(images: Path, tmp_path: Path) -> None:
    """As a scheduler signals a job: those that read images get it too, and their run still wants their images."""
    options = (*("--data.in_memory", "false", "--data.num_workers", "1"), *("--trainer.max_epochs", "10000"))
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    run = tmp_path / "x"
    process = start(command(images, tmp_path, "x", *options, *ranks))
    try:
        wait_for(run / "checkpoints" / "step=5.ckpt", process)
        processes = family(process.pid)
        assert len(processes) >= 4, "two ranks, each with a worker"
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=HANGS_AFTER)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, errors
    [line] = errors.splitlines()
    step = checkpoints(run / "checkpoints")[0].stem.removeprefix("step=")
    assert line == (
        f"simclr-scale pretrain: ended by SIGTERM with a checkpoint of step {step}; --resume auto --name x continues"
    )
    assert_gone(processes)
