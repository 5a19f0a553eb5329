"""Local SGD: ranks train weights of their own for a number of steps, then average them."""

import math
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from simclr_scale.distributed import GlobalBatchNorm, average_across_ranks
from simclr_scale.errors import InputError
from simclr_scale.losses.contrast import ContrastiveLoss
from simclr_scale.pretraining.apart import WeightsApart
from simclr_scale.pretraining.probe import OnlineProbe
from simclr_scale.scaling.outer_step import OuterNesterov


class Traffic(NamedTuple):
    """What has been done since this start of a run."""

    shared_steps: int
    """Steps of which DistributedDataParallel reduced the gradient."""
    local_steps: int
    averaged_bytes: int
    """Put into the all-reduces of all averages together by each rank."""


class LocalSGD(pl.Callback, WeightsApart):
    """Lets every rank take ``period`` steps alone, then averages weights and buffers over ranks.

    Local SGD from the first step on, post-local SGD with ``start`` above 0 (Lin et al., ICLR 2020: momentum stays
    local; 16 steps), DiLoCo with ``outer="nesterov"`` (Douillard et al. 2023: the mean change of a round is the
    gradient of an SGD step with Nesterov momentum). Under DDP, on CPU and GPU. With SGD, with or without momentum,
    period 1 is DDP itself; LARS and Adam, whose step is no linear function of the gradient, take each their own.

    Weights are also averaged, together with the states of optimizers, before every checkpoint, score and validation,
    and at the end of training. That leaves the rhythm of the periods as it is, and the outer step to their ends. As a
    checkpoint at some step averages whether or not the run ends there, a resumed run is the unbroken one that wrote
    the same checkpoints.

    Whether all ranks skip a step that is not finite on one of them is still agreed on at every step, in a few bytes.

    Args:
        start: steps of ordinary DDP before.
        period: steps between averages.
        outer: "nesterov": what is averaged is the change since the last average, as the gradient of an outer step.
        outer_learning_rate, outer_momentum: of the outer step.
        negatives: "global": every step still gathers the embeddings of all ranks, and batch norm their moments, so the
            loss stays that of the global batch. "local": from ``start`` on, negatives and batch norm are those of one
            rank; the ranks then exchange nothing but the loss to be shown and the agreement on bad steps.

    Attributes:
        spread: how far apart the ranks were at the last average: root mean square over ranks of the distance of their
            weights from the mean, over the norm of the mean. Logged as ``weight_spread``.
        traffic: what has been sent.

    Raises:
        InputError: at the construction for a value out of range; at the start of training where there is one process,
            a strategy other than DDP, a loss whose negatives cannot be local, or a ``start`` beyond its end.
    """

    def __init__(
        self,
        start: int = 0,
        period: int = 16,
        outer: Literal["nesterov"] | None = None,
        negatives: Literal["global", "local"] = "global",
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
    ) -> None:
        if period < 1:
            raise InputError(f"LocalSGD: period must be at least 1 step, got {period}")
        if start < 0:
            raise InputError(f"LocalSGD: start must be a number of steps from 0, got {start}")
        if outer not in (None, "nesterov"):
            raise InputError(f"LocalSGD: outer must be null or nesterov, got {outer!r}")
        if negatives not in ("global", "local"):
            raise InputError(f"LocalSGD: negatives must be global or local, got {negatives!r}")
        if not 0 < outer_learning_rate < math.inf:
            raise InputError(f"LocalSGD: outer_learning_rate must be above 0, got {outer_learning_rate}")
        if not 0 <= outer_momentum < 1:
            raise InputError(f"LocalSGD: outer_momentum must be from 0 to below 1, got {outer_momentum}")
        self.start, self.period, self.negatives = start, period, negatives
        self._outer = OuterNesterov(outer_learning_rate, outer_momentum) if outer else None
        self.steps_since_average = 0
        self.spread = 0.0
        self._is_local = self._weights_apart = self._states_apart = False
        self._shared_steps = self._local_steps = self._averaged_bytes = 0
        self._gathering: list[ContrastiveLoss] = []

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._shared_steps, self._local_steps, self._averaged_bytes)

    def state_dict(self) -> dict[str, Any]:
        outer = self._outer.state_dict() if self._outer is not None else None
        return {"steps_since_average": self.steps_since_average, "spread": self.spread, "outer": outer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps_since_average, self.spread = state_dict["steps_since_average"], state_dict["spread"]
        if self._outer is not None and state_dict["outer"] is not None:
            self._outer.load_state_dict(state_dict["outer"])

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if trainer.world_size < 2:
            raise InputError(
                "LocalSGD needs several processes, whose weights it averages, and this run has one: add "
                "--trainer.devices 2 --trainer.strategy ddp, or leave LocalSGD out"
            )
        if not isinstance(trainer.strategy, DDPStrategy):
            raise InputError(
                f"LocalSGD averages whole copies of the weights: it needs --trainer.strategy ddp, and "
                f"{type(trainer.strategy).__name__} has none"
            )
        if trainer.strategy._ddp_kwargs.get("static_graph"):
            raise InputError(
                "LocalSGD takes steps without a reduction, which static_graph of DDP forbids: leave it out"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if self.start >= total:
            raise InputError(
                f"LocalSGD: start {self.start} lies beyond the end of training, which has {int(total)} steps"
            )
        if self.negatives == "local":
            self._require_local_negatives(pl_module)
        self._shared_steps = self._local_steps = self._averaged_bytes = 0
        self._is_local = self._weights_apart = self._states_apart = False

    def _require_local_negatives(self, pl_module: nn.Module) -> None:
        self._gathering = [m for m in pl_module.modules() if isinstance(m, ContrastiveLoss) and m.gather]
        loss = getattr(pl_module, "loss", None)
        if not self._gathering and getattr(loss, "gather", True) is not False:
            raise InputError(
                f"LocalSGD: negatives local needs a loss that can do without those of other ranks (NTXentLoss, "
                f"DCLLoss, DCLWLoss), and this one is {type(loss).__name__}; set negatives to global"
            )
        if any(isinstance(module, nn.SyncBatchNorm) for module in pl_module.modules()):
            raise InputError("LocalSGD: negatives local cannot loosen trainer.sync_batchnorm; leave that one out")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        is_local = trainer.global_step >= self.start
        # Not a communication hook, of which a model can have one, whose count of steps no checkpoint has, and for
        # which the gradient is still copied into buckets. Without these DDP's wrapper is transparent, as in no_sync().
        trainer.strategy.model.require_backward_grad_sync = not is_local
        trainer.strategy.model.require_forward_param_sync = not is_local
        if is_local and not self._is_local:
            self._synchronise_forward(pl_module, False)
            if self._outer is not None:
                self._outer.begin(_trained(trainer))
        self._is_local = is_local

    def _synchronise_forward(self, pl_module: nn.Module, synchronised: bool) -> None:
        """The probe goes the way of the weights; negatives and batch norm stay global where they are to."""
        loosened = (OnlineProbe,) if self.negatives == "global" else (OnlineProbe, GlobalBatchNorm)
        for module in pl_module.modules():
            if isinstance(module, loosened):
                module.synchronised = synchronised
        for loss in self._gathering:
            loss.gather = synchronised

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if not self._is_local:
            self._shared_steps += 1
            return
        self._local_steps += 1
        self.steps_since_average += 1
        self._weights_apart = self._states_apart = True
        if self.steps_since_average >= self.period:
            self._average_weights(pl_module)
            if self._outer is not None:
                self._outer.step(_trained(trainer))
            self.steps_since_average = 0
        pl_module.log("weight_spread", self.spread)

    def bring_together(self, trainer: Any, pl_module: Any) -> None:
        """Averages what is apart; a rank that has averaged already at this step sends nothing."""
        if self._weights_apart:
            self._average_weights(pl_module)
        if self._states_apart:
            self._average(_states(trainer, pl_module))
            self._states_apart = False

    def _average_weights(self, pl_module: nn.Module) -> None:
        parameters = list(pl_module.parameters())
        distance = self._average([p.data for p in parameters])
        self._average([b for b in pl_module.buffers() if b.is_floating_point()])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.data.float() for p in parameters])))
        average_across_ranks([distance])
        self.spread = float(distance.sqrt() / norm)
        self._weights_apart = False

    def _average(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(())
        self._averaged_bytes += sum(max(4, t.element_size()) * t.numel() for t in tensors)
        return average_across_ranks(tensors)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.bring_together(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.bring_together(trainer, pl_module)
        self._synchronise_forward(pl_module, True)


def _trained(trainer: Any) -> list[Tensor]:
    return [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]


def _states(trainer: Any, pl_module: Any) -> list[Tensor]:
    """Momentum and its like, of the optimizer and of the probe's: what a checkpoint holds of one rank for all."""
    probe = getattr(pl_module, "probe", None)
    optimizers = [*trainer.optimizers, *([probe.optimizer] if probe is not None else [])]
    return [
        value
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
