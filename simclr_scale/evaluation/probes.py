"""Linear evaluation by SGD: a grid of probes on cached features, trained together.

The heads of a grid differ in learning rate and weight decay and see the same images in the same order, so one product
of a batch with the weights of all of them gives all logits, and one more all gradients: a batch is gathered once, and
the products are wide enough to be fast. Each head is updated exactly as it would be alone.

The protocol is that of Chen et al. 2020, appendix B.6 to B.8, and `run.py` of google-research/simclr without its
augmentation: mean cross-entropy, Nesterov momentum .9, learning rate .1 * batch / 256 decayed by a cosine without
warm-up over 90 epochs, weights that start at 0. What the paper fixes is one point of the grid.

n images, D features, C classes, H heads, B images a batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features, as_labels
from simclr_scale.evaluation.classifier import LinearClassifier

LEARNING_RATES = tuple(float(value) for value in np.logspace(-3, 0.5, 8))
"""Two to a decade, .1 among them (of a batch of 256)."""
WEIGHT_DECAYS = (0.0, 1e-4)
EPOCHS = 90
MOMENTUM = 0.9


@dataclass(frozen=True)
class ProbeSetting:
    """What tells one head of a grid from another."""

    learning_rate: float
    """Of a batch of 256; scaled by B / 256."""
    weight_decay: float = 0.0
    """Factor of the weight in its gradient, the l2 of `linear.py`; the bias is not decayed."""


@dataclass(frozen=True)
class TrainedProbes:
    """All heads of a grid: the logits of head h are features @ weight[h].T + bias[h]."""

    weight: torch.Tensor
    """(H, C, D)."""
    bias: torch.Tensor
    """(H, C)."""
    settings: tuple[ProbeSetting, ...]

    def accuracies(self, features: torch.Tensor, targets: torch.Tensor) -> list[float]:
        """Top-1 of every head; 0 of one that has diverged. features: (M, D) and targets: (M,) int64 in 0..C-1."""
        heads, classes, width = self.weight.shape
        weight, bias = self.weight.view(-1, width), self.bias.view(-1)
        hits = torch.zeros(heads, dtype=torch.int64)
        for rows, truth in zip(features.split(4096), targets.split(4096), strict=True):
            logits = torch.addmm(bias, rows.to(weight.dtype), weight.T).view(len(rows), heads, classes)
            hits += (logits.argmax(dim=2) == truth[:, None]).sum(dim=0)
        finite = self.finite
        return [float(hit) / len(features) if finite[head] else 0.0 for head, hit in enumerate(hits.tolist())]

    @property
    def finite(self) -> list[bool]:
        """Whether each head has weights that are numbers still."""
        heads = len(self.weight)
        both = torch.cat([self.weight.reshape(heads, -1), self.bias], dim=1)
        return both.isfinite().all(dim=1).tolist()


def train_probes(
    features: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    settings: Sequence[ProbeSetting],
    *,
    epochs: int = EPOCHS,
    batch_size: int = 256,
    momentum: float = MOMENTUM,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> TrainedProbes:
    """Trains one head for each of `settings`, all in the same products.

    Head by head the result is that of training it alone, to the rounding of `features.dtype`. An epoch is a new seeded
    order of the images, cut into batches; what does not fill the last one is left out, other images every epoch.

    Args:
        features: (n, D) float32 or float64, in which the training computes.
        targets: (n,) int64 in 0..num_classes-1.
        num_classes: C.
        settings: of the H heads.
        epochs: over the images.
        batch_size: B; n where that is less.
        momentum: of Nesterov, as `torch.optim.SGD` defines it.
        seed: of the orders.
        progress: is told how many epochs are done.
    """
    heads, (count, width) = len(settings), features.shape
    size = min(batch_size, count)
    batches = count // size
    # The heads without decay first, so that those with it are one block of rows.
    by_decay = sorted(range(heads), key=lambda head: settings[head].weight_decay)
    undecayed = num_classes * sum(setting.weight_decay == 0 for setting in settings)

    def column(values: list[float]) -> torch.Tensor:
        return features.new_tensor([values[head] for head in by_decay]).repeat_interleave(num_classes)[:, None]

    rate = column([setting.learning_rate * size / 256 for setting in settings])
    rate_of_residual = rate / size
    shrinking = (rate * column([setting.weight_decay for setting in settings]))[undecayed:]

    rows = heads * num_classes
    weight, bias = features.new_zeros(rows, width), features.new_zeros(rows, 1)
    # Gradients are multiplied by the rates of their heads before they enter the velocity, where they are (rows, B) and
    # not (rows, D); what is left of the rate, the cosine, is one number for all heads.
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch, logits = features.new_empty(size, width), features.new_empty(rows, size)
    first_row, image = torch.arange(heads)[:, None] * num_classes, torch.arange(size)

    for epoch in range(epochs):
        # The raw stream, which NumPy promises to keep.
        order = np.argsort(generator(Purpose.ORDER, seed, epoch, 0).bit_generator.random_raw(count), kind="stable")
        for step in range(batches):
            chosen = torch.from_numpy(order[step * size : (step + 1) * size])
            torch.index_select(features, 0, chosen, out=batch)
            torch.addmm(bias, weight, batch.T, out=logits)
            # The gradient of each head's mean cross-entropy by its logits is (softmax - one-hot) / B.
            residual = logits.view(heads, num_classes, size).softmax(dim=1).view(rows, size)
            residual[first_row + targets[chosen], image] -= 1
            residual.mul_(rate_of_residual)

            # torch.optim.SGD: v = momentum v' + g, then w -= rate (g + momentum v). As g = v - momentum v', the step is
            # rate ((1 + momentum) v - momentum v'): taken in two, it needs no gradient beside the velocity.
            cosine = 0.5 * (1 + math.cos(math.pi * (epoch * batches + step) / (epochs * batches)))
            decayed = weight[undecayed:].clone()
            weight.add_(velocity, alpha=cosine * momentum)
            torch.addmm(velocity, residual, batch, beta=momentum, out=velocity)
            velocity[undecayed:].addcmul_(decayed, shrinking)
            weight.add_(velocity, alpha=-cosine * (1 + momentum))
            bias.add_(bias_velocity, alpha=cosine * momentum)
            bias_velocity.mul_(momentum).add_(residual.sum(dim=1, keepdim=True))
            bias.add_(bias_velocity, alpha=-cosine * (1 + momentum))
        if progress:
            progress(epoch + 1)
    as_given = torch.tensor(by_decay).argsort()
    return TrainedProbes(
        weight.view(heads, num_classes, width)[as_given], bias.view(heads, num_classes)[as_given], tuple(settings)
    )


@dataclass(frozen=True)
class HeadScore:
    """How one head of the grid did on the validation part of the training images."""

    learning_rate: float
    weight_decay: float
    accuracy: float
    finite: bool
    """False where it diverged."""


@dataclass(frozen=True)
class GridProbe(LinearClassifier):
    """The head that a grid chose, trained anew on all training images."""

    setting: ProbeSetting
    validation: tuple[HeadScore, ...] = ()
    """Of every head; empty where there is only one."""
    test_accuracy: float | None = None
    warnings: tuple[str, ...] = ()


def probe_grid(
    train_features: Array,
    train_labels: Array,
    test_features: Array | None = None,
    test_labels: Array | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = EPOCHS,
    batch_size: int = 256,
    validation_fraction: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> GridProbe:
    """Trains a grid of probes by SGD on frozen features, and scores the best once on the test features, where given.

    Every pair of a learning rate and a weight decay is a head. The heads are trained together on a part of the
    training images (`train_probes`); the one with the best top-1 on the other part is trained anew on all of them,
    with the same protocol. Among equals the smallest learning rate wins, then the largest decay. The test images have
    no say.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers >= 0, of at least two classes, in any numbering.
        test_features: (M, D).
        test_labels: (M,).
        learning_rates: of a batch of 256, scaled by batch / 256.
        weight_decays: of the weights.
        epochs: over the training images.
        batch_size: images a step; all of them where there are fewer.
        validation_fraction: the share of every class that the choice is made on.
        seed: of the draw of that share, and of the orders of the images.
        dtype: float32 or float64, in which the heads are trained.
        progress: is told how many epochs are done, of `2 * epochs`; of `epochs` where there is one head.

    Raises:
        InputError: shapes do not fit, features are not finite, an image is unlabelled, there are fewer than two
            classes, a setting is out of range, no class has the two images that a choice takes, or every head diverged.
    """
    check_grid_settings(learning_rates, weight_decays, epochs, batch_size, validation_fraction)
    features = as_features(train_features, "train_features", dtype)
    labels = as_labels(train_labels, "train_labels", rows=len(features))
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"train_labels: all are of class {int(classes[0])}; a classifier needs at least two classes")
    if (test_features is None) != (test_labels is None):
        raise InputError("test_features, test_labels: one is given without the other")
    settings = [ProbeSetting(rate, decay) for rate in learning_rates for decay in weight_decays]
    report = progress or (lambda _done: None)

    def train(part: torch.Tensor, truth: torch.Tensor, heads: list[ProbeSetting], done: int) -> TrainedProbes:
        return train_probes(
            part,
            truth,
            len(classes),
            heads,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            progress=lambda epoch: report(done + epoch),
        )

    validation: tuple[HeadScore, ...] = ()
    warnings: tuple[str, ...] = ()
    best, done = settings[0], 0
    if len(settings) > 1:
        parts = stratified_split(targets.numpy(), 1 - validation_fraction, seed)
        kept, held_out = (torch.from_numpy(part) for part in parts)
        if not len(held_out):
            raise InputError("train_labels: one image in each class, none left to choose a head by; give one setting")
        grid = train(features[kept], targets[kept], settings, done)
        accuracies = grid.accuracies(features[held_out], targets[held_out])
        validation = tuple(
            HeadScore(setting.learning_rate, setting.weight_decay, accuracy, finite)
            for setting, accuracy, finite in zip(settings, accuracies, grid.finite, strict=True)
        )
        best, warnings, done = _choose(validation), _warnings(validation), epochs
    probe = train(features, targets, [best], done)
    if not probe.finite[0]:
        raise InputError(f"learning_rates: the probe at {best.learning_rate:g} diverged; wanted a smaller one")
    result = GridProbe(
        weight=probe.weight[0].double(),
        bias=probe.bias[0].double(),
        classes=classes,
        setting=best,
        validation=validation,
        warnings=warnings,
    )
    if test_features is None or test_labels is None:
        return result
    return replace(result, test_accuracy=result.accuracy(test_features, test_labels))


def check_grid_settings(
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    validation_fraction: float,
) -> None:
    """Raises InputError for settings out of range; for a command to call before it computes features."""
    for name, values, least in (("learning_rates", learning_rates, "above 0"), ("weight_decays", weight_decays, "")):
        if not len(values):
            raise InputError(f"{name}: none given to choose from")
        if len(set(values)) < len(values):
            raise InputError(f"{name}: {min(v for v in values if list(values).count(v) > 1):g} is given twice")
        for value in values:
            if not 0 <= value < math.inf or (least and value == 0):
                raise InputError(f"{name}: {value}, wanted a finite number {least or 'of at least 0'}")
    if epochs < 1:
        raise InputError(f"epochs: {epochs}, wanted at least 1")
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size}, wanted at least 1 image a step")
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction: {validation_fraction}, wanted between 0 and 1")


def _choose(validation: tuple[HeadScore, ...]) -> ProbeSetting:
    finite = [score for score in validation if score.finite]
    if not finite:
        smallest = min(score.learning_rate for score in validation)
        raise InputError(f"learning_rates: every probe diverged, that at {smallest:g} too; wanted smaller ones")
    best = max(finite, key=lambda score: (score.accuracy, -score.learning_rate, score.weight_decay))
    return ProbeSetting(best.learning_rate, best.weight_decay)


def _warnings(validation: tuple[HeadScore, ...]) -> tuple[str, ...]:
    warnings = []
    diverged = sum(not score.finite for score in validation)
    if diverged:
        warnings.append(f"{diverged} of the {len(validation)} probes diverged and were not chosen")
    best, rates = _choose(validation).learning_rate, [score.learning_rate for score in validation]
    if min(rates) < max(rates) and best in (min(rates), max(rates)):
        which, where = ("smallest", "below") if best == min(rates) else ("largest", "above")
        warnings.append(
            f"the learning rate chosen, {best:.2g}, is the {which} of those tried: a better one may lie {where}"
        )
    return tuple(warnings)
