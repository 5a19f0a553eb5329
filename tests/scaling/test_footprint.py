"""Memory that is planned against the peak of torch's own allocations in a real step, seen by its profiler."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from simclr_scale.models import create_encoder
from simclr_scale.models.chunked import encode_in_chunks
from simclr_scale.optim import param_groups
from simclr_scale.pretraining import SimCLR
from simclr_scale.scaling.plan import Settings, make_plan
from simclr_scale.scaling.plan.chunks import largest_chunk
from simclr_scale.scaling.plan.footprint import Network

RESNET = ("simclr_resnet18", {"small_images": True, "width": 0.5}, 32)
VIT = ("test_vit", {"img_size": 64, "patch_size": 4}, 64)
TINY = ("simclr_resnet_tiny", {"channels": [48, 96, 192]}, 32)


def model(kind: tuple[str, dict[str, Any], int], **options: Any) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(create_encoder(kind[0], **kind[1]), **options)


def bytes_of_a_real_step(simclr: SimCLR, rows: int, size: int, bf16: bool) -> int:
    """What lives all along, and the most that one step allocates beyond it."""
    parts = nn.ModuleList([simclr.encoder, simclr.head]).train()
    make: Any = simclr._optimizer
    if make is None:
        from simclr_scale.optim import LARS as make
    optimizer = make(param_groups(parts, 1e-4), 1e-4)
    x = torch.rand(rows, 3, size, size)
    memory_format = torch.channels_last if simclr.channels_last else torch.preserve_format

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if simclr.chunk_size is None:
                h = simclr.encoder(x.to(memory_format=memory_format))
            else:
                h = encode_in_chunks(simclr.encoder, x, simclr.chunk_size, memory_format)
            loss = simclr.loss(simclr.head(h))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return peak + sum(t.nbytes for t in (*parts.parameters(), *parts.buffers(), *state, x))


@pytest.mark.parametrize(
    ("kind", "rows", "options", "precision"),
    [
        (RESNET, 16, {}, "32-true"),
        (RESNET, 24, {"chunk_size": 8}, "32-true"),
        (VIT, 16, {"optimizer": torch.optim.AdamW, "learning_rate": 0.001}, "bf16-mixed"),
        (VIT, 32, {}, "32-true"),
        (VIT, 64, {"chunk_size": 16}, "32-true"),
        (TINY, 64, {"channels_last": True}, "32-true"),
    ],
)
def test_the_planned_peak_is_that_of_a_real_step(
    kind: tuple[str, dict[str, Any], int], rows: int, options: dict[str, Any], precision: str
) -> None:
    simclr, size = model(kind, **options), kind[2]
    settings = Settings(1000, (3, size, size), rows // 2, 1, 100, -1, precision, 2**33)
    planned = make_plan(simclr, settings, device=torch.device("cpu"))
    real = bytes_of_a_real_step(simclr, rows, size, precision == "bf16-mixed")
    assert planned.peak_bytes == pytest.approx(real, rel=0.15)


def test_the_model_is_left_as_it_was() -> None:
    simclr = model(TINY)
    before = {key: value.clone() for key, value in simclr.state_dict().items()}
    simclr.eval()
    network = Network(simclr.encoder, simclr.head, simclr.loss, image=(3, 32, 32))
    network.peak(8)
    assert all(torch.equal(value, before[key]) for key, value in simclr.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in simclr.parameters())
    assert not simclr.encoder.training


def test_bytes_that_are_known_exactly() -> None:
    simclr = model(TINY)
    network = Network(simclr.encoder, simclr.head, simclr.loss, image=(3, 32, 32))
    parameters = sum(p.numel() for part in (simclr.encoder, simclr.head) for p in part.parameters())
    assert network.gradient_bytes() == 4 * parameters
    assert network.image_bytes(10) == 10 * 3 * 32 * 32 * 4
    assert network.width() == 128
    half = Network(simclr.encoder, simclr.head, simclr.loss, image=(3, 32, 32), precision="bf16-true")
    assert half.gradient_bytes() == 2 * parameters


def test_flops_by_hand() -> None:
    """One convolution, one linear layer: each product twice in backward, but for that of the images."""

    class Small(nn.Module):
        num_features = 5

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.convolution(x).mean((2, 3))

    head = nn.Linear(5, 7)
    network = Network(Small(), head, nn.Identity(), image=(3, 6, 6))
    convolution, linear = 2 * 3 * 9 * 5 * 36, 2 * 5 * 7
    assert network.flops(8) == 8 * (2 * convolution + 3 * linear)
    assert network.flops(8, 2) == round(8 * (2 * convolution + 3 * linear) * 15 / 12)


def test_the_largest_chunk_against_all_of_them() -> None:
    simclr, rows = model(TINY), 12
    network = Network(simclr.encoder, simclr.head, simclr.loss, image=(3, 64, 64))
    sizes = sorted({-(-rows // chunks) for chunks in range(1, rows // 2 + 1)})
    peaks = {size: network.peak(rows, size).step for size in sizes}
    assert list(peaks.values()) == sorted(peaks.values())  # else there would be no largest one to find
    for budget in (peaks[2] - 1, peaks[2], peaks[4], peaks[4] - 1, peaks[12] - 1, peaks[12]):
        fitting = [size for size in sizes if peaks[size] <= budget]
        assert largest_chunk(network, rows, budget) == (max(fitting) if fitting else None)
