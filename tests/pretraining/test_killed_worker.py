"""A process that reads images is killed in mid-run, as the system does when memory runs out."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.damaged import write_photographs
from tests.pretraining.runs import arguments

_CHECKOUT = Path(__file__).parents[2]
_HANGS_AFTER = 600.0


def children(pid: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listing.split()]


def commands(pid: int) -> str:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout


@pytest.mark.slow
def test_one_line_and_no_hang(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "images", 32, size=(120, 160))
    run = tmp_path / "x"
    options = ("--data.num_workers", "2", "--data.image_size", "16", "--trainer.max_epochs", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "simclr_scale", "pretrain", *arguments(images, tmp_path, "x", *options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_CHECKOUT), *filter(None, sys.path)])},
    )
    try:
        deadline = time.monotonic() + _HANGS_AFTER
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "the run does not begin"
            time.sleep(0.05)
        workers = [pid for pid in children(process.pid) if "resource_tracker" not in commands(pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=_HANGS_AFTER)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    [line] = errors.splitlines()
    assert line.startswith("simclr-scale pretrain: error: a process that reads images (pid ")
    # Torch learns of it by the signal of a child's death, or finds later that the process is not there.
    assert re.search(rf"\(pid {workers[0]}\) (was killed by the system \(signal: Killed\)|is gone); most likely", line)
    assert "--data.num_workers" in line
    assert line.endswith("--resume auto --name x continues from the last checkpoint")
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    # What was logged is whole.
    with open(run / "metrics.csv", newline="") as file:
        assert all(row["step"].isdigit() for row in csv.DictReader(file))
