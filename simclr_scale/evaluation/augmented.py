"""Linear evaluation by the paper's protocol: SGD on augmented images, the encoder frozen.

Chen et al. 2020, appendix B.6, and `run.py` with `train_mode=finetune` and `fine_tune_after_block=4` of
google-research/simclr: random resized crops and flips and no other augmentation, mean cross-entropy, Nesterov momentum
.9, learning rate .1 * batch / 256 decayed by a cosine without warm-up over 90 epochs, no regularisation, logits that
start at 0, batch norm with the statistics of pretraining. Nothing is chosen, so no image is held out.

n images, C classes, D features, B images a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.sources import Source
from simclr_scale.distributed import sum_in_place, world
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented_images import (
    AugmentedImages,
    Batches,
    check_crops,
    check_labelled,
    check_training,
)
from simclr_scale.evaluation.classifier import LinearClassifier
from simclr_scale.evaluation.features import evaluating
from simclr_scale.evaluation.probes import EPOCHS, MOMENTUM

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class AugmentedProbe(LinearClassifier):
    """A linear classifier trained by SGD on augmented images."""

    losses: tuple[float, ...]
    """Mean cross-entropy of the training batches, once for each epoch."""


def augmented_probe(
    encoder: nn.Module,
    transform: ImageTransform,
    source: Source,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
    epochs: int = EPOCHS,
    batch_size: int = 256,
    seed: int = 0,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> AugmentedProbe:
    """Trains a linear classifier on random crops and flips of labelled images, the encoder frozen.

    On several ranks each encodes its part of every global batch, and all arrive at the same classifier: that of one
    rank, to the rounding of float32. Arguments are then equal on all of them, and every image must be readable.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out. In evaluation mode throughout, so that no weight and no
            statistic changes; its mode and its device are afterwards what they were.
        transform: says the size, square, and the normalisation of its images.
        source: the images.
        indices: which of them, (n,), all labelled; None for all that have a label.
        learning_rate: of a batch of 256; scaled by B / 256.
        weight_decay: factor of the weight in its gradient; the bias is not decayed.
        epochs: over the images.
        batch_size: B, of all ranks together; n where that is less. What does not fill the last batch is left out, other
            images every epoch.
        seed: of the orders, the crops and the flips.
        num_workers: processes that read images.
        device: where the encoder runs; None for where it is.
        progress: is told how many epochs are done.
        group: the ranks; None for all.

    Raises:
        InputError: an image is unlabelled or cannot be read, there are fewer than two classes, a setting is out of
            range, the transform cannot crop, a batch is smaller than the number of ranks, or the training diverges.
    """
    check_augmented_settings(transform, learning_rate, weight_decay, epochs, batch_size)
    chosen, classes = check_labelled(source, indices)
    target_of = torch.from_numpy(np.searchsorted(classes, source.labels))
    size = min(batch_size, len(chosen))
    ranks = world(group)
    if size < ranks.size:
        raise InputError(f"batch_size: {size} images a step for {ranks.size} ranks; wanted at least one a rank")
    batches = Batches(chosen, size, epochs, seed, ranks)
    images = AugmentedImages(source, transform, seed)
    loader = DataLoader(images, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())

    head: nn.Linear | None = None
    optimizer: torch.optim.SGD | None = None
    total = torch.zeros(())
    losses: list[float] = []
    each_epoch = len(batches) // epochs
    with evaluating(encoder, device) as there:
        for step, (pictures, index) in enumerate(loader):
            with torch.no_grad():
                features = encoder(pictures.to(there, non_blocking=True)).float()
            if head is None or optimizer is None:
                head = nn.utils.skip_init(nn.Linear, features.shape[1], len(classes), device=there)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                groups: list[dict[str, Any]] = [
                    {"params": [head.weight], "weight_decay": weight_decay},
                    {"params": [head.bias]},
                ]
                optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)
                total = torch.zeros((), device=there)
            cosine = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate * size / 256 * cosine
            # The sum over this rank's part / B: the sum of these over the ranks is the mean over the batch.
            loss = F.cross_entropy(head(features), target_of[index].to(there), reduction="sum") / size
            optimizer.zero_grad()
            loss.backward()
            sum_in_place([weight.grad for weight in head.parameters() if weight.grad is not None], group)
            optimizer.step()
            total += loss.detach()
            if (step + 1) % each_epoch == 0:
                sum_in_place([total], group)
                losses.append(float(total) / each_epoch)
                total.zero_()
                if not math.isfinite(losses[-1]):
                    raise InputError(f"learning_rate: training diverged at {learning_rate:g}; wanted a smaller one")
                if progress:
                    progress(len(losses))
    assert head is not None  # there is a batch: size is at most n
    return AugmentedProbe(
        weight=head.weight.detach().double().cpu(),
        bias=head.bias.detach().double().cpu(),
        classes=torch.from_numpy(classes),
        losses=tuple(losses),
    )


def check_augmented_settings(
    transform: object, learning_rate: float, weight_decay: float, epochs: int, batch_size: int
) -> None:
    """Raises InputError for settings out of range; for a command to call before its work."""
    check_crops(transform)
    check_training(learning_rate, weight_decay, epochs, batch_size)
