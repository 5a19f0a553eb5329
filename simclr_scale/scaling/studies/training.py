"""One cell's training, in the trainer that every run has, and what its encoder is worth."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import Source
from simclr_scale.data.views import finish_views
from simclr_scale.errors import InputError
from simclr_scale.evaluation import extract_features, image_loader, linear_probe
from simclr_scale.losses import GroupedNegatives
from simclr_scale.pretraining.knn_monitor import labelled_images
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.scaling.noise_scale.gradients import unchanged_buffers
from simclr_scale.scaling.studies.cells import Cell

# Of the linear classifier, the same for every cell: choosing it for each would cost more than the training.
_L2 = 1e-4
_VIEWS_AT_ONCE = 512


class Diverged(Exception):
    """The loss is no number any more, which is a result."""


class StopWhereDiverged(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not math.isfinite(float(loss)):
            raise Diverged


@dataclass
class CellTraining:
    """What all cells of a study share.

    Attributes:
        data: set up; its images serve every cell.
        build: makes the model of a cell.
        trainer: arguments of the Trainer.
        train_images, test_images: at most, of the linear evaluation; 0 test images: none.
        held_out: images of which the loss at fixed negatives is the mean.
        fixed_negatives: images of a group in that loss.
    """

    data: SimCLRDataModule
    build: Callable[[Cell], SimCLR]
    trainer: dict[str, Any] = field(default_factory=dict)
    train_images: int = 5000
    test_images: int = 5000
    held_out: int = 1024
    fixed_negatives: int = 64

    def train(self, cell: Cell, *callbacks: pl.Callback, **trainer: Any) -> tuple[SimCLR, dict[str, Any]]:
        """The trained model, and facts for the cell's file."""
        model = self.build(cell)
        data = self.data.varied(seed=cell.seed, global_batch_size=cell.batch)
        if cell.negatives != cell.batch:
            model.loss = GroupedNegatives(model.loss, cell.negatives)
        arguments = {**self.trainer, "devices": _own_device(self.trainer.get("accelerator")), **trainer}
        arguments |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        arguments |= {"enable_model_summary": False, "callbacks": [StopWhereDiverged(), *callbacks]}
        started = time.monotonic()
        run, diverged = pl.Trainer(**arguments), False
        try:
            run.fit(model, datamodule=data)
        except Diverged:
            diverged = True
        facts = {"steps": run.global_step, "images": run.global_step * cell.batch, "diverged": diverged}
        return model, facts | {"seconds": round(time.monotonic() - started, 1)}

    def linear_accuracy(self, model: SimCLR) -> float | None:
        """Top-1 on held-out images of a linear classifier on the frozen features; None where no labels are held out."""
        data, parts = self.data, []
        if not self.test_images or data.test_source is None:
            return None
        for source, limit in ((data.train_source, self.train_images), (data.test_source, self.test_images)):
            assert source is not None
            assert model.transform is not None
            loader = image_loader(source, model.transform, indices=labelled_images(source, limit))
            parts.append(extract_features(model.encoder, loader, unreadable={})[:2])
        (train, train_labels), (test, test_labels) = parts
        # Features of unit mean square, so that one penalty fits encoders of any scale.
        scale = train.square().mean().sqrt().clamp_min(1e-12)
        return linear_probe(train / scale, train_labels, test / scale, test_labels, l2=_L2).test_accuracy

    def held_out_views(self) -> list[Tensor]:
        """Views of held-out images (of training images, where none are held out), the same for every cell."""
        source = self.data.test_source or self.data.train_source
        assert source is not None
        return list(fixed_views(self.data, source, self.held_out, self.fixed_negatives))


def fixed_views(data: SimCLRDataModule, source: Source, images: int, group: int) -> Sequence[Tensor]:
    """Batches (2m, C, H, W) of whole groups, drawn once, evenly from the source."""
    if len(source) < group:
        raise InputError(
            f"the loss at fixed negatives needs {group} held-out images, and {source.name} has {len(source)}"
        )
    images = min(images, len(source)) // group * group
    chosen = np.linspace(0, len(source) - 1, images).round().astype(int)
    # Neighbours in a folder are of one class: each group takes images from all over the set.
    groups = chosen.reshape(group, -1).T
    dataset = data.views_of(source)
    batches = []
    for number, indices in enumerate(groups):
        batch = dataset.__getitems__([Key(0, int(index), number) for index in indices])
        batches.append(finish_views(batch, data.augmentation, data.image_size)["inputs"])
    return batches


@torch.no_grad()
def loss_at_fixed_negatives(model: SimCLR, views: Sequence[Tensor]) -> float:
    """Mean loss over groups of held-out views: a task that is the same for every batch size, at every step.

    Training losses of two batch sizes cannot be compared: they grow with the logarithm of the negatives. Batch norm has
    the statistics of the held-out views, of a fixed number at a time: running ones would be behind after few steps.

    Args:
        views: each (2m, C, H, W), [first views; second views] of m images.
    """
    loss = model.loss.whole if isinstance(model.loss, GroupedNegatives) else model.loss
    rows, together = len(views[0]), max(1, _VIEWS_AT_ONCE // len(views[0]))
    with _batch_norm_alone(model), unchanged_buffers(model):
        total = 0.0
        for start in range(0, len(views), together):
            z = model.head(model(torch.cat(list(views[start : start + together])).to(model.device)))
            total += sum(float(loss(part)) for part in z.split(rows))
    return total / len(views)


@contextmanager
def _batch_norm_alone(model: nn.Module) -> Iterator[None]:
    """Within: batch norm as in training, all else (dropout) as in evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _own_device(accelerator: object) -> Any:
    """One device: of several workers of a study on a machine with GPUs, each takes its own in turn."""
    gpus = torch.cuda.device_count() if accelerator != "cpu" else 0
    return [int(os.environ.get("SIMCLR_SCALE_WORKER", "0")) % gpus] if gpus > 1 else 1
