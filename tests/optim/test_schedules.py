"""The schedule and the scaling of the learning rate against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from simclr_scale.errors import InputError
from simclr_scale.optim import DEFAULT_BASE_LEARNING_RATE, LARS, scaled_learning_rate, warmup_cosine

# Google's 100 epochs of ImageNet at 4096 with 10 of warm-up; no warm-up; one step of each; nothing but warm-up.
LENGTHS = [(3127, 31279), (0, 17), (1, 2), (7, 50)]


def google_schedule(steps: np.ndarray, warmup: int, total: int) -> np.ndarray:
    """`WarmUpAndCosineDecay` of tf2/model.py over keras' CosineDecay, which holds its end value."""
    decay_steps = total - warmup
    cosine = 0.5 * (1 + np.cos(np.pi * np.minimum(steps - warmup, decay_steps) / decay_steps))
    return np.where(steps < warmup, steps / max(warmup, 1), cosine)


@pytest.mark.parametrize(("warmup", "total"), LENGTHS)
def test_every_step_follows_google(warmup: int, total: int) -> None:
    steps = np.arange(total + 5)
    ours = [warmup_cosine(int(step), warmup_steps=warmup, total_steps=total) for step in steps]
    np.testing.assert_allclose(ours, google_schedule(steps, warmup, total), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("warmup", "total"), [(3127, 31279), (1, 2), (7, 50)])
def test_the_rate_starts_at_0_peaks_after_warmup_and_ends_one_step_from_0(warmup: int, total: int) -> None:
    factors = [warmup_cosine(step, warmup_steps=warmup, total_steps=total) for step in range(total)]
    assert factors[0] == 0
    assert factors[warmup] == 1 == max(factors)
    assert factors.index(1) == warmup
    assert factors[-1] > 0
    assert warmup_cosine(total, warmup_steps=warmup, total_steps=total) == 0


def test_training_may_be_all_warmup() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=4) for step in range(5)]
    assert factors == [0, 0.25, 0.5, 0.75, 1]


def test_the_first_optimizer_step_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = LARS([parameter], lr=4.8)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps=2, total_steps=10))
    optimizer.step()
    assert parameter.tolist() == [1, 1, 1]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 2.4


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_the_paper_batch_gives_4_8_under_both_rules(scaling) -> None:  # type: ignore[no-untyped-def]
    assert scaled_learning_rate(DEFAULT_BASE_LEARNING_RATE[scaling], 4096, scaling) == 4.8


@pytest.mark.parametrize("batch", [1, 255, 256, 8192])
def test_scaling_follows_its_formula(batch: int) -> None:
    assert scaled_learning_rate(0.3, batch, "linear") == pytest.approx(0.3 * batch / 256, rel=1e-15)
    assert scaled_learning_rate(0.075, batch, "sqrt") == pytest.approx(0.075 * batch**0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("step", "warmup", "total", "message"),
    [
        (0, 11, 10, "at most the 10 of training, got 11"),
        (0, -1, 10, "at least 0 steps .* got -1"),
        (0, 0, 0, "at least 1 step, got total_steps=0"),
        (-1, 0, 10, "counted from 0, got -1"),
    ],
)
def test_impossible_lengths_are_refused(step: int, warmup: int, total: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        warmup_cosine(step, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize(
    ("base", "batch", "scaling", "message"),
    [
        (0.3, 256, "liner", "unknown learning rate scaling 'liner': did you mean 'linear'"),
        (0.3, 256, "cubic", "it is 'linear' or 'sqrt'"),
        (-0.3, 256, "linear", "finite and above 0, got -0.3"),
        (math.inf, 256, "linear", "finite and above 0, got inf"),
        (0.3, 0, "linear", "at least 1 image, got 0"),
    ],
)
def test_impossible_scaling_is_refused(base, batch, scaling, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        scaled_learning_rate(base, batch, scaling)
