"""Figures of a plan against those worked out by hand, and the mistakes that it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.losses import NTXentLoss
from simclr_scale.models import create_encoder
from simclr_scale.optim import LARS
from simclr_scale.pretraining import SimCLR
from simclr_scale.scaling.plan import Settings, make_plan
from simclr_scale.scaling.plan.footprint import gathered_bytes
from simclr_scale.scaling.plan.optimizers import make_on_a_small_layer, state_of_a_byte
from simclr_scale.scaling.plan.printing import duration, memory_lines, size

CPU = torch.device("cpu")
SETTINGS = Settings(10_000, (3, 16, 16), 64, 4, 100, -1, "32-true", 2**30)


def model(**options: Any) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(create_encoder("simclr_resnet_tiny", channels=[4, 6, 8]), **options)


def test_figures_by_hand() -> None:
    simclr = model(warmup_epochs=10)
    plan = make_plan(simclr, SETTINGS, device=CPU)
    parameters = sum(p.numel() for part in (simclr.encoder, simclr.head) for p in part.parameters())
    assert plan.parameters == parameters
    assert (plan.steps_an_epoch, plan.steps, plan.warmup_steps) == (156, 15_600, 1560)
    assert plan.learning_rate == pytest.approx(0.3 * 64 / 256)
    assert plan.negatives == 126
    assert plan.images_of_a_rank == 16
    assert plan.memory["optimizer state"] == plan.memory["gradients"] == 4 * parameters
    assert plan.memory["gradient buckets of DDP"] == 4 * parameters
    assert plan.memory["images"] == 32 * 3 * 16 * 16 * 4
    norms = [m.num_features for m in simclr.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = sum(b.nbytes for part in (simclr.encoder, simclr.head) for b in part.buffers())
    sent = 3 * (8 + 32 * 128 * 4 + 32 * 4) + 2 * 3 / 4 * 4 * parameters + buffers
    sent += sum(3 * 4 * (2 * c + 1) + 2 * 3 / 4 * 8 * c for c in norms)
    assert plan.sent_bytes_per_step == pytest.approx(sent, abs=4)
    assert plan.fits
    assert plan.largest_chunk == 32
    assert (plan.seconds_per_step, plan.images_per_second, plan.measured_images) == (None, None, None)


def test_the_published_run() -> None:
    settings = replace(SETTINGS, train_images=1_281_167, global_batch_size=4096, ranks=128)
    plan = make_plan(model(), settings, device=CPU)
    assert plan.headline_images_per_second == pytest.approx(23_725, rel=1e-4)
    assert plan.headline_per_device == pytest.approx(185.4, abs=0.05)
    assert (plan.steps, plan.learning_rate, plan.negatives) == (31_200, 4.8, 8190)
    # 31,200 steps where Google's stream makes 31,279
    assert plan.headline_seconds == pytest.approx(5400 * 31_200 / 31_279)


def test_steps_that_end_training_and_a_limit_of_an_epoch() -> None:
    plan = make_plan(model(), replace(SETTINGS, max_steps=2000), device=CPU)
    assert plan.steps == 2000
    plan = make_plan(model(), replace(SETTINGS, epochs=None, max_steps=2000, steps_of_an_epoch=20), device=CPU)
    assert (plan.steps, plan.warmup_steps) == (2000, 200)
    with pytest.raises(InputError, match="training has no end"):
        make_plan(model(), replace(SETTINGS, epochs=None), device=CPU)


def test_too_small_a_device_takes_chunks_or_nothing() -> None:
    settings = replace(SETTINGS, global_batch_size=512, ranks=1, train_images=100_000)
    whole = make_plan(model(), settings, device=CPU)
    assert whole.largest_chunk == 1024
    less = replace(settings, device_memory=whole.peak_bytes * 2 // 3)
    small = make_plan(model(), less, device=CPU)
    assert not small.fits
    assert small.largest_chunk is not None
    assert 2 < small.largest_chunk < 1024
    assert make_plan(model(chunk_size=small.largest_chunk), less, device=CPU).fits
    assert make_plan(model(), replace(settings, device_memory=2**20), device=CPU).largest_chunk is None
    assert ("largest chunk", f"{small.largest_chunk:,} of 1,024 views: --model.chunk_size {small.largest_chunk}") in (
        memory_lines(small)
    )


def test_measured_steps_give_times() -> None:
    plan = make_plan(model(), SETTINGS, device=CPU, measure_steps=2)
    assert plan.measured_images == 16
    assert plan.seconds_per_step is not None
    assert plan.seconds_per_step > 0
    assert plan.seconds_per_epoch == pytest.approx(156 * plan.seconds_per_step)
    assert plan.seconds == pytest.approx(15_600 * plan.seconds_per_step)
    assert plan.images_per_second == pytest.approx(64 / plan.seconds_per_step)
    assert plan.images_per_second_per_device == pytest.approx(16 / plan.seconds_per_step)


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"global_batch_size": 66}, "data.global_batch_size 66 does not divide by the 4 ranks; use 64"),
    ({}, {"global_batch_size": 10_004}, "is larger than the training set of 10000 images"),
    ({"loss": NTXentLoss(gather=False)}, {}, "each row sees 30 negatives of its own rank and not the 126 of all 4"),
    ({"optimizer": torch.optim.Adam}, {}, "comes to 0.075 at this batch .the default of LARS., which is a rate for"),
    (
        {"optimizer": torch.optim.AdamW, "learning_rate": 0.3},
        {"global_batch_size": 4096},
        "comes to 4.8 at this batch .limit 0.1., which is a rate for LARS: AdamW moves every weight",
    ),
    ({"warmup_epochs": 101}, {}, "warm-up must have at least 0 steps and at most the 15600 of training, got 15756"),
]


@pytest.mark.parametrize(("options", "changes", "message"), MISTAKES)
def test_mistakes(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    settings = replace(SETTINGS, default_rate="learning_rate" not in options, **changes)
    with pytest.raises(InputError, match=message) as refused:
        make_plan(model(**options), settings, device=CPU)
    assert "\n" not in str(refused.value)


def test_what_is_no_mistake() -> None:
    make_plan(model(loss=NTXentLoss(gather=False)), replace(SETTINGS, ranks=1), device=CPU)
    make_plan(model(optimizer=torch.optim.AdamW, learning_rate=0.08), SETTINGS, device=CPU)
    make_plan(model(), replace(SETTINGS, global_batch_size=4096, default_rate=True), device=CPU)


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        (None, 1),
        (lambda groups, lr: LARS(groups, lr, momentum=0.0), 0),
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
    ],
)
def test_state_of_an_optimizer(make: Any, ratio: float) -> None:
    assert state_of_a_byte(make_on_a_small_layer(make, 0.1)) == ratio


def test_rows_of_other_ranks() -> None:
    assert gathered_bytes(NTXentLoss(), 32, 4, 128, 2) == 96 * (128 * 14 + 24)
    assert gathered_bytes(NTXentLoss(gather=False), 32, 4, 128, 2) == 0
    assert gathered_bytes(NTXentLoss(), 32, 1, 128, 2) == 0


def test_words_for_numbers() -> None:
    assert [size(3 * 2**29), size(5 * 2**20), size(512)] == ["1.50 GiB", "5.00 MiB", "0.5 KiB"]
    assert [duration(s) for s in (5, 150, 7200, 3 * 86400)] == ["5 s", "2.5 min", "2 h", "3 days"]
