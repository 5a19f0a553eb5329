"""Mistakes that cost a training and can be known before it."""

from torch import nn
from torch.optim import Optimizer

from simclr_scale.errors import InputError
from simclr_scale.optim import warmup_cosine
from simclr_scale.scaling.plan.optimizers import is_adaptive

# Steps as long as the rate leave no weight as it was: those of networks are some hundredths in size. Published recipes
# with Adam stay below .01; ours for small networks reach .02.
_LARGEST_ADAPTIVE_RATE = 0.1


def refuse_mistakes(
    *,
    global_batch_size: int,
    train_images: int,
    ranks: int,
    loss: nn.Module,
    optimizer: Optimizer,
    learning_rate: float,
    default_rate: bool,
    warmup_steps: int,
    total_steps: int,
) -> None:
    """Says what is wrong, if anything is.

    Args:
        learning_rate: the peak.
        default_rate: whether the base rate is that of LARS, for want of another.

    Raises:
        InputError: a batch that does not divide by the ranks or is larger than the training set; negatives of a rank
            alone where there are several; an adaptive optimizer with a rate of LARS; a warm-up longer than training.
    """
    if global_batch_size % ranks:
        near = max(1, round(global_batch_size / ranks)) * ranks
        raise InputError(f"data.global_batch_size {global_batch_size} does not divide by the {ranks} ranks; use {near}")
    if global_batch_size > train_images:
        raise InputError(
            f"data.global_batch_size {global_batch_size} is larger than the training set of {train_images} images"
        )
    if ranks > 1 and getattr(loss, "gather", True) is False:
        own = 2 * global_batch_size // ranks - 2
        raise InputError(
            f"model.loss has gather: false, so each row sees {own} negatives of its own rank and not the "
            f"{2 * global_batch_size - 2} of all {ranks}; leave it out"
        )
    if is_adaptive(optimizer) and (default_rate or learning_rate >= _LARGEST_ADAPTIVE_RATE):
        whose = "the default of LARS" if default_rate else f"limit {_LARGEST_ADAPTIVE_RATE}"
        raise InputError(
            f"model.learning_rate comes to {learning_rate:g} at this batch ({whose}), which is a rate for LARS: "
            f"{type(optimizer).__name__} moves every weight by as much in a step; use one that comes to 0.001 to 0.02"
        )
    warmup_cosine(0, warmup_steps=warmup_steps, total_steps=total_steps)
