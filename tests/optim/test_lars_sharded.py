"""LARS on the shards of FSDP2 and tensor parallelism, against one process that holds the whole parameters."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.optim import LARS
from tests.gloo_pool import GlooPool

SHAPES = [(6, 5), (7, 3, 2), (1, 40), (5,), ()]
STEPS = 3


def values(index: int, step: int) -> torch.Tensor:
    """The start of a parameter (step 0) or its gradient at a step; of the zero-norm kind for some."""
    generator = torch.Generator().manual_seed(100 * index + step)
    return torch.randn(SHAPES[index], generator=generator, dtype=torch.float64)


def settings(nesterov: bool) -> dict[str, Any]:
    return {"lr": 0.3, "weight_decay": 1e-2, "trust_coefficient": 0.1, "nesterov": nesterov}


def groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[::2]}, {"params": parameters[1::2]}, {"params": [], "adapt": False}]


def in_one_process(dtype: torch.dtype, nesterov: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parameters = [nn.Parameter(values(index, 0).to(dtype)) for index in range(len(SHAPES))]
    optimizer = LARS(groups(parameters), **settings(nesterov))
    for step in range(1, STEPS + 1):
        for index, parameter in enumerate(parameters):
            parameter.grad = values(index, step).to(dtype)
        optimizer.step()
    return [(p.data, optimizer.state[p]["momentum_buffer"]) for p in parameters]


def count_all_reduces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *rest, **named)

    monkeypatch.setattr(dist, "all_reduce", counted)
    return sizes


def on_shards(
    rank: int, world_size: int, dtype: torch.dtype, nesterov: bool, form: str
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int], list[int]]:
    """Parameters sharded over rows (unevenly, some ranks with none), replicated, and plain, in one optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from simclr_scale.optim import lars, lars_multi_tensor, lars_per_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    layouts = [[Shard(0)], [Shard(0)], [Shard(0)], [Replicate()], None]

    def place(tensor: torch.Tensor, index: int) -> torch.Tensor:
        layout = layouts[index]
        return tensor if layout is None else distribute_tensor(tensor, mesh, layout)

    with pytest.MonkeyPatch.context() as monkeypatch:
        modules = {"per tensor": lars_per_tensor, "multi-tensor": lars_multi_tensor}
        monkeypatch.setattr(lars, "_form_for", lambda device: modules[form])
        parameters = [nn.Parameter(place(values(index, 0).to(dtype), index)) for index in range(len(SHAPES))]
        optimizer = LARS(groups(parameters), **settings(nesterov))
        sizes: list[int] = []
        for step in range(1, STEPS + 1):
            for index, parameter in enumerate(parameters):
                parameter.grad = place(values(index, step).to(dtype), index)
            sizes = count_all_reduces(monkeypatch)
            optimizer.step()
            monkeypatch.undo()
            monkeypatch.setattr(lars, "_form_for", lambda device: modules[form])
    results = []
    for parameter in parameters:
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert isinstance(buffer, DTensor) == isinstance(parameter.data, DTensor)
        pair = [x.full_tensor() if isinstance(x, DTensor) else x for x in (parameter.data, buffer)]
        results.append((pair[0], pair[1]))
    local_rows = [p.to_local().shape[0] for p in parameters[:3]]  # type: ignore[attr-defined]
    return results, local_rows, sizes


@pytest.mark.parametrize("form", ["per tensor", "multi-tensor"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 2.0**-6)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_norms_of_shards_are_those_of_the_whole_parameter(
    gloo: GlooPool, nesterov: bool, dtype: torch.dtype, rtol: float, form: str
) -> None:
    expected = in_one_process(dtype, nesterov)
    ranks = gloo(2, on_shards, dtype, nesterov, form)
    for results, _, all_reduces in ranks:
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-3 if dtype == torch.bfloat16 else 1e-14)
        # Two sharded parameters (one group) and one (the other group): two sums of squares each, in one collective.
        assert all_reduces == [4, 2]
    assert [rows for _, rows, _ in ranks] == [[3, 4, 1], [3, 3, 0]]


def on_fsdp(rank: int, world_size: int) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = LARS(model.parameters(), **settings(False))
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch = inputs()[rank::world_size]
        model(batch).square().mean().backward()
        optimizer.step()
    return [p.detach().full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def inputs() -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_model_under_fsdp2_trains_as_in_one_process(gloo: GlooPool) -> None:
    model = small_model()
    optimizer = LARS(model.parameters(), **settings(False))
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    for parameters in gloo(2, on_fsdp):
        torch.testing.assert_close(parameters, [p.data for p in model.parameters()], rtol=1e-12, atol=1e-14)


def on_a_square_mesh(rank: int, world_size: int) -> list[torch.Tensor]:
    """Shards over both dimensions of a mesh, over one with copies over the other, and a gradient placed otherwise."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    layouts = [[Shard(0), Shard(1)], [Replicate(), Shard(0)]]
    parameters = [nn.Parameter(distribute_tensor(values(index, 0), mesh, layouts[index])) for index in (0, 1)]
    optimizer = LARS(parameters, **settings(False))
    for step in range(1, STEPS + 1):
        parameters[0].grad = distribute_tensor(values(0, step), mesh, layouts[0])
        parameters[1].grad = distribute_tensor(values(1, step), mesh, [Replicate(), Replicate()])
        optimizer.step()
    return [p.data.full_tensor() for p in parameters]  # type: ignore[attr-defined]


def test_a_norm_is_summed_over_every_dimension_of_the_mesh_that_shards_and_no_other(gloo: GlooPool) -> None:
    expected = [p for p, _ in in_one_process(torch.float64, nesterov=False)[:2]]
    for parameters in gloo(4, on_a_square_mesh):
        torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-14)


def with_a_partial_parameter(rank: int, world_size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (world_size,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3, 2), mesh, [Partial()]))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(InputError) as error:
        LARS([parameter], lr=1.0).step()
    return str(error.value)


def test_a_partial_sum_is_refused_as_a_parameter(gloo: GlooPool) -> None:
    for message in gloo(2, with_a_partial_parameter):
        assert "sharded and replicated parameters; one of shape (3, 2)" in message
