"""The time of a few real steps on this machine."""

import copy
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from simclr_scale.models.chunked import encode_in_chunks
from simclr_scale.optim import LARS, param_groups
from simclr_scale.scaling.plan.footprint import AUTOCAST, WEIGHTS


def seconds_of_a_step(
    model: Any, rows: int, image: tuple[int, int, int], precision: str, device: torch.device, steps: int
) -> float:
    """Median of some steps after one that is not counted: forward, loss, backward and optimizer, on noise.

    One process with all its rows: reading of images and talk between ranks are not in it.

    Args:
        model: a ``SimCLR``, of which a copy is trained.
        rows: views, at least 4.
        image: (channels, height, width).
    """
    parts = nn.ModuleDict({"encoder": copy.deepcopy(model.encoder), "head": copy.deepcopy(model.head)})
    parts.to(device, WEIGHTS.get(precision, torch.float32)).train()
    optimizer = (model._optimizer or LARS)(param_groups(parts, model.weight_decay), 1e-4)
    memory_format = torch.channels_last if model.channels_last else torch.preserve_format
    dtype = AUTOCAST.get(precision)
    chunk = model.chunk_size
    x = torch.rand(rows, *image, device=device, dtype=WEIGHTS.get(precision, torch.float32))
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext():
            if chunk is not None and chunk < rows:
                h = encode_in_chunks(parts["encoder"], x, chunk, memory_format)
            else:
                h = parts["encoder"](x.to(memory_format=memory_format))
            value = model.loss(parts["head"](h))
        value.backward()
        optimizer.step()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
