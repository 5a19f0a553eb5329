"""Small training runs in this process: a folder of images, the command line, and a plain Trainer."""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from simclr_scale import load_encoder
from simclr_scale.cli.pretrain import main

CLASSES = 3
STEPS_AN_EPOCH = 5

# What Lightning says to its own developers, and its guess that a data module of ours cannot resume.
QUIET = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:.*does not have many workers",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)


def write_classes(root: Path) -> Path:
    """16 px images in train/ (42) and test/ (18), by class; the class shows in the colour, through a lot of noise."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 14, "test": 6}.items():
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3))
                pixels[..., label] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


class Killed(Exception):
    """Stands for whatever ends a process."""


class KillAt(pl.Callback):
    """Ends a run when a step is about to start, the data of which are there already."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class StopAfter(pl.Callback):
    """Ends a run as a time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class StepsSeen(pl.Callback):
    """Records at which steps a run was."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.global_step)


def arguments(images: Path, runs: Path, name: str, *options: str) -> list[str]:
    """A run of five steps an epoch, of a tiny encoder on the images of :func:`write_classes`."""
    return [
        *("--runs_dir", str(runs), "--name", name),
        *("--model.encoder", "simclr_scale.models.create_encoder", "--model.encoder.name", "simclr_resnet_tiny"),
        *("--model.encoder.channels", "[4, 6, 8]", "--model.warmup_epochs", "1"),
        *("--data.source", str(images), "--data.global_batch_size", "8", "--knn.k", "5"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.log_every_n_steps", "2"),
        *options,
    ]


def pretrain(arguments: list[str], *callbacks: pl.Callback) -> None:
    """``simclr-scale pretrain``, with further callbacks that its configuration does not show."""
    fit = pl.Trainer.fit

    def fit_with_callbacks(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.callbacks = [*callbacks, *trainer.callbacks]  # type: ignore[attr-defined]
        fit(trainer, *args, **kwargs)

    with mock.patch.dict(os.environ), mock.patch.object(pl.Trainer, "fit", fit_with_callbacks):
        main(arguments)


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures of tensors and values are not equal, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}[{i}]")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, to the last digit, but for the one column that is a matter of time."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("data_wait")
    return rows


def assert_same_run(a: Path, b: Path) -> None:
    before, after = last_checkpoint(a), last_checkpoint(b)
    assert before["global_step"] > 0
    for checkpoint in (before, after):
        assert checkpoint["callbacks"]["RunFolder"].pop("seconds") > 0
        waited = checkpoint["callbacks"].pop("DataWait")
        assert 0 <= waited["waited"] <= waited["seconds"]
    assert differences(before, after) == []
    assert metrics(a) == metrics(b)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    for summary in summaries:
        summary.pop("seconds")
        # Of the last start alone, which may have less to time, or, once the run is whole, nothing.
        summary.pop("scaling", None)
        assert 0 <= summary.pop("data_wait") <= 1
    assert summaries[0] == summaries[1]
    assert differences(load_encoder(a)[0].state_dict(), load_encoder(b)[0].state_dict()) == []


class Pairs(Dataset[Any]):
    """Somebody else's data set: ((view1, view2), label)."""

    def __init__(self, count: int = 24, size: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.views = torch.rand(2, count, 3, size, size, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return (self.views[0, index], self.views[1, index]), self.labels[index]


def fit(module: pl.LightningModule, *callbacks: pl.Callback, data: Iterable[Any] | None = None, **options: Any) -> Any:
    """A plain Trainer on a plain DataLoader; returns the trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )
    loader = DataLoader(Pairs(), batch_size=8) if data is None else data
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer
