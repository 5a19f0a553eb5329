"""How fast the collectives are, and whether what they give is right."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.distributed import world
from simclr_scale.scaling.verify.outcomes import Outcome

_SMALL_CALLS, _LARGE_CALLS = 30, 5
# Of float32: enough to be bound by the bandwidth of shared memory or Ethernet, and of NVLink.
_LARGE = {"cpu": 2**22, "cuda": 2**26}

# (numbers put in by a rank) -> (what to call, what it fills, the value it must hold)
Prepare = Callable[[int, torch.device], tuple[Callable[[], object], Tensor, float]]


def all_reduce(numbers: int, device: torch.device) -> tuple[Callable[[], object], Tensor, float]:
    """Sums ones: W; bytes of the result cross 2 (W - 1) / W times."""
    tensor = torch.empty(numbers, device=device)

    def call() -> None:
        tensor.fill_(1.0)
        dist.all_reduce(tensor)

    return call, tensor, float(world().size)


def all_gather(numbers: int, device: torch.device) -> tuple[Callable[[], object], Tensor, float]:
    """Gathers sevens."""
    tensor = torch.full((max(1, numbers // world().size),), 7.0, device=device)
    result = tensor.new_zeros(len(tensor) * world().size)
    return lambda: dist.all_gather_into_tensor(result, tensor), result, 7.0


def broadcast(numbers: int, device: torch.device) -> tuple[Callable[[], object], Tensor, float]:
    """Sends threes from rank 0."""
    tensor = torch.full((numbers,), 3.0 if world().rank == 0 else 0.0, device=device)
    return lambda: dist.broadcast(tensor, 0), tensor, 3.0


_FACTORS: dict[str, tuple[Prepare, Callable[[int], float]]] = {
    "all-reduce": (all_reduce, lambda ranks: 2 * (ranks - 1) / ranks),
    "all-gather": (all_gather, lambda ranks: (ranks - 1) / ranks),
    "broadcast": (broadcast, lambda ranks: 1.0),
}
OPERATIONS = tuple(_FACTORS)


def measure(operation: str, device: torch.device) -> Outcome:
    """Median time of a tiny one, and the bandwidth of a large one as a link sees it ("bus bandwidth" of NCCL's tests).

    The figures are told, not judged: what is slow is for the user to say. What arrives is judged.
    """
    prepare, factor = _FACTORS[operation]
    latency, right = _median_seconds(prepare, 2, _SMALL_CALLS, device)
    numbers = _LARGE["cuda" if device.type == "cuda" else "cpu"]
    seconds, also_right = _median_seconds(prepare, numbers, _LARGE_CALLS, device)
    bandwidth = 4 * numbers * factor(world().size) / seconds
    detail = f"latency {1e6 * latency:,.0f} us; {4 * numbers / 2**20:.0f} MiB at {bandwidth / 1e9:.2f} GB/s"
    passed = right and also_right
    return Outcome(f"{operation}", passed, detail if passed else f"what arrived is wrong; {detail}")


def _median_seconds(prepare: Prepare, numbers: int, calls: int, device: torch.device) -> tuple[float, bool]:
    call, result, expected = prepare(numbers, device)
    call()
    times = []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), bool((result == expected).all())
