"""Time of one LARS step on the parameters of a ResNet-50 and its projection head: ours against timm's and lightly's.

    python benchmarks/lars.py --output benchmarks/results/lars_cpu.json
    python benchmarks/lars.py --device cuda --output benchmarks/results/lars_cuda.json

Every side has the same values of parameters and gradients, the same groups (norms and biases neither decayed nor
adapted: the peers adapt where the weight decay is not 0), momentum 0.9, and steps within one process in turn with the
others. torch.optim.SGD(fused=True), which computes no norms, is the floor. Before anything is timed, our steps are
compared with Google's rule in NumPy and float64.

On CUDA a step is the replay of a CUDA graph, timed by events; a peer that cannot be captured is timed as it runs, and
says so; one that is not installed is named and left out.
"""

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from measure import Claim, Work, alternate, arguments, bound, compare, environment, report
from simclr_scale import LARS, ProjectionHead, create_encoder, param_groups

LR = 1e-3  # Its value changes no time. At this one the weights stay what they are through thousands of steps.
MOMENTUM = 0.9
WEIGHT_DECAYS = (1e-6, 1e-4)
SGD = "SGD fused"
PEERS = {"timm": ("timm.optim.lars", "Lars"), "lightly": ("lightly.utils.lars", "LARS")}
CPU_TARGETS = {"timm": 1.25, "lightly": 1.4}
CUDA_LIMIT_MS = 0.4
TOLERANCE = 1e-6


def model_with_gradients(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": create_encoder("simclr_resnet50"), "head": ProjectionHead(2048)})
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model.to(device)


def optimizers(weight_decay: float, device: str) -> dict[str, Optimizer]:
    """Every side, each with a model of its own; ours is called "ours"."""

    def groups() -> list[dict[str, Any]]:
        return param_groups(model_with_gradients(device), weight_decay)

    def peer_groups() -> list[dict[str, Any]]:
        return [{name: group[name] for name in ("params", "weight_decay")} for group in groups()]

    sides: dict[str, Optimizer] = {
        "ours": LARS(groups(), lr=torch.tensor(LR, device=device) if device == "cuda" else LR, momentum=MOMENTUM),
        SGD: torch.optim.SGD(peer_groups(), lr=LR, momentum=MOMENTUM, fused=True),
    }
    for name, (module, kind) in PEERS.items():
        try:
            make = getattr(importlib.import_module(module), kind)
        except ModuleNotFoundError as missing:
            Console().print(f"left out: {name} ({missing})")
            continue
        sides[name] = make(peer_groups(), lr=LR, momentum=MOMENTUM)
    return sides


def parameters_of(optimizer: Optimizer) -> Iterable[tuple[torch.Tensor, dict[str, Any]]]:
    return ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])


def error_against_google(optimizer: Optimizer, step: Work, steps: int = 3) -> float:
    """The largest error of a parameter's change over some steps, relative to the largest change within the parameter.

    Args:
        optimizer: Ours, before or after other steps.
        step: Takes one step of it, at the learning rate `LR`.
        steps: How many to take.
    """

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().cpu().numpy()

    before = []
    for p, _ in parameters_of(optimizer):
        buffer = optimizer.state[p].get("momentum_buffer")
        before.append((array(p), np.zeros(p.shape) if buffer is None else array(buffer)))
    for _ in range(steps):
        step()
    worst = 0.0
    for (start, v), (parameter, group) in zip(before, parameters_of(optimizer), strict=True):
        p = start
        for _ in range(steps):
            g = array(parameter.grad) + group["weight_decay"] * p  # type: ignore[arg-type]
            p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
            trust = group["trust_coefficient"] * p_norm / g_norm if group["adapt"] and p_norm * g_norm > 0 else 1.0
            v = MOMENTUM * v + LR * trust * g
            p = p - v
        # The buffer, not the parameter: at this rate a change is lost in the rounding of the parameter.
        ours = array(optimizer.state[parameter]["momentum_buffer"])
        rounding = 2.0**-23 * np.abs(p).max()
        if np.abs(array(parameter) - p).max() > steps * rounding:
            return float("inf")
        worst = max(worst, float(np.abs(ours - v).max() / np.abs(v).max()))
    return worst


def captured(optimizer: Optimizer) -> Callable[[], None] | None:
    """A replay of one step as a CUDA graph; None where the optimizer cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            optimizer.step()
    except RuntimeError as refusal:  # it waits for the device, or asks for capturable=True
        Console().print(f"not captured: {type(optimizer).__module__} ({str(refusal).splitlines()[0]})")
        torch.cuda.synchronize()
        return None
    return graph.replay


def works(sides: dict[str, Optimizer], device: str) -> dict[str, Work]:
    if device == "cpu":
        return {name: optimizer.step for name, optimizer in sides.items()}
    # Ours comes first: a capture that fails must not spoil it.
    result: dict[str, Work] = {}
    for name, optimizer in sides.items():
        replay = captured(optimizer)
        if replay is None and name == "ours":
            raise SystemExit("our step cannot be captured")
        result[name if replay is not None else f"{name}, not captured"] = replay or optimizer.step
    return result


def claims_of(weight_decay: float, device: str, runs: int) -> tuple[list[Claim], float]:
    sides = optimizers(weight_decay, device)
    work = works(sides, device)
    error = error_against_google(sides["ours"], work["ours"])
    if not error <= TOLERANCE:
        raise SystemExit(f"our step is not Google's rule: relative error {error:.1e} at weight decay {weight_decay}")
    inner = 20 if device == "cuda" else 1
    results = [alternate(work, rounds=11, warmup=2, device=device, inner=inner) for _ in range(runs)]
    claims = [
        compare(
            f"against {peer}, weight decay {weight_decay:g}",
            results,
            "ours",
            peer,
            target=CPU_TARGETS.get(peer) if device == "cpu" else None,
        )
        for peer in work
        if peer != "ours"
    ]
    if device == "cuda":
        slowest = max(min(result["ours"]) for result in results)
        claims.append(bound(f"one replayed step, weight decay {weight_decay:g}", slowest * 1e3, CUDA_LIMIT_MS, "ms"))
    return claims, error


def main() -> int:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    claims: list[Claim] = []
    errors: dict[str, float] = {}
    for weight_decay in WEIGHT_DECAYS:
        measured, errors[f"weight decay {weight_decay:g}"] = claims_of(weight_decay, options.device, options.runs)
        claims += measured
    return report(
        claims,
        environment(("timm", "lightly"), device=options.device),
        options.output,
        errors_against_google=errors,
    )


if __name__ == "__main__":
    raise SystemExit(main())
