"""What a run measures of its own speed, for ``summary.json`` and ``simclr-scale report``."""

import time
from array import array
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.distributed import world
from simclr_scale.pretraining.run_folder import SummaryFacts
from simclr_scale.pretraining.strategies import gradient_bytes_of_a_number
from simclr_scale.scaling.communication import Collective, LossInput, collectives_of_a_step, mean_by_part, sent_by_part
from simclr_scale.scaling.energy import EnergyMeter
from simclr_scale.scaling.hardware import device_name, peak_memory
from simclr_scale.scaling.local_sgd import LocalSGD

_ENERGY_EVERY_SECONDS = 1.0


class ScalingRecord(SummaryFacts):
    """Times every step since this start of a run but the first, which compiles and allocates.

    A step lasts from the end of one batch to the end of the next, the wait for images included; what lies between
    epochs (a kNN score, a checkpoint) belongs to none. On CUDA it is the device's time, from events that are read once
    the device has passed them. Of several ranks the slowest counts for times and waiting, the largest for memory, and
    the sum for energy.
    """

    def __init__(self) -> None:
        self._clock: _StepClock | None = None
        self._facts: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        return {} if self._facts is None else {"scaling": self._facts}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        self._clock, self._meter, self._input = _StepClock(device), EnergyMeter(device), LossInput(pl_module.loss)
        self._joules, self._metered_steps, self._steps = 0.0, 0, 0
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self._clock is not None
        self._clock.begin(_waited(trainer))
        self._metered_at, self._reading, self._reading_steps = time.monotonic(), self._meter.joules(), self._steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        assert self._clock is not None
        self._clock.lap(_waited(trainer))
        self._steps += 1
        if trainer.is_last_batch or time.monotonic() - self._metered_at > _ENERGY_EVERY_SECONDS:
            before, steps_before = self._reading, self._reading_steps
            self._metered_at, self._reading, self._reading_steps = time.monotonic(), self._meter.joules(), self._steps
            if self._reading is not None and before is not None:
                self._joules += self._reading - before
                self._metered_steps += self._steps - steps_before

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        assert self._clock is not None
        self._input.remove()
        times, waited = self._clock.result()
        mine = {
            "mean": float(times.mean()) if len(times) else 0.0,
            "times": (len(times), *map(float, np.quantile(times, [0.5, 0.95]))) if len(times) else (0, 0.0, 0.0),
            "wait": min(1.0, waited / float(times.sum())) if len(times) else 0.0,
            "memory": peak_memory(trainer.strategy.root_device),
            "joules": self._joules if self._metered_steps else None,
        }
        everyone: list[Any] = [mine] * world().size
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine)
        self._facts = self._where(trainer, pl_module) | self._how_fast(everyone, pl_module.global_batch_size())
        self._facts |= self._communication(trainer, pl_module)

    def _where(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        data = getattr(trainer, "datamodule", None)
        return {
            "device": device_name(trainer.strategy.root_device),
            "devices": trainer.world_size,
            "nodes": trainer.num_nodes,
            "precision": str(trainer.precision),
            "encoder": getattr(getattr(pl_module.encoder, "architecture", None), "name", None),
            "image_size": data.image_size if isinstance(data, SimCLRDataModule) else None,
            "chunk_size": pl_module.chunk_size,
            "global_batch_size": pl_module.global_batch_size(),
        }

    def _how_fast(self, everyone: list[dict[str, Any]], batch: int) -> dict[str, Any]:
        slowest = max(everyone, key=lambda rank: rank["mean"])
        steps, median, p95 = slowest["times"]
        rate = batch / slowest["mean"] if steps else None
        joules = None if any(r["joules"] is None for r in everyone) else sum(r["joules"] for r in everyone)
        return {
            "steps_timed": steps,
            "step_seconds": {"mean": slowest["mean"], "median": median, "p95": p95} if steps else None,
            "images_per_second": rate,
            "views_per_second": 2 * rate if rate else None,
            "images_per_second_per_device": rate / len(everyone) if rate else None,
            "views_per_second_per_device": 2 * rate / len(everyone) if rate else None,
            "data_wait": max(rank["wait"] for rank in everyone),
            "peak_memory_bytes": max(rank["memory"] for rank in everyone),
            "peak_memory_of": "torch's allocations" if self._clock and self._clock.on_cuda else "the process",
            "joules": joules,
            "joules_per_image": joules / (self._metered_steps * batch) if joules is not None else None,
        }

    def _communication(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        if pl_module.device_mesh is not None:  # what FSDP2 and tensor parallelism send is not counted here
            return {"sent_bytes_per_step": None, "sent_bytes_by_part": None}
        ddp = isinstance(trainer.strategy, DDPStrategy)
        ordinary = self._sent(trainer, pl_module, ddp=ddp, probe=pl_module.probe)
        if ordinary is None or not self._input.rows:
            return {"sent_bytes_per_step": None, "sent_bytes_by_part": None}
        parts = mean_by_part([(1, ordinary)])
        sync = next((callback for callback in trainer.callbacks if isinstance(callback, LocalSGD)), None)
        if sync is not None:
            alone = self._sent(trainer, pl_module, ddp=False, alone=sync.negatives == "local")
            assert alone is not None
            traffic = sync.traffic
            averages = Collective("averages", "all_reduce", traffic.averaged_bytes).sent(trainer.world_size)
            each = {**alone, "averages": averages / max(1, traffic.local_steps)}
            parts = mean_by_part([(traffic.shared_steps, ordinary), (traffic.local_steps, each)])
        return {"sent_bytes_per_step": sum(parts.values()), "sent_bytes_by_part": parts}

    def _sent(self, trainer: Any, pl_module: Any, **how: Any) -> dict[str, int] | None:
        collectives = collectives_of_a_step(
            pl_module.encoder,
            pl_module.head,
            pl_module.loss,
            rows=self._input.rows,
            width=self._input.width,
            element_size=self._input.element_size,
            chunk_size=pl_module.chunk_size,
            gradient_size=gradient_bytes_of_a_number(trainer.strategy),
            stage_losses=pl_module.local,
            **how,
        )
        return None if collectives is None else sent_by_part(collectives, trainer.world_size)


class _StepClock:
    """Seconds of every step but the first, and those of them that passed waiting."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._seconds = array("d")
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = 0.0
        self._warm = False

    def begin(self, waited: float) -> None:
        """A step begins, but none has ended."""
        self._mark, self._mark_waited = self._now(), waited

    def lap(self, waited: float) -> None:
        """A step ends and the next one begins."""
        then, waited_then = self._mark, self._mark_waited
        self.begin(waited)
        if not self._warm:
            self._warm = True
            return
        self._waited += waited - waited_then
        if self.on_cuda:
            self._pending.append((then, self._mark))
            self._read(until_all=False)
        else:
            self._seconds.append(self._mark - then)

    def result(self) -> tuple[np.ndarray, float]:
        """Of each step, and of the wait in all of them."""
        self._read(until_all=True)
        return np.array(self._seconds), self._waited

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, until_all: bool) -> None:
        while self._pending and (until_all or self._pending[0][1].query()):
            start, end = self._pending.pop(0)
            end.synchronize()
            self._seconds.append(start.elapsed_time(end) / 1e3)


def _waited(trainer: Any) -> float:
    data = getattr(trainer, "datamodule", None)
    return data.wait_clock.seconds if isinstance(data, SimCLRDataModule) else 0.0
