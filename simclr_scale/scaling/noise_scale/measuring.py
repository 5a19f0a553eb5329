"""The three ways to measure, of any model and loss whose gradient a function gives."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.sampler import epoch_order
from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.losses import couples_ranks
from simclr_scale.scaling.noise_scale.estimates import (
    NoiseScale,
    gram_of,
    jackknife_estimate,
    mean_of,
    per_rank_estimate,
    probe_estimate,
)
from simclr_scale.scaling.noise_scale.gradients import mean_over_ranks

Mode = Literal["probe", "per_rank", "jackknife"]
MODES: tuple[str, ...] = get_args(Mode)

# An epoch that training never reaches: the images of a probe come in an order and in views of their own.
_EPOCH = 1 << 40


def check_mode(mode: str, loss: nn.Module | None, *, force: bool = False, ranks: int | None = None) -> None:
    """Whether a mode can be trusted with a loss.

    Raises:
        InputError: there is no such mode, or per_rank is asked for on one rank, or of a loss whose ranks hang together.
    """
    if mode not in MODES:
        raise InputError(f"mode: there is no {mode!r}; there are {', '.join(MODES)}")
    if mode != "per_rank":
        return
    if ranks == 1:
        raise InputError("mode per_rank compares the gradients of ranks, and there is one: take mode probe")
    if loss is not None and couples_ranks(loss) and not force:
        raise InputError(
            f"mode per_rank is wrong for {type(loss).__name__} with negatives from all ranks: their gradients are "
            "correlated and the loss is no sum over images (errors of x0.05 to x27 were measured); take mode probe, or "
            "force it"
        )


def probe(gradient_of: Callable[[Tensor], Tensor], batches: Iterable[Tensor], batch: int) -> NoiseScale:
    """From independent global batches at frozen weights.

    Keeps their gradients on the CPU: 4 bytes a parameter for each batch.

    Args:
        gradient_of: a batch (of this rank's share) -> (P,), the gradient over all ranks.
        batch: images of a global batch.
    """
    return probe_estimate(gram_of([gradient_of(one).cpu() for one in batches]), batch)


def per_rank(own_gradient_of: Callable[[Tensor], Tensor], batches: Iterable[Tensor], batch: int) -> NoiseScale:
    """From each rank's gradient and their mean, averaged over batches.

    Args:
        own_gradient_of: a batch of this rank's share -> (P,), the gradient that it has by itself.
        batch: images of a global batch.
    """
    estimates = []
    for one in batches:
        gradient = own_gradient_of(one)
        square = gradient.double().square().sum()
        squares = [torch.zeros_like(square) for _ in range(world().size)]
        if len(squares) > 1:
            dist.all_gather(squares, square)
        else:
            squares = [square]
        whole = float(mean_over_ranks(gradient).double().square().sum())
        estimates.append(per_rank_estimate([float(value) for value in squares], whole, batch))
    return mean_of(estimates)


def jackknife(gradient_of: Callable[[Tensor], Tensor], batches: Iterable[Tensor], batch: int, parts: int) -> NoiseScale:
    """From global batches, each also without a part of its images in turn (the same of every rank).

    Args:
        gradient_of: as for :func:`probe`.
        batches: (2n, ...), [first views; second views] of this rank's share, n a multiple of ``parts``.
        batch: images of a global batch.
        parts: K.
    """
    estimates = []
    for one in batches:
        whole = float(gradient_of(one).double().square().sum())
        gram = gram_of([gradient_of(rest).cpu() for rest in _with_a_part_left_out(one, parts)])
        estimates.append(jackknife_estimate(whole, gram, batch))
    return mean_of(estimates)


def _with_a_part_left_out(views: Tensor, parts: int) -> Iterator[Tensor]:
    n = len(views) // 2
    if parts < 2 or n % parts or n // parts == n:
        raise InputError(f"the jackknife needs parts of equal size, 2 of them at least: {n} images, {parts} parts")
    images = views.view(2, parts, n // parts, *views.shape[1:])
    for left_out in range(parts):
        kept = [part for part in range(parts) if part != left_out]
        yield images[:, kept].reshape(-1, *views.shape[1:])


def independent_batches(
    data: SimCLRDataModule, batch: int, count: int, device: torch.device, *, draw: int = 0
) -> Iterator[Tensor]:
    """This rank's shares (2n, C, H, W) of global batches that training never saw in these views.

    They have no image in common, unless they hold more images than there are; then some come again, in other views.

    Args:
        data: set up.
        batch: images of a global batch.
        count: of batches.
        draw: another number gives other batches.

    Raises:
        InputError: a batch does not divide by the ranks, or is larger than the training set.
    """
    assert data.train_source is not None, "set up the data module first"
    images, ranks = len(data.train_source), world()
    if batch > images:
        raise InputError(f"a batch of {batch} images is larger than the training set of {images} images")
    if batch % ranks.size or batch < 2 * ranks.size:
        raise InputError(f"a batch of {batch} images does not divide by {ranks.size} ranks, with 2 images to each")
    share, a_pass = batch // ranks.size, images // batch
    for number in range(count):
        # Each pass over the images has another order and other views.
        epoch = _EPOCH + draw * (1 << 20) + number // a_pass
        place = number % a_pass
        order = epoch_order(images, data.seed, epoch)
        first = place * batch + ranks.rank * share
        own = [int(index) for index in order[first : first + share]]
        yield data.batch_of(epoch, place, own)["inputs"].to(device)
