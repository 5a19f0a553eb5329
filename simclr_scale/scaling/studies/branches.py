"""A checkpoint's training taken up with another batch and rate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from simclr_scale.errors import InputError
from simclr_scale.scaling.plan.optimizers import is_adaptive
from simclr_scale.scaling.studies.cells import Cell
from simclr_scale.scaling.studies.training import loss_at_fixed_negatives


class BranchFrom(pl.Callback):
    """The optimizer goes on with the checkpoint's state, at a constant rate of its own.

    Args:
        optimizer_state: as the checkpoint has it.
        rate: of all parameters, from the first step to the last.
    """

    def __init__(self, optimizer_state: Mapping[str, Any], rate: float) -> None:
        self.optimizer_state, self.rate = optimizer_state, rate

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        try:
            optimizer.load_state_dict(dict(self.optimizer_state))
        except (KeyError, ValueError) as error:
            raise InputError(f"the checkpoint's optimizer does not fit the run's configuration: {error}") from error
        for config in trainer.lr_scheduler_configs:
            config.scheduler = _Constant()  # type: ignore[assignment]
        for group in optimizer.param_groups:
            group["lr"] = self.rate


class _Constant:
    """A schedule that leaves the rate where it is."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {}


class LossCurve(pl.Callback):
    """The loss at fixed negatives, before the first step and whenever another ``every`` images have been trained on.

    Args:
        views: held-out views, as ``loss_at_fixed_negatives`` takes them.
        every: images from one value to the next; a larger batch has a value a step.
        batch: images of a step.
    """

    def __init__(self, views: Sequence[Tensor], every: int, batch: int) -> None:
        self.views, self.every, self.batch = views, every, batch
        self.points: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        images = trainer.global_step * self.batch
        if images // self.every > (images - self.batch) // self.every or trainer.global_step == trainer.max_steps:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, module: Any) -> None:
        step = trainer.global_step
        value = loss_at_fixed_negatives(module, self.views)
        # A loss that is no number stops training by itself.
        if math.isfinite(value):
            self.points.append({"step": step, "images": step * self.batch, "loss": value})


def branch_cells(
    batches: Sequence[int],
    negatives: Sequence[int],
    seeds: Sequence[int],
    rate: float,
    own_batch: int,
    rule: str,
) -> list[Cell]:
    """Every batch of whole groups, seed by seed; the rate follows the batch by a rule from the run's own.

    Raises:
        InputError: a batch is neither smaller than a group nor whole groups, or nothing is left.
    """
    pairs = []
    for images in negatives:
        for batch in batches:
            if batch > images and batch % images:
                raise InputError(f"--batch_sizes: {batch} does not divide into groups of {images} images (--negatives)")
            if batch >= images:
                pairs.append((batch, images))
    for images in negatives:
        own = [batch for batch, of in pairs if of == images]
        if len(own) < 2:
            raise InputError(
                f"--negatives: groups of {images} images leave {len(own)} of the batch sizes, and comparing needs 2"
            )
    power = 1.0 if rule == "linear" else 0.5
    return [
        Cell(batch, images, rate * (batch / own_batch) ** power, seed, rule)
        for seed in seeds
        for batch, images in pairs
    ]


def rate_and_state(checkpoint: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]]:
    """The learning rate at which a checkpoint was written, and its optimizer's state."""
    try:
        state = checkpoint["optimizer_states"][0]
        return float(state["param_groups"][0]["lr"]), state
    except (KeyError, IndexError, TypeError) as error:
        raise InputError("the checkpoint has no state of an optimizer: it cannot be branched") from error


def default_rule(optimizer: Optimizer) -> str:
    """Square root for optimizers that divide by the gradient's size (Malladi et al. 2022), linear for the others."""
    return "sqrt" if is_adaptive(optimizer) else "linear"
