"""The noise scale of a training, while it trains."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.pretraining.run_folder import SummaryFacts
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.scaling.noise_scale import measuring
from simclr_scale.scaling.noise_scale.estimates import NoiseScale, per_rank_estimate
from simclr_scale.scaling.noise_scale.gradients import (
    mean_over_ranks,
    own_gradient,
    trained_parameters,
    unchanged_buffers,
    unchanged_random_state,
)

LossOf = Callable[[Any, Any], Tensor]


def contrastive_loss(module: Any, batch: Any) -> Tensor:
    """Of a :class:`SimCLR` on a batch of the data module, of stacked views, or of ``((view1, view2), label)``."""
    if isinstance(batch, Tensor):
        views = batch
    elif isinstance(batch, dict):
        views = batch["inputs"]
    else:
        views = torch.cat(list(batch[0]))
    return module.loss(module.head(module(views)))


class GradientNoiseScale(SummaryFacts):
    """Logs the gradient noise scale (McCandlish et al. 2018) every so many steps, and leaves no trace in training.

    - "probe": the gradients of ``batches`` independent global batches at the weights of that moment. Right for every
      loss; costs as many steps as it has batches.
    - "jackknife": one global batch, and that batch without each of ``batches`` parts in turn.
    - "per_rank": the gradients of the ranks in every step, and their mean. Free, but right only where the loss is a
      mean over ranks of what each computes alone (a classifier, or ``gather=False``); refused for NT-Xent with
      negatives from all ranks, unless forced.

    Logged are ``noise_scale`` (B_simple, in images), ``noise_scale_signal`` (|G|^2) and ``noise_scale_noise`` (S): the
    two parts smoothed apart over measurements, then divided. B_simple is left out while |G|^2 cannot be told from 0.

    Args:
        mode: how to measure.
        every_n_steps: steps from one measurement to the next (of per_rank: to the next line in the log).
        batches: n of the probe, or the parts of the jackknife.
        smoothing: weight of what was measured before in the moving average, from 0 (none) to below 1; of per_rank, from
            step to step.
        force: measure per rank although the loss forbids it.
        loss_of: (module, batch) -> the loss; None: that of :class:`SimCLR`. Another module has to give it for the modes
            probe and jackknife; its batches are then those of the training loader.
    """

    def __init__(
        self,
        mode: measuring.Mode = "probe",
        every_n_steps: int = 100,
        batches: int = 8,
        smoothing: float = 0.5,
        force: bool = False,
        loss_of: LossOf | None = None,
    ) -> None:
        measuring.check_mode(mode, None)
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("batches", batches, 2)):
            if value < least:
                raise InputError(f"GradientNoiseScale: {name} must be at least {least}, got {value}")
        if not 0 <= smoothing < 1:
            raise InputError(f"GradientNoiseScale: smoothing must be from 0 to below 1, got {smoothing}")
        self.mode, self.every_n_steps, self.batches, self.smoothing = mode, every_n_steps, batches, smoothing
        self.force, self.loss_of = force, loss_of
        self.history: list[dict[str, Any]] = []
        self._smooth = _Average(smoothing)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "average": self._smooth.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
        self._smooth.load(state_dict["average"])

    def facts(self) -> dict[str, Any]:
        return {"noise_scale": {"mode": self.mode, "measured": self.history}} if self.history else {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = getattr(pl_module, "loss", None)
        of_ours = isinstance(pl_module, SimCLR)
        measuring.check_mode(self.mode, loss if of_ours else None, force=self.force, ranks=trainer.world_size)
        if self.mode != "per_rank" and self.loss_of is None and not of_ours:
            raise InputError(
                f"GradientNoiseScale: how {type(pl_module).__name__} makes its loss is not known; give loss_of"
            )
        if self.mode == "per_rank":
            self._local = _LocalSquares(trained_parameters(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.mode == "per_rank":
            self._local.remove()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        batch = self._images_of_a_step(trainer, pl_module)
        if self.mode == "per_rank":
            estimate = self._local.estimate(batch, _gradient_scale(trainer))
            if estimate is None:
                return
        elif due:
            estimate = self._measure(trainer, pl_module, batch)
        else:
            return
        if not (math.isfinite(estimate.signal) and math.isfinite(estimate.noise)):
            return  # a bad step, which is another callback's to tell
        average = self._smooth.add(estimate)
        if due:
            self._tell(trainer, estimate, average)

    def _measure(self, trainer: Any, module: Any, batch: int) -> NoiseScale:
        loss_of = self.loss_of or contrastive_loss
        parameters = trained_parameters(module)
        scale = _gradient_scale(trainer)

        def gradient_of(views: Any) -> Tensor:
            def loss() -> Tensor:
                with trainer.precision_plugin.forward_context():
                    return loss_of(module, views)

            return mean_over_ranks(own_gradient(loss, parameters, scale=scale))

        with ExitStack() as unchanged:
            unchanged.enter_context(unchanged_buffers(module))
            unchanged.enter_context(unchanged_random_state(module.device))
            if self.mode == "probe":
                return measuring.probe(gradient_of, self._some(trainer, module, batch, self.batches), batch)
            return measuring.jackknife(gradient_of, self._some(trainer, module, batch, 1), batch, self.batches)

    def _some(self, trainer: Any, module: Any, batch: int, count: int) -> Iterator[Any]:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, SimCLRDataModule):
            yield from measuring.independent_batches(data, batch, count, module.device, draw=trainer.global_step)
            return
        if self.mode == "jackknife":
            raise InputError("GradientNoiseScale: the jackknife needs a SimCLRDataModule; take mode probe")
        found = 0
        for found, one in enumerate(islice(iter(trainer.train_dataloader), count), 1):  # noqa: B007  counted
            yield trainer.strategy.batch_to_device(one, module.device)
        if found < count:
            raise InputError(f"GradientNoiseScale: {count} batches are wanted, and an epoch has {found}")

    def _images_of_a_step(self, trainer: Any, module: Any) -> int:
        if isinstance(module, SimCLR):
            return module.global_batch_size()
        share = getattr(trainer.train_dataloader, "batch_size", None)
        if not isinstance(share, int):
            raise InputError("GradientNoiseScale: the batch size of this loader is unknown")
        return share * trainer.world_size

    def _tell(self, trainer: Any, estimate: NoiseScale, average: NoiseScale) -> None:
        self.history.append({"step": trainer.global_step, **estimate.as_json(), "smoothed": average.simple})
        values = {"noise_scale_signal": average.signal, "noise_scale_noise": average.noise}
        if average.simple is not None:
            values["noise_scale"] = average.simple
        # Not by the module, whose values reach a logger only at the steps that it shows.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


class _Average:
    """Moving averages of the two parts, without the pull towards 0 of their beginning."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing, self._sums, self._weight = smoothing, [0.0, 0.0], 0.0

    def add(self, estimate: NoiseScale) -> NoiseScale:
        for place, value in enumerate((estimate.signal, estimate.noise)):
            self._sums[place] = self.smoothing * self._sums[place] + (1 - self.smoothing) * value
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        return NoiseScale(*(total / self._weight for total in self._sums))

    def state(self) -> dict[str, Any]:
        return {"sums": list(self._sums), "weight": self._weight}

    def load(self, state: dict[str, Any]) -> None:
        self._sums, self._weight = list(state["sums"]), state["weight"]


class _LocalSquares:
    """|g_r|^2 of this rank in every backward pass, by hooks that see gradients before DDP averages them."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self._squares: dict[int, Tensor] = {}
        self._twice = False
        self._hooks = [p.register_hook(self._hook(number)) for number, p in enumerate(parameters)]

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._twice |= number in self._squares
            self._squares[number] = gradient.detach().double().square().sum()

        return hook

    def estimate(self, batch: int, scale: float) -> NoiseScale | None:
        """Of the step whose gradients are in place; None where no backward pass was seen."""
        squares, self._squares = self._squares, {}
        if self._twice:
            raise InputError("mode per_rank needs one backward pass a step: no model.chunk_size, no accumulation")
        if not squares:
            return None
        own = torch.stack(list(squares.values())).sum() / scale**2
        everyone = [torch.zeros_like(own) for _ in range(world().size)]
        dist.all_gather(everyone, own)
        # Unscaled by Lightning's plugin before this hook is called.
        whole = sum(float(p.grad.double().square().sum()) for p in self.parameters if p.grad is not None)
        return per_rank_estimate([float(value) for value in everyone], whole, batch)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _gradient_scale(trainer: Any) -> float:
    """Of the gradient scaler of 16-mixed; 1 elsewhere."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
