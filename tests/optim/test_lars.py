"""LARS against a transcription of Google's rule in NumPy, and against the ways in which ports get it wrong."""

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.optim import LARS, warmup_cosine

Array = NDArray[np.float64]

STEPS = 50
RATES = [4.8 * warmup_cosine(step, warmup_steps=10, total_steps=STEPS) for step in range(STEPS)]
SHAPES = [(), (7,), (3, 5), (33, 17, 3, 3)]


def google_lars(
    parameter: Array,
    gradients: Sequence[Array],
    rates: Sequence[float],
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    nesterov: bool = False,
    adapt: bool = True,
) -> tuple[Array, Array]:
    """The classic-momentum branch of tf2/lars_optimizer.py, in float64; gives the parameter and its buffer."""
    p, v = parameter, np.zeros_like(parameter)
    for gradient, rate in zip(gradients, rates, strict=True):
        g = gradient + weight_decay * p
        trust = 1.0
        if adapt:
            p_norm, g_norm = math.sqrt(np.sum(p * p)), math.sqrt(np.sum(g * g))
            if p_norm > 0 and g_norm > 0:
                trust = trust_coefficient * p_norm / g_norm
        v = momentum * v + rate * trust * g
        p = p - (momentum * v + rate * trust * g if nesterov else v)
    return p, v


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, steps: int = STEPS
) -> tuple[nn.Parameter, list[torch.Tensor], Array, list[Array]]:
    """A parameter and its gradients, in torch and, value for value, in float64."""
    generator = torch.Generator().manual_seed(len(shape) + 1)
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    # Gradients small enough that an unadapted scalar at these rates does not pass through 0, where relative error
    # means nothing.
    start, *gradients = (draws[0].to(dtype), *((1e-3 * draw).to(dtype) for draw in draws[1:]))
    return nn.Parameter(start.clone()), gradients, start.double().numpy(), [g.double().numpy() for g in gradients]


def run(optimizer: LARS, parameter: nn.Parameter, gradients: list[torch.Tensor], rates: Sequence[float]) -> None:
    for gradient, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()


def relative_error(ours: torch.Tensor, reference: Array) -> float:
    return float(np.abs(ours.detach().double().numpy() - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
@pytest.mark.parametrize("shape", SHAPES)
def test_fifty_steps_of_a_changing_rate_follow_google(
    shape: tuple[int, ...], weight_decay: float, adapt: bool, nesterov: bool, dtype: torch.dtype, tolerance: float
) -> None:
    parameter, gradients, start, reference_gradients = problem(shape, dtype)
    optimizer = LARS([{"params": [parameter], "adapt": adapt}], lr=0.0, weight_decay=weight_decay, nesterov=nesterov)
    run(optimizer, parameter, gradients, RATES)
    p, v = google_lars(start, reference_gradients, RATES, weight_decay=weight_decay, nesterov=nesterov, adapt=adapt)
    assert relative_error(parameter, p) <= tolerance
    assert relative_error(optimizer.state[parameter]["momentum_buffer"], v) <= tolerance


def rate_outside_the_buffer(p: Array, gradients: Sequence[Array], rates: Sequence[float], weight_decay: float) -> Array:
    v = np.zeros_like(p)
    for gradient, rate in zip(gradients, rates, strict=True):
        g = gradient + weight_decay * p
        v = 0.9 * v + 1e-3 * np.linalg.norm(p) / np.linalg.norm(g) * g
        p = p - rate * v
    return p


def norms_added_apart(p: Array, gradients: Sequence[Array], rates: Sequence[float], weight_decay: float) -> Array:
    v = np.zeros_like(p)
    for gradient, rate in zip(gradients, rates, strict=True):
        trust = 1e-3 * np.linalg.norm(p) / (np.linalg.norm(gradient) + weight_decay * np.linalg.norm(p))
        v = 0.9 * v + rate * trust * (gradient + weight_decay * p)
        p = p - v
    return p


@pytest.mark.parametrize("faulty", [rate_outside_the_buffer, norms_added_apart])
def test_the_comparison_tells_the_rules_of_other_ports_apart(faulty) -> None:  # type: ignore[no-untyped-def]
    parameter, gradients, start, reference_gradients = problem((40,), torch.float64)
    run(LARS([parameter], lr=0.0, weight_decay=1e-3), parameter, gradients, RATES)
    assert relative_error(parameter, faulty(start, reference_gradients, RATES, weight_decay=1e-3)) > 1e-3


def test_weight_decay_0_does_not_switch_adaptation_off() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    parameter.grad = torch.tensor([0.0, 20.0], dtype=torch.float64)
    LARS([parameter], lr=2.0, weight_decay=0.0, trust_coefficient=0.1).step()
    # trust = .1 * 5 / 20, so the step is 2 * .025 * 20 = 1.
    torch.testing.assert_close(parameter.data, torch.tensor([3.0, 3.0], dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_group_without_adaptation_is_still_decayed() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    parameter.grad = torch.zeros(2)
    LARS([{"params": [parameter], "adapt": False}], lr=0.5, weight_decay=0.5).step()
    assert parameter.tolist() == [2.25, 3.0]


def test_norms_are_exact_at_the_size_of_a_resnet_layer() -> None:
    # The 3x3 convolution of ResNet-50's last stage; a sequential sum in float32 errs here by up to 1e-3.
    shape = (512, 512, 3, 3)
    start = torch.full(shape, 0.0217)
    gradient = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    parameter = nn.Parameter(start.clone())
    run(LARS([parameter], lr=0.0, trust_coefficient=1.0), parameter, [gradient], [0.5])
    p, _ = google_lars(start.double().numpy(), [gradient.double().numpy()], [0.5], trust_coefficient=1.0)
    assert relative_error(parameter, p) <= 1e-6


def test_bfloat16_parameters_move_as_in_float32_but_for_rounding() -> None:
    parameter, gradients, start, reference_gradients = problem((300, 200), torch.bfloat16, steps=1)
    run(LARS([parameter], lr=0.0, weight_decay=1e-4, trust_coefficient=1.0), parameter, gradients, [0.5])
    p, _ = google_lars(start, reference_gradients, [0.5], weight_decay=1e-4, trust_coefficient=1.0)
    # bfloat16 has 8 significant bits: rounding once, at the end, errs by 2^-8 at most, relative to the result.
    error = np.abs(parameter.detach().double().numpy() - p)
    assert (error <= 2.0**-8 * np.abs(p) + 1e-7).all()


@pytest.mark.parametrize(
    ("start", "gradient", "weight_decay", "moved_to"),
    [
        pytest.param([0.0, 0.0], [1.0, -2.0], 0.0, [-0.5, 1.0], id="zero parameter"),
        pytest.param([3.0, 4.0], [0.0, 0.0], 0.0, [3.0, 4.0], id="zero gradient"),
        pytest.param([0.0, 0.0], [0.0, 0.0], 0.1, [0.0, 0.0], id="both zero"),
        pytest.param([3.0, 4.0], [0.0, 0.0], 0.25, [2.994, 3.992], id="zero gradient, decayed"),
    ],
)
def test_the_trust_ratio_is_1_where_a_norm_is_0(
    start: list[float], gradient: list[float], weight_decay: float, moved_to: list[float]
) -> None:
    parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    # In the last case g' = .25 p, so trust = .004 / .25 and the step is .5 * trust * .25 p = .002 p.
    LARS([parameter], lr=0.5, weight_decay=weight_decay, trust_coefficient=4e-3).step()
    torch.testing.assert_close(parameter.data, torch.tensor(moved_to, dtype=torch.float64), rtol=1e-14, atol=0)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LARS([parameter], lr=1.0, weight_decay=0.1)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert not optimizer.state


def test_momentum_0_keeps_no_buffer() -> None:
    parameter, gradients, start, reference_gradients = problem((3, 5), torch.float64)
    optimizer = LARS([parameter], lr=0.0, momentum=0.0, weight_decay=1e-4)
    run(optimizer, parameter, gradients, RATES)
    p, _ = google_lars(start, reference_gradients, RATES, momentum=0.0, weight_decay=1e-4)
    assert relative_error(parameter, p) <= 1e-12
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumed_from_its_state_dict_is_the_run_without_a_stop(dtype: torch.dtype) -> None:
    parameter, gradients, _, _ = problem((33, 17, 3, 3), dtype)
    optimizer = LARS([{"params": [parameter], "name": "adapted"}], lr=0.0, weight_decay=1e-4, nesterov=True)
    run(optimizer, parameter, gradients[:20], RATES[:20])
    file = io.BytesIO()
    torch.save({"parameter": parameter.data, "optimizer": optimizer.state_dict()}, file)
    run(optimizer, parameter, gradients[20:], RATES[20:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_parameter = nn.Parameter(saved["parameter"])
    resumed = LARS([{"params": [resumed_parameter], "name": "adapted"}], lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, resumed_parameter, gradients[20:], RATES[20:])
    assert torch.equal(resumed_parameter, parameter)
    assert resumed.param_groups[0]["nesterov"] is True


def test_a_step_reads_no_value_back_from_the_device() -> None:
    # A tensor on the meta device has no values: whatever would wait for one raises.
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()
    parameter = nn.Parameter(torch.ones(3, 5, device="meta"))
    parameter.grad = torch.ones(3, 5, device="meta")
    optimizer = LARS([parameter], lr=1.0, weight_decay=1e-4, nesterov=True)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].shape == (3, 5)


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LARS([parameter], lr=1.0, trust_coefficient=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 25.0
    torch.testing.assert_close(parameter.data, torch.tensor([2.7, 3.6], dtype=torch.float64), rtol=1e-14, atol=0)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"dense gradient; a parameter of shape \(5, 3\).*sparse=False"):
        LARS(embedding.parameters(), lr=1.0).step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be finite and at least 0, got nan"),
        ({"lr": 1.0, "weight_decay": -1e-4}, "weight_decay must be finite and at least 0, got -0.0001"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"lr": 1.0, "trust_coefficient": 0.0}, "trust_coefficient must be finite and above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_for_the_optimizer_and_for_a_group(
    settings: dict[str, float], message: str
) -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=message):
        LARS([parameter], **settings)
    with pytest.raises(InputError, match=message):
        LARS([{"params": [parameter], **settings}], lr=1.0)
