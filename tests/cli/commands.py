"""Running commands, in this process and in others, and what they leave behind."""

import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from simclr_scale.cli import main

CHECKOUT = Path(__file__).parents[2]

# quickstart, shortened to a few seconds
SHORT = [
    "pretrain",
    "--config=quickstart",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=3",
    "--trainer.log_every_n_steps=1",
    "--data.global_batch_size=16",
    "--knn.max_train_images=200",
    "--checkpoint.every_n_epochs=1",
]


class Outcome(NamedTuple):
    """Of a command: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


class TrainedRun(NamedTuple):
    """Of a run that was trained in full: its folder and what it printed."""

    folder: Path
    printed: str


def run_command(capture: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """A command in this process."""
    capture.readouterr()
    status = main([str(argument) for argument in arguments])
    return Outcome(status, *capture.readouterr())


def start_command(*arguments: object, cwd: Path, ranks: int = 1, **environment: str) -> Outcome:
    """``python -m simclr_scale`` in a process of its own, or in as many as `ranks` by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "simclr_scale", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def train(folder: Path, *arguments: str) -> TrainedRun:
    """A short run below ``folder``, in this process."""
    with redirect_stdout(StringIO()) as printed:
        status = main([*SHORT, "--runs_dir", str(folder / "runs"), "--name", "x", *arguments])
    assert status == 0
    return TrainedRun(folder / "runs" / "x", printed.getvalue())


def files_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of the last change of every file, and every folder, below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def write_images(folder: Path, *classes: str, count: int = 12, size: int = 20) -> Path:
    """Noise around a colour of its own for each class, in sub-folders; without classes, in the folder itself."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes or ("",)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 120, (size, size, 3))
            pixels[..., number % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder
