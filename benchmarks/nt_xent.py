"""NT-Xent, forward and backward: time, memory and precision against plain torch and against lightly.

    pip install -e ".[bench]"
    python benchmarks/nt_xent.py --output benchmarks/results/nt_xent_cpu.json
    python benchmarks/nt_xent.py --large --output benchmarks/results/nt_xent_large_cpu.json
    python benchmarks/nt_xent.py --device cuda --output benchmarks/results/nt_xent_cuda.json

On the CPU: one thread, d = 128. `plain` is masked cross-entropy in torch's operations, as most code has it. The
product bound is the time that the 4 N^2 d operations of the tiled engine take at the speed of `torch.mm` on matrices of
2048 x 2048. Peaks of memory are torch's own allocations. `--large` runs N = 65,536 once, in the memory that it takes.
On CUDA: bfloat16 rows, N = 65,536, against plain torch, eager and compiled, both under bfloat16 autocast.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import Claim, alternate, arguments, bound, compare, environment, peak_memory, report
from simclr_scale.losses import dcl, dclw, nt_xent

WIDTH = 128
TEMPERATURE = 0.1
Loss = Callable[[Tensor], Tensor]


def plain(z: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Masked cross-entropy, (N, N) logits and all."""
    unit = F.normalize(z, dim=1)
    logits = unit @ unit.T / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def lightlys() -> Loss | None:
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        print('lightly is not installed and left out; pip install -e ".[bench]" brings it')
        return None
    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda z: loss(*z.chunk(2))


def step(loss: Loss, z: Tensor) -> Callable[[], Any]:
    def run() -> None:
        z.grad = None
        loss(z).backward()

    return run


def rows(count: int, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, WIDTH, generator=generator).to(**options).requires_grad_()


def products(seconds: list[float], size: int, count: int) -> float:
    """Seconds for 4 N^2 d operations at the speed of a square product that took `seconds`."""
    return min(seconds) * (4 * count**2 * WIDTH) / (2 * size**3)


def cpu_speed_claims(runs: int) -> list[Claim]:
    peer = lightlys()
    claims = []
    for count, rounds, inner, targets in ((8192, 7, 1, (3.7, 5.5)), (1024, 15, 8, (1.5, 2.0))):
        z = rows(count)
        sides = {"ours": step(nt_xent, z), "plain": step(plain, z)}
        if peer:
            sides["lightly"] = step(peer, z)
        results = [alternate(sides, rounds=rounds, inner=inner) for _ in range(runs)]
        claims.append(compare(f"plain, N = {count:,}", results, "ours", "plain", target=targets[0]))
        if peer:
            claims.append(compare(f"lightly, N = {count:,}", results, "ours", "lightly", target=targets[1]))
        if count == 8192:
            # By themselves: beside the gigabytes of the others neither runs at its own speed.
            square = torch.randn(2048, 2048)
            pair = {"ours": sides["ours"], "mm": lambda square=square: square @ square}
            pairs = [alternate(pair, rounds=15) for _ in range(runs)]
            factors = [min(run["ours"]) / products(run["mm"], 2048, count) for run in pairs]
            claims.append(
                bound(
                    f"time over that of its products, N = {count:,}", max(factors), 1.3, "x", [1.3 / f for f in factors]
                )
            )
            ours, theirs = peak_memory(step(nt_xent, z)), peak_memory(step(plain, z))
            ratio = theirs / ours
            claims.append(
                Claim("peak memory, plain, N = 8,192", ours / 1e6, theirs / 1e6, ratio, 20.0, (ratio,) * 2, "MB")
            )
            for name, loss in {"dcl": dcl, "dclw": dclw}.items():
                relatives = [alternate({"ours": step(loss, z), "plain": sides["plain"]}, rounds=3)]
                claims.append(compare(f"{name} against plain NT-Xent, N = 8,192", relatives, "ours", "plain"))
    return claims


def near_convergence() -> Tensor:
    """Rows whose loss at temperature .05 is below 1e-4, in float64."""
    generator = torch.Generator().manual_seed(0)
    base = torch.eye(96, WIDTH, dtype=torch.float64)
    base += 0.01 * torch.randn(96, WIDTH, dtype=torch.float64, generator=generator)
    return torch.cat([base, base + 0.02 * torch.randn(96, WIDTH, dtype=torch.float64, generator=generator)])


def value_and_gradient(loss: Loss, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach().double().cpu(), gradient.double().cpu()


def relative_errors(loss: Loss, z: Tensor, temperature: float) -> tuple[float, float]:
    """Of the loss and of the gradient, against plain float64."""
    value, gradient = value_and_gradient(loss, z)
    exact_value, exact_gradient = value_and_gradient(lambda x: plain(x, temperature), z.double())
    return (
        ((value - exact_value).abs() / exact_value).item(),
        ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    )


def precision_claims(device: str) -> list[Claim]:
    z = near_convergence().float().to(device)
    loss, gradient = relative_errors(lambda x: nt_xent(x, 0.05), z, 0.05)
    plain_loss, plain_gradient = relative_errors(lambda x: plain(x, 0.05), z, 0.05)
    claims = [
        bound("relative error of the loss near convergence, float32", loss, 1e-5, ""),
        bound("relative error of the gradient near convergence, float32", gradient, 1e-5, ""),
        bound("the same of plain cross-entropy: loss", plain_loss, None, ""),
        bound("the same of plain cross-entropy: gradient", plain_gradient, None, ""),
    ]
    generator = torch.Generator().manual_seed(1)
    z1 = torch.randn(512, WIDTH, generator=generator)
    z = torch.cat([z1, z1 + 0.5 * torch.randn(512, WIDTH, generator=generator)]).to(device, torch.bfloat16)
    for temperature in (0.05, 0.1, 0.5):
        _, ours = value_and_gradient(lambda x, t=temperature: nt_xent(x, t), z)
        _, exact = value_and_gradient(lambda x, t=temperature: plain(x, t), z.double())
        cosine = F.cosine_similarity(ours.flatten(), exact.flatten(), 0).item()
        name = f"1 - cosine of the gradient of bfloat16 rows, temperature {temperature}"
        claims.append(bound(name, max(1 - cosine, 1e-12), 1e-4, ""))
    return claims


def large_claims() -> list[Claim]:
    """N = 65,536, where one copy of the matrix of similarities has 17.2 GB."""
    count = 65_536
    z = rows(count)
    start = time.thread_time()
    step(nt_xent, z)()
    seconds = time.thread_time() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    sample = torch.arange(0, count, count // 64)
    return [
        bound("N = 65,536: peak of the whole process, torch included", resident, 24e3, "MB"),
        bound("one matrix of similarities would have", 4e-6 * count**2, None, "MB"),
        bound("N = 65,536: forward and backward", seconds, None, "s"),
        bound("N = 65,536: error of 64 rows of the gradient, float64", sampled_error(z, sample), 1e-5, ""),
    ]


def sampled_error(z: Tensor, sample: Tensor) -> float:
    """Relative error of single rows of the gradient against the definition in float64, a block of columns at a time."""
    unit = F.normalize(z.detach().double(), dim=1)
    everyone = torch.arange(len(unit))
    partner = everyone.roll(len(unit) // 2)

    def logits(index: Tensor) -> Tensor:
        s = unit[index] @ unit.T / TEMPERATURE
        s[torch.arange(len(index)), index] = -torch.inf
        return s

    log_sums = torch.cat([logits(index).logsumexp(1) for index in everyone.split(2048)])
    s = logits(sample)
    weights = (s - log_sums[sample, None]).exp() + (s - log_sums).exp()
    weights[torch.arange(len(sample)), partner[sample]] -= 2
    dz = weights @ unit / (len(unit) * TEMPERATURE)
    u = unit[sample]
    exact = (dz - (dz * u).sum(1, keepdim=True) * u) / z.detach()[sample].double().norm(dim=1, keepdim=True)
    assert z.grad is not None
    return ((z.grad[sample].double() - exact).norm() / exact.norm()).item()


def cuda_claims(runs: int) -> list[Claim]:
    count = 65_536
    z = rows(count, device="cuda", dtype=torch.bfloat16)

    def autocast(loss: Loss) -> Loss:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return loss(x)

        return run

    sides = {
        "ours": step(autocast(nt_xent), z),
        "plain": step(autocast(plain), z),
        "compiled": step(autocast(torch.compile(plain)), z),
    }
    results = [alternate(sides, rounds=7, warmup=3, device="cuda") for _ in range(runs)]
    times = [min(run["ours"]) * 1e3 for run in results]
    memory = peak_memory(sides["ours"], "cuda")
    return [
        bound("bfloat16, N = 65,536", max(times), 8.4, "ms", [8.4 / t for t in times]),
        compare("plain, eager, N = 65,536", results, "ours", "plain", target=6.0),
        compare("plain, compiled, N = 65,536", results, "ours", "compiled", target=3.0),
        bound("peak memory beside the rows, N = 65,536", memory / 1e6, 150.0, "MB"),
    ]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, help="only N = 65,536 on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cuda":
        claims = cuda_claims(options.runs) + precision_claims("cuda")
    elif options.large:
        claims = large_claims()
    else:
        claims = cpu_speed_claims(options.runs) + precision_claims("cpu")
    return report(claims, environment(["lightly"], device=options.device), options.output)


if __name__ == "__main__":
    raise SystemExit(main())
