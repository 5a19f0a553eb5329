"""SimCLR as a LightningModule."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from simclr_scale.bundle import BUNDLE_KEY, ImageTransform, encoder_config, load_encoder
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.distributed import convert_global_batch_norm, data_parallel_group, world
from simclr_scale.errors import InputError
from simclr_scale.losses import NTXentLoss, contrastive_accuracy
from simclr_scale.models import ProjectionHead
from simclr_scale.models.chunked import encode_in_chunks
from simclr_scale.optim import DEFAULT_BASE_LEARNING_RATE, LARS, param_groups, scaled_learning_rate, warmup_cosine
from simclr_scale.optim.norms import whole_norms
from simclr_scale.pretraining.apart import bring_weights_together
from simclr_scale.pretraining.local_losses import LocalLosses, StageLosses, staged_step
from simclr_scale.pretraining.probe import OnlineProbe
from simclr_scale.pretraining.sharding import shard_model

# Lightning's OptimizerCallable with the learning rate: a configuration need not give one, and cannot give another one.
OptimizerOfGroups = Callable[[Iterable[Any], float], Optimizer]


class SimCLR(pl.LightningModule):
    """Contrastive pretraining of an image encoder (Chen et al. 2020, "A Simple Framework for Contrastive Learning").

    Both views go through the encoder in one forward, so that batch norm sees all 2N of them; on several ranks its
    statistics and the negatives are global. The learning rate follows the global batch and changes at every step. With
    ``chunk_size`` a big batch fits a small device, with the same gradient but batch norm over a chunk (of all ranks).

    Args:
        encoder: images (B, C, H, W) -> features (B, D), with ``num_features`` D; see ``create_encoder``.
        head: makes the projection head from D; None: ``ProjectionHead`` of two layers. A module is taken as it is.
        loss: called with (2n, d) projections, [view 1; view 2]; None: ``NTXentLoss(temperature)``.
        optimizer: makes the optimizer from parameter groups and a learning rate, as the classes of ``torch.optim`` do;
            None: LARS with momentum .9. The rate and the weight decay are those of the arguments below.
        learning_rate: base rate; None: .3 for linear and .075 for sqrt scaling (both 4.8 at a batch of 4096).
        lr_scaling: "linear": rate * batch / 256; "sqrt": rate * sqrt(batch) (appendix B.1).
        weight_decay: for all but norms, biases and what the encoder excludes.
        warmup_epochs: epochs of linear warm-up from 0, before the cosine.
        temperature: of NT-Xent.
        loss_scale: the loss is multiplied by it; 2 is Google's sum over both directions.
        chunk_size: views that are encoded at a time, at most; None: all; see ``encode_in_chunks``.
        probe_classes: classes of the online probe; None: those of the data module's labels, 0: no probe.
        init_from: a spec of ``load_encoder`` whose weights the encoder starts from.
        channels_last: run the encoder in channels-last memory format.
        compile: run the encoder through ``torch.compile``.
        local_losses: a loss for each stage; None: one at the end.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        head: Callable[[int], nn.Module] | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerOfGroups | None = None,
        learning_rate: float | None = None,
        lr_scaling: Literal["linear", "sqrt"] = "linear",
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10,
        temperature: float = 0.1,
        loss_scale: float = 1.0,
        chunk_size: int | None = None,
        probe_classes: int | None = None,
        init_from: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        local_losses: LocalLosses | None = None,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise InputError(f"model.chunk_size must be at least 1 view, got {chunk_size}")
        for name, value in {"warmup_epochs": warmup_epochs, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise InputError(f"model.{name} must be 0 or above, got {value}")
        for name, value in {"temperature": temperature, "loss_scale": loss_scale}.items():
            if not 0 < value < math.inf:
                raise InputError(f"model.{name} must be above 0, got {value}")
        width = getattr(encoder, "num_features", None)
        if not isinstance(width, int):
            raise InputError(
                f"model.encoder {type(encoder).__name__} does not tell the width of its features; make it with "
                "create_encoder, or give it an attribute num_features"
            )
        self.encoder = encoder
        if init_from is not None:
            _copy_weights(init_from, encoder)
        if channels_last:
            encoder.to(memory_format=torch.channels_last)
        self._width = width
        self.head = head if isinstance(head, nn.Module) else (head or ProjectionHead)(width)
        self.loss = NTXentLoss(temperature) if loss is None else loss
        self.local: StageLosses | None = None
        if local_losses is not None:
            for name, given in {"chunk_size": chunk_size is not None, "compile": compile}.items():
                if given:
                    raise InputError(f"model.{name} does not go with model.local_losses; leave out one of them")
            self.local = StageLosses(encoder, self.head, self.loss, local_losses)
        self.probe: OnlineProbe | None = None
        self._probe_state: dict[str, Any] | None = None
        self._for_probe: tuple[Tensor, Tensor] | None = None
        self.step_is_skipped = False  # by the callback BadSteps, between the backward pass and the optimizer's step
        self.transform: ImageTransform | None = None
        self._optimizer = optimizer
        self.base_learning_rate = DEFAULT_BASE_LEARNING_RATE[lr_scaling] if learning_rate is None else learning_rate
        self.lr_scaling: Literal["linear", "sqrt"] = lr_scaling
        self.weight_decay, self.warmup_epochs, self.loss_scale = weight_decay, warmup_epochs, loss_scale
        self.chunk_size, self.probe_classes, self.channels_last = chunk_size, probe_classes, channels_last
        self._compile = compile

    def setup(self, stage: str) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            raise InputError(
                f"trainer.accumulate_grad_batches {self.trainer.accumulate_grad_batches} would not add negatives: keep "
                "it at 1, and set model.chunk_size to fit a large batch on a small device"
            )
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(self.trainer, name) == 0:
                raise InputError(f"trainer.{name} is 0: there is nothing to train")
        data = getattr(self.trainer, "datamodule", None)
        classes = self.probe_classes
        if isinstance(data, SimCLRDataModule):
            size = (data.channels, data.image_size, data.image_size)
            self.transform = ImageTransform(
                size, crop_pct=data.augmentation.evaluation_crop, value_range=data.value_range
            )
            classes = data.num_classes if classes is None else classes
            self._require_images_of(size)
        elif self.transform is None:
            self.transform = ImageTransform(
                getattr(self.encoder, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
            )
        if classes and self.probe is None:
            self.probe = OnlineProbe(self._width, classes, group=self.data_parallel_group)
        if self.data_parallel_size > 1:
            convert_global_batch_norm(self.encoder, self.data_parallel_group)
            convert_global_batch_norm(self.head, self.data_parallel_group)
            if self.local is not None:
                convert_global_batch_norm(self.local, self.data_parallel_group)
        if self._compile:
            self.encoder.compile()

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different images; None, all of them, but under a mesh with tensor parallelism."""
        return data_parallel_group(self.device_mesh)

    @property
    def data_parallel_size(self) -> int:
        """How many ranks hold different images."""
        return self.trainer.world_size if self.device_mesh is None else world(self.data_parallel_group).size

    @property
    def data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self.global_rank if self.device_mesh is None else world(self.data_parallel_group).rank

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy``: shards weights, and divides blocks, over its mesh."""
        if self.device_mesh is None:
            return
        self.require_shardable()
        loss: Any = self.loss
        if getattr(loss, "group", self) is None:
            loss.group = self.data_parallel_group
        shard_model(self.encoder, self.head, self.loss, self.device_mesh, self.trainer.strategy.root_device)

    def require_shardable(self) -> None:
        """Raises InputError for what nobody has tried with sharded weights: a compiled encoder, local losses."""
        if self.local is not None:
            raise InputError(
                "model.local_losses does not go with a trainer.strategy that shards weights: leave one out"
            )
        if self._compile:
            raise InputError(
                "model.compile is not supported with a trainer.strategy that shards weights: leave one out"
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's clipping, but for the norm of sharded gradients: torch's takes those of one mesh only."""
        if self.device_mesh is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:  # a bad step's
            return
        factor = (gradient_clip_val / (whole_norms(gradients).norm() + 1e-6)).clamp(max=1.0).item()
        for gradient in gradients:
            gradient.mul_(factor)

    @torch.no_grad()
    def _require_images_of(self, size: tuple[int, int, int]) -> None:
        """A vision transformer, for one, takes images of one size only: find out before training does."""
        channels, height, width = size
        taken = getattr(getattr(self.encoder, "architecture", None), "in_chans", channels)
        if taken != channels:
            raise InputError(
                f"model.encoder takes images of {taken} channels, and those of the data have {channels}: "
                f"set model.encoder.init_args.in_chans to {channels}, or another data.preset"
            )
        modes = [(module, module.training) for module in self.encoder.modules()]
        try:
            self.encoder.eval()(torch.zeros(1, *size, dtype=next(self.parameters()).dtype))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"model.encoder does not take images of {channels} x {height} x {width} (data.image_size): {reason}"
            ) from error
        finally:
            # Not by train(), which would wake a part that is frozen.
            for module, training in modes:
                module.training = training

    def on_fit_start(self) -> None:
        self._seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout and drop path are a function of (seed, step, rank), as the views are, so that a resumed run repeats
        # them and no two ranks share them, but for tensor-parallel partners, who must.
        stream = np.random.SeedSequence((self._seed, self.global_step, self.data_parallel_rank))
        seed = int(stream.generate_state(1, np.uint64)[0])
        # Not torch.manual_seed, which takes a millisecond to tell every kind of device that there could be.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Images (M, C, H, W) -> features (M, D)."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        if self.chunk_size is not None and self.training:
            return encode_in_chunks(self.encoder, x, self.chunk_size, memory_format)
        return self.encoder(x.to(memory_format=memory_format))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on the data module's batch, or on ``((view1, view2), label)`` of anyone's loader."""
        x, labels = _inputs_and_labels(batch)
        if self.local is None:
            h = self(x)
            z = self.head(h)
            loss = self.loss(z)
        else:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            step = staged_step(self, x, float(scaler.get_scale()) if scaler is not None else 1.0)
            h, z, loss = step.features, step.projections, step.loss
            self.log_dict({f"loss_stage{number}": value for number, value in step.of_stages.items()})

        self.log("loss", loss.detach(), prog_bar=True)
        if self.probe is not None and labels is not None:
            # Each image counts once: its first view.
            self._for_probe = h[: len(labels)].detach(), labels
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (self.global_step + 1) % interval == 0:
            # Only when it is shown: it costs a gather and a product of its own.
            self.log(
                "contrastive_accuracy", contrastive_accuracy(z.detach(), group=self.data_parallel_group), prog_bar=True
            )
            self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss * self.loss_scale

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for_probe, self._for_probe = self._for_probe, None
        if self.probe is not None and for_probe is not None and not self.step_is_skipped:
            probe_loss, probe_accuracy = self.probe.update(*for_probe)
            self.log_dict({"probe_loss": probe_loss, "probe_accuracy": probe_accuracy})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise InputError("training has no end: give --trainer.max_epochs or --trainer.max_steps")
        self.trainer.fit_loop.setup_data()  # Lightning has not done so where max_steps alone ends training
        steps_an_epoch = self.trainer.num_training_batches
        if self.warmup_epochs and steps_an_epoch == float("inf"):
            raise InputError("this loader has no length, and so no epochs to warm up for: set model.warmup_epochs to 0")
        warmup = round(self.warmup_epochs * steps_an_epoch) if self.warmup_epochs else 0
        peak = scaled_learning_rate(self.base_learning_rate, self.global_batch_size(), self.lr_scaling)
        trained = nn.ModuleDict({"encoder": self.encoder, "head": self.head, "loss": self.loss})
        losses = [f"loss.{name}" for name in _names(self.loss)]
        if self.local is not None:
            trained["local"] = self.local
            losses += [f"local.losses.{name}" for name in _names(self.local.losses)]
        # What a loss learns (a scale, a bias) is neither decayed nor adapted, as biases are not.
        groups = param_groups(trained, self.weight_decay, exclude=losses)
        make = self._optimizer or LARS
        optimizer = make(groups, peak)
        warmup_cosine(0, warmup_steps=warmup, total_steps=int(total))  # a wrong warm-up fails here, before training
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps=warmup, total_steps=int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def global_batch_size(self) -> int:
        """Images in one step over all ranks, which the learning rate follows."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SimCLRDataModule):
            return data.global_batch_size
        share = getattr(self.trainer.train_dataloader, "batch_size", None)
        if not isinstance(share, int):
            raise InputError("the batch size of this loader is unknown; train on a DataLoader with a batch_size")
        return share * self.data_parallel_size

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # In place: the checkpoint holds the very tensors of weights and optimizer.
        bring_weights_together(self.trainer, self)
        if self.transform is not None and hasattr(self.encoder, "architecture"):
            checkpoint[BUNDLE_KEY] = {"encoder": encoder_config(self.encoder, self.transform)}
        if self.probe is not None:
            checkpoint["probe_optimizer"] = self.probe.optimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._probe_state = checkpoint.get("probe_optimizer")

    def on_train_start(self) -> None:
        # Only now is the probe on its device, to which its optimizer's state must go.
        if self.probe is not None and self._probe_state is not None:
            self.probe.optimizer.load_state_dict(self._probe_state)
            self._probe_state = None


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _inputs_and_labels(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, dict):
        return batch["inputs"], batch["label"]
    views, *rest = batch
    return torch.cat(list(views)), rest[0] if rest else None


def _copy_weights(spec: str, encoder: nn.Module) -> None:
    source, _ = load_encoder(spec)
    try:
        encoder.load_state_dict(source.state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"model.init_from {spec}: its weights do not fit model.encoder: {reason}") from error
