"""A rank of a run of two processes is killed, stopped or hangs: the other ends in time and says which, and resumes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_scale.pretraining.checkpointing import checkpoints, is_intact
from tests.pretraining.runs import QUIET, arguments
from tests.pretraining.test_preemption import HANGS_AFTER, assert_gone, family, wait_for
from tests.pretraining.two_ranks import ERROR, RANKS, TORCHRUN, TwoRanks, environment, two_ranks

pytestmark = [pytest.mark.slow, QUIET]

# Half of it is the silence that ends a rank, which must outlast what two crowded cores take to set up.
TIMEOUT = 40
FROM_FILES = ("--data.in_memory", "false", "--data.num_workers", "1")
ENDLESS = ("--trainer.max_epochs", "100000", "--knn.every_n_epochs", "100000")


def command(images: Path, runs: Path, *options: str) -> list[str]:
    return arguments(images, runs, "x", *RANKS, *FROM_FILES, "--timeout", str(TIMEOUT), *options)


def assert_resumes(images: Path, runs: Path) -> None:
    """Until two epochs after the newest checkpoint, on the same two processes."""
    newest = checkpoints(runs / "x" / "checkpoints")[0]
    assert is_intact(newest)
    epoch = int(newest.stem.removeprefix("step=")) // 5
    options = ("--resume", "auto", "--override", "true", "--trainer.max_epochs", str(epoch + 2))
    done = subprocess.run(
        [sys.executable, "-m", "simclr_scale", "pretrain", *command(images, runs, *options)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert checkpoints(runs / "x" / "checkpoints")[0].name == f"step={5 * (epoch + 2)}.ckpt"


def damaged(run: TwoRanks, number: signal.Signals, rank: int, runs: Path) -> tuple[int, str, int]:
    """Exit status, the one line, and the pid of the rank that was sent the signal."""
    run.reach(runs / "x" / "checkpoints" / "step=5.ckpt")
    pid = run.rank(rank)
    os.kill(pid, number)
    status, lines = run.end()
    [line] = lines
    return status, line.removeprefix(ERROR), pid


def test_a_rank_that_is_killed(images: Path, tmp_path: Path) -> None:
    with two_ranks(command(images, tmp_path, *ENDLESS)) as run:
        status, line, pid = damaged(run, signal.SIGKILL, 1, tmp_path)
    assert status == 1
    assert re.fullmatch(
        rf"rank 1 of 2 \(\S+, process {pid}\) is gone: it was killed \(SIGKILL\), in step \d+ \(.+\); "
        "--resume auto --name x continues from the last checkpoint",
        line,
    )


@pytest.mark.parametrize(
    ("number", "rank", "launcher"),
    [
        pytest.param(signal.SIGKILL, 0, (), id="killed 0"),
        pytest.param(signal.SIGKILL, 1, TORCHRUN, id="killed 1, torchrun"),
        pytest.param(signal.SIGSTOP, 1, (), id="stopped 1"),
        pytest.param(signal.SIGSTOP, 0, TORCHRUN, id="stopped 0, torchrun"),
    ],
)
def test_the_other_one_says_which(
    images: Path, tmp_path: Path, number: signal.Signals, rank: int, launcher: tuple[str, ...]
) -> None:
    with two_ranks(command(images, tmp_path, *ENDLESS), launcher) as run:
        status, line, pid = damaged(run, number, rank, tmp_path)
    # The shell waits for the first rank, where no launcher stands between; stopped, it is killed by the second.
    assert status == (1 if launcher or rank else -signal.SIGKILL)
    what = "is gone: it was killed" if number == signal.SIGKILL else r"has been silent for \d+ s: it is stopped"
    assert re.match(rf"rank {rank} of 2 \(\S+, process {pid}\) {what}", line)
    assert re.search(r"step \d+ \(.+\)(?:;|, )", line)
    assert line.endswith("--resume auto --name x continues from the last checkpoint")
    assert_resumes(images, tmp_path)


def test_a_rank_that_is_killed_at_its_start(images: Path, tmp_path: Path) -> None:
    """Before the ranks have met, and so before any heartbeat."""
    with two_ranks(command(images, tmp_path, *ENDLESS)) as run:
        pid = run.wait_for_rank(1)
        os.kill(pid, signal.SIGKILL)
        status, lines = run.end()
    assert status == 1
    assert lines == [
        f"{ERROR}rank 1 of 2 (process {pid}) was killed (SIGKILL) at its start; --resume auto --name x continues from "
        "the last checkpoint"
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_beats_and_hangs(images: Path, tmp_path: Path, rank: int) -> None:
    """Its images do not come: the process that reads them is stopped, as by a file system that does not answer."""
    with two_ranks(command(images, tmp_path, *ENDLESS)) as run:
        run.reach(tmp_path / "x" / "checkpoints" / "step=5.ckpt")
        [worker] = run.workers(rank)
        pid = run.rank(rank)
        os.kill(worker, signal.SIGSTOP)
        status, lines = run.end()
    [line] = lines
    assert status == 1
    assert re.match(
        rf"{ERROR}rank {rank} of 2 \(\S+, process {pid}\) hangs: for \d+ s it has stood in step \d+ "
        r"\(waiting for images\) while the others wait; --resume auto",
        line,
    )
    assert_resumes(images, tmp_path)


def test_the_end_does_not_depend_on_anybody_who_reads_the_line(images: Path, tmp_path: Path) -> None:
    with two_ranks(command(images, tmp_path, *ENDLESS)) as run:
        run.reach(tmp_path / "x" / "checkpoints" / "step=5.ckpt")
        assert run.process.stderr is not None
        run.process.stderr.close()
        os.kill(run.rank(0), signal.SIGKILL)
        assert run.process.wait(HANGS_AFTER) == -signal.SIGKILL


def test_a_suspended_job_goes_on(images: Path, tmp_path: Path) -> None:
    """All its processes are stopped for longer than a rank may be silent or stand still."""
    epochs = ("--trainer.max_epochs", "30", "--knn.every_n_epochs", "100")
    with two_ranks(command(images, tmp_path, *epochs)) as run:
        run.reach(tmp_path / "x" / "checkpoints" / "step=5.ckpt")
        os.killpg(run.process.pid, signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(1.5 * TIMEOUT)
        os.killpg(run.process.pid, signal.SIGCONT)
        status, lines = run.end()
    assert (status, lines) == (0, [])
    assert (tmp_path / "x" / "summary.json").is_file()


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["own launcher", "torchrun"])
def test_an_error_on_all_ranks_is_told_once(images: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """The first rank is not killed by the fate of the second before it has said why."""
    with two_ranks(command(images, tmp_path, *ENDLESS), launcher) as run:
        folder = tmp_path / "x" / "checkpoints"
        run.reach(folder / "step=5.ckpt")
        shutil.move(folder, tmp_path / "elsewhere")
        folder.write_text("")
        status, lines = run.end()
    [line] = lines
    assert status == 1
    assert re.match(rf"{ERROR}the checkpoint of step \d+ cannot be written to {folder}: (File exists|Not a dir)", line)


def test_an_error_on_one_rank_ends_the_others(images: Path, tmp_path: Path) -> None:
    with two_ranks(command(images, tmp_path, *ENDLESS)) as run:
        run.reach(tmp_path / "x" / "checkpoints" / "step=5.ckpt")
        [worker] = run.workers(1)
        os.kill(worker, signal.SIGKILL)
        status, lines = run.end()
    assert status == 1
    assert any(re.search(rf"a process that reads images \(pid {worker}\) (was killed|is gone)", line) for line in lines)
    assert all("--resume auto --name x continues from the last checkpoint" in line for line in lines)


def task_of_slurm(rank: int, arguments: list[str], port: int) -> "subprocess.Popen[str]":
    """As srun starts it."""
    of_slurm = {"JOB_ID": "17", "JOB_NAME": "x", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
    of_slurm |= {"PROCID": str(rank), "LOCALID": str(rank), "NODEID": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "simclr_scale", "pretrain", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **meeting, **{f"SLURM_{name}": value for name, value in of_slurm.items()}},
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_under_slurm(images: Path, tmp_path: Path, rank: int) -> None:
    """The first rank hosts the store, and no process of ours stands above the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = [task_of_slurm(task, command(images, tmp_path, *ENDLESS), port) for task in (0, 1)]
    try:
        wait_for(tmp_path / "x" / "checkpoints" / "step=5.ckpt", tasks[0])
        everybody = [pid for task in tasks for pid in family(task.pid)]
        tasks[rank].kill()
        _, errors = tasks[1 - rank].communicate(timeout=HANGS_AFTER)
        tasks[rank].communicate(timeout=HANGS_AFTER)
        assert_gone(everybody)
    finally:
        for task in tasks:
            task.kill()
    assert tasks[1 - rank].returncode == 1
    [line] = [line for line in errors.splitlines() if line.startswith(ERROR)]
    assert re.match(rf"{ERROR}rank {rank} of 2 \(\S+, process {tasks[rank].pid}\) is gone: it was killed", line)
