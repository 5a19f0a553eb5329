"""Training a whole network on crops and flips: the part that fine-tuning and distillation share.

N images, B images a batch of all ranks together, b of them on this rank, C classes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simclr_scale.data.sources import Source
from simclr_scale.distributed import convert_global_batch_norm, sum_in_place, world
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented_images import AugmentedImages, Batches, check_training
from simclr_scale.evaluation.features import Transform
from simclr_scale.evaluation.shared_features import source_features
from simclr_scale.models import ImageClassifier
from simclr_scale.optim import LARS, param_groups, scaled_learning_rate, warmup_cosine

OptimizerName = Literal["sgd", "lars"]
_SCALING: dict[OptimizerName, Literal["linear", "sqrt"]] = {"sgd": "linear", "lars": "sqrt"}

LossOfBatch = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (b, C), images (b, channels, H, W) on the device, indices (b,)) -> the sum of the losses, a scalar."""


# The published 60 epochs of 1% of ImageNet are 3,000 steps.
_FEW_STEPS = 300


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained; the rate decays by a cosine to 0, without warm-up."""

    optimizer: OptimizerName
    """SGD with Nesterov momentum, whose rate is `learning_rate` * B / 256; or LARS, `learning_rate` * sqrt(B)."""
    learning_rate: float
    epochs: int
    batch_size: int
    """B; the number of images where that is less."""
    weight_decay: float = 0.0
    """Of all but norms, biases and the supervised layer."""
    momentum: float = 0.9

    def check(self) -> None:
        """Raises InputError for a setting out of range."""
        if self.optimizer not in _SCALING:
            raise InputError(f"optimizer: {self.optimizer!r}, wanted sgd or lars")
        check_training(self.learning_rate, self.weight_decay, self.epochs, self.batch_size)
        if self.batch_size < 2:
            raise InputError(f"batch_size: {self.batch_size}, wanted at least 2: batch norm has no spread of one image")

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        rule = {"linear": "learning_rate * batch / 256", "sqrt": "learning_rate * sqrt(batch)"}
        settings = {**asdict(self), "peak_learning_rate": rule[_SCALING[self.optimizer]]}
        settings["finetune_batch_size"] = settings.pop("batch_size")
        return settings | {"schedule": "cosine", "augmentation": "random resized crop, flip"}

    def warnings(self, images: int) -> tuple[str, ...]:
        """That so many images and epochs make too few steps for the rate to matter, where they do."""
        batch = min(self.batch_size, images)
        steps = self.epochs * (images // batch)
        if steps >= _FEW_STEPS:
            return ()
        return (
            f"trained for {steps} steps in all, {batch} of {images:,} images a step: few for a whole network, whose "
            "score may be below that of a linear classifier; a smaller finetune_batch_size or more epochs make more",
        )

    def make_optimizer(self, network: ImageClassifier, batch_size: int) -> torch.optim.Optimizer:
        """At its peak rate. Google's LARS leaves the supervised layer out, by name, from decay and from adaptation."""
        kept = nn.ModuleDict({"encoder": network.encoder, "layers": network.head.layers})
        supervised = {"name": "supervised", "params": list(network.head.linear.parameters())}
        groups = [*param_groups(kept, self.weight_decay), {**supervised, "weight_decay": 0.0, "adapt": False}]
        rate = scaled_learning_rate(self.learning_rate, batch_size, _SCALING[self.optimizer])
        if self.optimizer == "lars":
            return LARS(groups, rate, momentum=self.momentum)
        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, nesterov=True)


@dataclass(frozen=True)
class TrainedClassifier:
    """What training has made."""

    network: ImageClassifier
    """In evaluation mode, on the device where it was trained."""
    losses: tuple[float, ...]
    """Mean loss of the training batches, once for each epoch."""


def train_network(
    network: ImageClassifier,
    loss_of: LossOfBatch,
    images: AugmentedImages,
    indices: np.ndarray,
    settings: TrainingSettings,
    *,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> TrainedClassifier:
    """Trains `network` in place, batch norm over the global batch, with the gradient of the mean over that batch.

    On several ranks, arguments are equal on all of them. They arrive where one process does, to the rounding of
    float32, but for dropout, whose draws are those of a rank.

    Args:
        indices: of the images, (N,). What does not fill the last batch is left out, other images every epoch.
        device: where it is trained; None for where it is.
        progress: is told how many epochs are done.

    Raises:
        InputError: a setting out of range, fewer images a batch than ranks, a device without a network that takes
            these images, or a loss that is not finite.
    """
    settings.check()
    size, ranks = min(settings.batch_size, len(indices)), world(group)
    if size < ranks.size:
        raise InputError(f"batch_size: {size} images a step for {ranks.size} ranks; wanted at least one a rank")
    there = next(network.parameters()).device if device is None else torch.device(device)
    network.to(there)
    if ranks.size > 1:
        convert_global_batch_norm(network, group)
    batches = Batches(indices, size, settings.epochs, images.seed, ranks)
    loader = DataLoader(images, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())
    optimizer = settings.make_optimizer(network, size)
    peak = optimizer.param_groups[0]["lr"]
    trained = [parameter for group_ in optimizer.param_groups for parameter in group_["params"]]
    each_epoch = len(batches) // settings.epochs
    total = torch.zeros((), device=there)
    losses: list[float] = []
    network.train()
    with _own_randomness(images.seed, ranks.rank, there):
        for step, (pictures, index) in enumerate(loader):
            for group_ in optimizer.param_groups:
                group_["lr"] = peak * warmup_cosine(step, warmup_steps=0, total_steps=len(batches))
            pictures = pictures.to(there, non_blocking=True)
            # The sum over this rank's part / B: the sum of these over the ranks is the mean over the batch.
            loss = loss_of(network(pictures), pictures, index) / size
            optimizer.zero_grad()
            loss.backward()
            sum_in_place([weight.grad for weight in trained if weight.grad is not None], group)
            optimizer.step()
            total += loss.detach()
            if (step + 1) % each_epoch == 0:
                sum_in_place([total], group)
                losses.append(float(total) / each_epoch)
                total.zero_()
                if not math.isfinite(losses[-1]):
                    raise InputError(
                        f"learning_rate: the loss is {losses[-1]} after {len(losses)} epochs at "
                        f"{settings.learning_rate:g}; wanted a smaller one"
                    )
                if progress:
                    progress(len(losses))
    return TrainedClassifier(network.eval(), tuple(losses))


def classify_images(
    network: ImageClassifier,
    transform: Transform,
    source: Source,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    unreadable: dict[int, str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The most probable class of each image, by the network in evaluation mode, each image once.

    The arguments are those of `source_features`.

    Returns:
        Classes, (M,) int64, as positions in `network.head.classes`; and the indices, (M,) int64, ascending: those of
        the images that can be read.
    """
    logits, _, read = source_features(
        network,
        source,
        transform,
        indices=indices,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        progress=progress,
        unreadable=unreadable,
        group=group,
    )
    return logits.argmax(dim=1), read


@contextmanager
def _own_randomness(seed: int, rank: int, device: torch.device) -> Iterator[None]:
    """Draws of dropout are a function of the seed and the rank, and leave those of the caller as they were."""
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    state = int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(state)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(state)
        yield
