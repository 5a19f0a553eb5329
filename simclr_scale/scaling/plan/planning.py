"""The plan: memory, steps, rates and times of a training, from its settings."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from simclr_scale.errors import InputError
from simclr_scale.optim import scaled_learning_rate
from simclr_scale.scaling.communication import collectives_of_a_step, sent_by_part
from simclr_scale.scaling.hardware import device_name
from simclr_scale.scaling.plan.chunks import largest_chunk
from simclr_scale.scaling.plan.footprint import AUTOCAST, Network, gathered_bytes
from simclr_scale.scaling.plan.measuring import seconds_of_a_step
from simclr_scale.scaling.plan.mistakes import refuse_mistakes
from simclr_scale.scaling.plan.optimizers import make_on_a_small_layer, state_of_a_byte

# ResNet-50, batch 4096, 31,279 steps (100 epochs of ImageNet) on 128 TPU v3 cores in 1.5 h.
HEADLINE_DEVICES = 128
HEADLINE_IMAGES_PER_SECOND = 4096 * 31_279 / 5400

# Of the device's memory, for what is not torch's own: the context, workspaces, gaps between allocations.
SPARE = 0.1
_FLOPS_MEASURED = {"cpu": 5e11}


@dataclass(frozen=True)
class Settings:
    """Where and for how long a model is to be trained.

    Attributes:
        train_images: of an epoch.
        image: (channels, height, width) of a view.
        global_batch_size: images in a step over all ranks.
        ranks: devices on all machines.
        epochs: to train; None where ``max_steps`` ends it.
        max_steps: where training ends first; -1: after the epochs.
        precision: as Lightning's Trainer takes it.
        device_memory: bytes of one device.
        default_rate: whether nobody gave a base learning rate.
        steps_of_an_epoch: where a limit makes them fewer than the whole batches.
    """

    train_images: int
    image: tuple[int, int, int]
    global_batch_size: int
    ranks: int
    epochs: int | None
    max_steps: int
    precision: str
    device_memory: int
    default_rate: bool = False
    steps_of_an_epoch: int | None = None


@dataclass(frozen=True)
class Plan:
    """All figures of a plan; see the guide for what each means.

    Memory is in bytes of one rank, communication in bytes that leave one rank in a step, times in seconds.
    """

    device: str
    ranks: int
    parameters: int
    images_of_a_rank: int
    memory: dict[str, int]
    peak_bytes: int
    device_bytes: int
    fits: bool
    chunk_size: int | None
    largest_chunk: int | None
    negatives: int
    steps_an_epoch: int
    steps: int
    warmup_steps: int
    learning_rate: float
    flops_of_a_step: int
    sent_bytes_per_step: int | None
    measured_images: int | None
    seconds_per_step: float | None
    seconds_per_epoch: float | None
    seconds: float | None
    images_per_second: float | None
    images_per_second_per_device: float | None
    headline_images_per_second: float
    headline_per_device: float
    headline_seconds: float
    headline_flops_per_device: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def make_plan(model: Any, settings: Settings, *, device: torch.device, measure_steps: int = 0) -> Plan:
    """Plans the training of a ``SimCLR``; nothing is trained but ``measure_steps`` steps of a copy on this device.

    Raises:
        InputError: a mistake that `refuse_mistakes` knows, or training without an end.
    """
    batch, ranks = settings.global_batch_size, settings.ranks
    an_epoch = settings.steps_of_an_epoch or settings.train_images // batch
    steps = an_epoch * settings.epochs if settings.epochs is not None else settings.max_steps
    if settings.max_steps >= 0:
        steps = min(steps, settings.max_steps)
    if steps < 0:
        raise InputError("training has no end: give --trainer.max_epochs or --trainer.max_steps")
    warmup = round(model.warmup_epochs * an_epoch)
    rate = scaled_learning_rate(model.base_learning_rate, batch, model.lr_scaling)
    optimizer = make_on_a_small_layer(model._optimizer, rate)
    refuse_mistakes(
        global_batch_size=batch,
        train_images=settings.train_images,
        ranks=ranks,
        loss=model.loss,
        optimizer=optimizer,
        learning_rate=rate,
        default_rate=settings.default_rate,
        warmup_steps=warmup,
        total_steps=steps,
    )

    network = _network(model, settings)
    rows = 2 * batch // ranks
    width = network.width()
    element_size = 2 if settings.precision in AUTOCAST else network.weights.itemsize
    fixed = {
        "weights": network.weight_bytes(),
        "optimizer state": round(state_of_a_byte(optimizer) * network.gradient_bytes()),
        "images": network.image_bytes(rows),
    }
    if ranks > 1:
        fixed["gradient buckets of DDP"] = network.gradient_bytes()
        fixed["rows of other ranks"] = gathered_bytes(model.loss, rows, ranks, width, element_size)
    peak = network.peak(rows, model.chunk_size)
    usable = int((1 - SPARE) * settings.device_memory)
    largest = largest_chunk(network, rows, usable - sum(fixed.values()))
    memory = fixed | {
        "gradients": network.gradient_bytes(),
        "loss": peak.loss,
        "activations": max(0, peak.step - peak.loss),
    }
    flops = network.flops(rows, model.chunk_size)
    total = sum(fixed.values()) + peak.step

    seconds, measured_rows = None, None
    if measure_steps:
        measured_rows = _rows_to_measure(flops, rows, total, device)
        of_those = seconds_of_a_step(model, measured_rows, settings.image, settings.precision, device, measure_steps)
        seconds = of_those * rows / measured_rows
    collectives = collectives_of_a_step(
        model.encoder,
        model.head,
        model.loss,
        rows=rows,
        width=width,
        element_size=element_size,
        chunk_size=model.chunk_size,
    )
    per_image = flops / (rows / 2)
    return Plan(
        device=device_name(device),
        ranks=ranks,
        parameters=sum(p.numel() for part in (model.encoder, model.head) for p in part.parameters()),
        images_of_a_rank=rows // 2,
        memory=memory,
        peak_bytes=total,
        device_bytes=settings.device_memory,
        fits=total <= usable,
        chunk_size=model.chunk_size,
        largest_chunk=largest,
        negatives=2 * batch - 2 if getattr(model.loss, "gather", True) else rows - 2,
        steps_an_epoch=an_epoch,
        steps=steps,
        warmup_steps=warmup,
        learning_rate=rate,
        flops_of_a_step=flops,
        sent_bytes_per_step=None if collectives is None else sum(sent_by_part(collectives, ranks).values()),
        measured_images=measured_rows // 2 if measured_rows else None,
        seconds_per_step=seconds,
        seconds_per_epoch=seconds * an_epoch if seconds else None,
        seconds=seconds * steps if seconds else None,
        images_per_second=batch / seconds if seconds else None,
        images_per_second_per_device=batch / seconds / ranks if seconds else None,
        headline_images_per_second=HEADLINE_IMAGES_PER_SECOND,
        headline_per_device=HEADLINE_IMAGES_PER_SECOND / HEADLINE_DEVICES,
        headline_seconds=steps * batch / HEADLINE_IMAGES_PER_SECOND,
        headline_flops_per_device=per_image * HEADLINE_IMAGES_PER_SECOND / HEADLINE_DEVICES,
    )


def _network(model: Any, settings: Settings) -> Network:
    return Network(
        model.encoder,
        model.head,
        model.loss,
        image=settings.image,
        precision=settings.precision,
        channels_last=model.channels_last,
    )


def _rows_to_measure(flops: int, rows: int, peak: int, device: torch.device) -> int:
    """As many of a rank's as this machine holds and does in bearable time; time is nearly proportional to them."""
    from simclr_scale.scaling.hardware import memory_of

    share = min(1.0, 0.5 * memory_of(device) / peak, _FLOPS_MEASURED.get(device.type, math.inf) / flops)
    return min(rows, max(8, 2 * round(rows * share / 2)))
