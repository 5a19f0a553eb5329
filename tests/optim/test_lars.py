"""LARS against a transcription of Google's rule in NumPy, and against the ways in which ports get it wrong."""

import io
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.optim import LARS, lars_multi_tensor, lars_per_tensor, param_groups, warmup_cosine

Array = NDArray[np.float64]

FORMS = {"per tensor": lars_per_tensor, "multi-tensor": lars_multi_tensor}

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


@pytest.fixture(params=[f"{form}, {move}" for form in FORMS for move in ("fused", "public operations")])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way in which a step is executed: the form for a GPU runs on CPU tensors here."""
    name, move = request.param.split(", ")
    monkeypatch.setattr("simclr_scale.optim.lars._form_for", lambda device: FORMS[name])
    if move == "public operations":
        monkeypatch.delattr(torch, "_fused_sgd_")
    return request.param


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
@pytest.mark.usefixtures("form")
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


@pytest.mark.usefixtures("form")
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


@pytest.mark.usefixtures("form")
def test_bfloat16_parameters_move_as_in_float32_but_for_rounding() -> None:
    # No larger: torch._foreach_norm adds up in sequence on a CPU and is off by 3e-6 at 60,000 elements.
    parameter, gradients, start, reference_gradients = problem((60, 50), torch.bfloat16, steps=1)
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
@pytest.mark.usefixtures("form")
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


@pytest.mark.usefixtures("form")
def test_momentum_0_keeps_no_buffer() -> None:
    parameter, gradients, start, reference_gradients = problem((3, 5), torch.float64)
    optimizer = LARS([parameter], lr=0.0, momentum=0.0, weight_decay=1e-4)
    run(optimizer, parameter, gradients, RATES)
    p, _ = google_lars(start, reference_gradients, RATES, momentum=0.0, weight_decay=1e-4)
    assert relative_error(parameter, p) <= 1e-12
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("form")
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


def whole_model(optimizer_of: Callable[[list[dict[str, Any]]], LARS], order: Sequence[int]) -> list[torch.Tensor]:
    """A few steps of parameters of several sizes and types; the parameters and buffers, in the same order always."""
    parameters = []
    for index, (shape, dtype) in enumerate(
        product([(300, 70, 3, 3), (5,), (1000,), ()], [torch.float32, torch.float64])
    ):
        generator = torch.Generator().manual_seed(index)
        parameters.append(nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
    chosen = [parameters[index] for index in order]
    optimizer = optimizer_of([{"params": chosen[::2]}, {"params": chosen[1::2], "momentum": 0.8}])
    for step in range(3):
        for index, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [
        x for index in sorted(order) for x in (parameters[index], optimizer.state[parameters[index]]["momentum_buffer"])
    ]


@pytest.mark.usefixtures("form")
def test_the_result_is_the_same_to_the_bit_in_every_run_whatever_else_there_is() -> None:
    def optimizer_of(groups: list[dict[str, Any]]) -> LARS:
        return LARS(groups, lr=0.3, weight_decay=1e-4)

    first = whole_model(optimizer_of, range(8))
    again = whole_model(optimizer_of, range(8))
    other_order = whole_model(optimizer_of, [4, 7, 2, 1, 6, 5, 0, 3])  # each stays in its group
    fewer = whole_model(optimizer_of, [2, 5])
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, other_order))
    assert all(map(torch.equal, [*first[4:6], *first[10:12]], fewer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("form")
def test_the_layout_in_memory_changes_nothing(dtype: torch.dtype) -> None:
    def moved(arrange: Callable[[torch.Tensor], torch.Tensor], of_gradient: Callable[[torch.Tensor], torch.Tensor]):
        parameter, gradients, _, _ = problem((33, 17, 3, 3), dtype, steps=3)
        arranged = nn.Parameter(arrange(parameter.data))
        optimizer = LARS([arranged], lr=0.0, weight_decay=1e-4)
        for gradient in gradients:
            optimizer.param_groups[0]["lr"] = 0.5
            arranged.grad = of_gradient(gradient)
            optimizer.step()
        return arranged.data, optimizer.state[arranged]["momentum_buffer"]

    def channels_last(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def with_gaps(x: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros((*x.shape[:-1], 5), dtype=x.dtype)
        return wide[..., 1:4].copy_(x)

    expected = moved(torch.clone, torch.clone)
    for layouts in product([torch.clone, channels_last, with_gaps], repeat=2):
        # The order of the elements in a norm's sum may differ, by which the last bits do.
        rtol = 1e-6 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(moved(*layouts), expected, rtol=rtol, atol=1e-7)


def test_a_buffer_of_another_layout_than_its_parameter_is_used_as_it_is() -> None:
    # A checkpoint of a channels_last run, loaded into a run that is not.
    parameter, gradients, start, reference_gradients = problem((33, 17, 3, 3), torch.float64)
    optimizer = LARS([parameter], lr=0.0, weight_decay=1e-4)
    run(optimizer, parameter, gradients[:20], RATES[:20])
    state = optimizer.state[parameter]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
    run(optimizer, parameter, gradients[20:], RATES[20:])
    p, v = google_lars(start, reference_gradients, RATES, weight_decay=1e-4)
    assert relative_error(parameter, p) <= 1e-12
    assert relative_error(state["momentum_buffer"], v) <= 1e-12


@pytest.mark.usefixtures("form")
def test_a_gradient_is_left_as_it_is() -> None:
    for weight_decay, adapt, nesterov in product([0.0, 1e-2], [False, True], [False, True]):
        parameter, (gradient,), _, _ = problem((3, 5), torch.float32, steps=1)
        optimizer = LARS([{"params": [parameter], "adapt": adapt}], 1.0, 0.9, weight_decay, nesterov=nesterov)
        run(optimizer, parameter, [gradient], [0.5])
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("rate", [1e-3, 1e-7, 1e-12, 3e-39, 3.0, 1e12])
@pytest.mark.usefixtures("form")
def test_rates_of_any_size_are_exact(rate: float) -> None:
    # 1 - rate, as the fused operation of the CPU takes it, has no bits left for a small one.
    gradient = np.array([1.0, -2.0, 3.0, 0.5, 4.0, 7.0, -1.0, 0.25, 9.0])
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        parameter = nn.Parameter(torch.ones(9, dtype=dtype))
        optimizer = LARS([{"params": [parameter], "adapt": False}], lr=rate)
        parameter.grad = torch.from_numpy(gradient).to(dtype)
        optimizer.step()
        expected = rate * gradient
        if rate < torch.finfo(dtype).tiny:
            tolerance = 0.25  # a denormal number has few bits
        assert relative_error(optimizer.state[parameter]["momentum_buffer"], expected) <= tolerance


@pytest.mark.usefixtures("form")
def test_a_gradient_that_nearly_cancels_the_weight_decay_keeps_its_norm() -> None:
    # ||g||^2 + 2 wd <g, p> + wd^2 ||p||^2 has lost every digit of ||g + wd p||^2 here.
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-8, 9, (70, 90), generator=generator).float()
    difference = 1e-5 * torch.randn((70, 90), generator=generator)
    gradient = difference - 0.5 * start
    parameter = nn.Parameter(start.clone())
    optimizer = LARS([parameter], lr=0.0, weight_decay=0.5)
    run(optimizer, parameter, [gradient], [0.5])
    _, v = google_lars(start.double().numpy(), [gradient.double().numpy()], [0.5], weight_decay=0.5)
    assert relative_error(optimizer.state[parameter]["momentum_buffer"], v) <= 1e-6


@pytest.mark.usefixtures("form")
def test_the_learning_rate_may_be_a_tensor_that_the_schedule_fills() -> None:
    parameter, gradients, start, reference_gradients = problem((3, 5), torch.float64)
    rate = torch.zeros((), dtype=torch.float32)
    excluded = nn.Parameter(parameter.data.clone())
    optimizer = LARS([{"params": [parameter]}, {"params": [excluded], "adapt": False}], lr=rate, weight_decay=1e-4)
    rates = [float(np.float32(value)) for value in RATES]
    for value, gradient in zip(rates, gradients, strict=True):
        rate.fill_(value)
        parameter.grad, excluded.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    for ours, adapt in ((parameter, True), (excluded, False)):
        p, _ = google_lars(start, reference_gradients, rates, weight_decay=1e-4, adapt=adapt)
        assert relative_error(ours, p) <= 1e-12


def test_a_learning_rate_on_the_device_is_not_read() -> None:
    parameter = nn.Parameter(torch.ones(3, 5, device="meta"))
    excluded = nn.Parameter(torch.ones(3, device="meta"))
    parameter.grad, excluded.grad = torch.ones_like(parameter), torch.ones_like(excluded)
    optimizer = LARS([{"params": [parameter]}, {"params": [excluded], "adapt": False}], lr=1.0, weight_decay=1e-4)
    for group in optimizer.param_groups:
        group["lr"] = torch.ones((), device="meta")
    optimizer.step()
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].shape == (3, 5)


@pytest.mark.usefixtures("form")
def test_parameters_without_elements_are_no_trouble() -> None:
    parameter, empty = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.empty(0, 7))
    parameter.grad, empty.grad = torch.tensor([0.0, 20.0]), torch.empty(0, 7)
    LARS([empty, parameter], lr=2.0, weight_decay=0.0, trust_coefficient=0.1).step()
    torch.testing.assert_close(parameter.data, torch.tensor([3.0, 3.0]), rtol=1e-6, atol=0)


def test_all_excluded_parameters_of_a_model_move_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    sizes = []
    fused = torch._fused_sgd_

    def counted(parameters: list[torch.Tensor], *rest: Any, **settings: Any) -> None:
        sizes.append(len(parameters))
        fused(parameters, *rest, **settings)

    monkeypatch.setattr(torch, "_fused_sgd_", counted)
    LARS(param_groups(model, weight_decay=1e-4), lr=0.1).step()
    assert sizes == [1, 1, 4]
