"""The learning rate: its scaling with the batch, and its course over training.

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv:2002.05709),
section 2.2 and appendix B.1 (scaling by the square root); google-research/simclr, tf2/model.py,
`WarmUpAndCosineDecay`.
"""

import math
from difflib import get_close_matches
from typing import Literal

from simclr_scale.errors import InputError

# Both give 4.8 at the paper's batch of 4096.
DEFAULT_BASE_LEARNING_RATE: dict[Literal["linear", "sqrt"], float] = {"linear": 0.3, "sqrt": 0.075}


def scaled_learning_rate(base: float, global_batch_size: int, scaling: Literal["linear", "sqrt"]) -> float:
    """The peak learning rate for a batch: `base * batch / 256` (linear) or `base * sqrt(batch)` (sqrt).

    Args:
        base: Base learning rate, above 0; `DEFAULT_BASE_LEARNING_RATE` has the paper's for either rule.
        global_batch_size: Images in one optimizer step over all ranks, each counted once however many views it has.
        scaling: The rule.

    Raises:
        InputError: A rule of another name, a rate that is not a positive number, or a batch below 1.
    """
    if not 0 < base < math.inf:
        raise InputError(f"the base learning rate must be finite and above 0, got {base}")
    if global_batch_size < 1:
        raise InputError(f"the global batch must hold at least 1 image, got {global_batch_size}")
    if scaling == "linear":
        return base * global_batch_size / 256
    if scaling == "sqrt":
        return base * math.sqrt(global_batch_size)
    close = get_close_matches(str(scaling), DEFAULT_BASE_LEARNING_RATE)
    raise InputError(
        f"unknown learning rate scaling {scaling!r}: "
        + (f"did you mean {close[0]!r}?" if close else "it is 'linear' or 'sqrt'")
    )


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The factor on the peak learning rate at a step: a linear rise from 0, then half a cosine down to 0.

    Args:
        step: Optimizer steps taken so far: 0 at the first, whose factor is 0 where there is a warm-up.
        warmup_steps: The step at which the factor is 1, at least 0 and at most `total_steps`.
        total_steps: Steps of the whole training, at least 1. The factor is 0 from this step on, one step after the
            last (1 where the warm-up fills all of training).

    Returns:
        A number in [0, 1].

    Raises:
        InputError: A number of steps is out of its range.
    """
    if total_steps < 1:
        raise InputError(f"training must have at least 1 step, got total_steps={total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise InputError(
            f"warm-up must have at least 0 steps and at most the {total_steps} of training, got {warmup_steps}: "
            "train longer or warm up for fewer epochs"
        )
    if step < 0:
        raise InputError(f"a step is counted from 0, got {step}")
    if step < warmup_steps:
        return step / warmup_steps
    if warmup_steps == total_steps:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return 0.5 * (1.0 + math.cos(math.pi * progress))
