"""The noise scale at the saved weights of a run."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.distributed import convert_global_batch_norm, world
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.scaling.noise_scale import measuring
from simclr_scale.scaling.noise_scale.callback import contrastive_loss
from simclr_scale.scaling.noise_scale.estimates import NoiseScale
from simclr_scale.scaling.noise_scale.gradients import mean_over_ranks, own_gradient, trained_parameters


@dataclass(frozen=True)
class Measurement:
    """How to measure.

    Attributes:
        mode: "probe", "jackknife" or "per_rank".
        batch: images of a global batch.
        batches: independent ones.
        parts: of a batch, which the jackknife leaves out in turn.
        draw: another number measures on other batches.
        bfloat16: compute as a run with ``bf16-mixed`` does.
    """

    mode: measuring.Mode
    batch: int
    batches: int
    parts: int = 8
    draw: int = 0
    bfloat16: bool = False


def measure(model: SimCLR, data: SimCLRDataModule, how: Measurement, device: torch.device) -> NoiseScale:
    """The noise scale of a model as it is, on its data; every rank gets the same. Changes running statistics."""
    if world().size > 1:
        convert_global_batch_norm(model.encoder)
        convert_global_batch_norm(model.head)
    model.to(device).train()
    parameters = trained_parameters(model)

    def own(views: Tensor) -> Tensor:
        def loss() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=how.bfloat16):
                return contrastive_loss(model, views)

        return own_gradient(loss, parameters)

    def over_ranks(views: Tensor) -> Tensor:
        return mean_over_ranks(own(views))

    batches = measuring.independent_batches(data, how.batch, how.batches, device, draw=how.draw)
    if how.mode == "per_rank":
        return measuring.per_rank(own, batches, how.batch)
    way: Any = measuring.probe if how.mode == "probe" else partial(measuring.jackknife, parts=how.parts)
    return way(over_ranks, batches, how.batch)
