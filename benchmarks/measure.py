"""How the scripts in this folder measure: sides that take turns in one process, thread CPU time, the minimum, ratios.

A machine that others share makes any single time worthless, but two pieces of code that take turns on it slow down
together: their ratio holds. On the CPU a time is that of this thread's own work, so one thread is used; on CUDA it is
what events on the device say.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Work = Callable[[], Any]


@dataclass(frozen=True)
class Claim:
    """One measured comparison. A larger ratio is better for us, and it must reach `target`.

    Attributes:
        name: What was compared, at which size.
        ours: Our figure in `unit` (the best of the run that gave `ratio`).
        peer: The figure of the other side, or the bound itself.
        ratio: peer / ours for times and memory, ours / peer for rates; of the worst run.
        target: The ratio to reach; None for a figure that is only reported.
        spread: Smallest and largest ratio over the runs.
        unit: Unit of `ours` and `peer`.
    """

    name: str
    ours: float
    peer: float
    ratio: float
    target: float | None
    spread: tuple[float, float]
    unit: str

    @property
    def holds(self) -> bool:
        return self.target is None or self.ratio >= self.target


def alternate(
    sides: dict[str, Work], *, rounds: int = 7, warmup: int = 1, device: str = "cpu", inner: int = 1
) -> dict[str, list[float]]:
    """Seconds that each call of each side took, the sides taking turns.

    Args:
        sides: What to measure, by name. On the CPU each must do its work on the calling thread.
        rounds: Measured calls of each side.
        warmup: Calls of each side beforehand that are not counted.
        device: "cpu": CPU time of this thread. "cuda": time on the device by events.
        inner: Calls within one measurement; the result is the mean of these.
    """
    clock = _device_seconds if device == "cuda" else _thread_seconds
    for _ in range(warmup):
        for work in sides.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            seconds[name].append(clock(work, inner) / inner)
    return seconds


def _thread_seconds(work: Work, times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        work()
    return time.thread_time() - start


def _device_seconds(work: Work, times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def compare(
    name: str,
    runs: Sequence[dict[str, list[float]]],
    ours: str,
    peer: str,
    *,
    target: float | None = None,
    unit: str = "ms",
    per_call: float = 1e3,
) -> Claim:
    """The claim that `ours` takes 1 / ratio of the time of `peer`: minima within a run, the worst of the runs.

    Args:
        runs: Results of `alternate`, one a run.
        per_call: What a second is in `unit`.
    """
    ratios = [min(run[peer]) / min(run[ours]) for run in runs]
    worst = runs[ratios.index(min(ratios))]
    return Claim(
        name,
        ours=min(worst[ours]) * per_call,
        peer=min(worst[peer]) * per_call,
        ratio=min(ratios),
        target=target,
        spread=(min(ratios), max(ratios)),
        unit=unit,
    )


def bound(name: str, ours: float, limit: float | None, unit: str, ratios: Sequence[float] | None = None) -> Claim:
    """The claim that a figure stays below a limit; without a limit, the bare figure.

    Args:
        ratios: limit / figure of each run, where there were several; `ours` is the worst of them.
    """
    if limit is None:
        return Claim(name, ours, ours, 1.0, None, (1.0, 1.0), unit)
    ratios = [limit / ours] if ratios is None else ratios
    return Claim(name, ours, limit, min(ratios), 1.0, (min(ratios), max(ratios)), unit)


def peak_memory(work: Work, device: str = "cpu") -> int:
    """Bytes of torch's own allocations alive at once while `work` runs, beyond those alive before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    recorded = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"]
    alive = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        most = max(most, alive)
    return most


def arguments(description: str, *, devices: Sequence[str] = ("cpu", "cuda")) -> argparse.ArgumentParser:
    """The options that every script here has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the claims and the environment as JSON")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--runs", type=int, default=3, help="repetitions of the whole measurement; the worst counts")
    return parser


def environment(packages: Sequence[str] = (), *, device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware and commit."""
    versions = {name: _version(name) for name in ("torch", *packages)}
    hardware = {
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + (
            " + changes" if git("status", "--porcelain").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(claims: Sequence[Claim], environment: dict[str, Any], output: Path | None = None, **extra: Any) -> int:
    """Prints the claims as a table, writes them where `output` says, and says which miss their target.

    Args:
        extra: Further facts for the JSON file, by name.

    Returns:
        The exit status of the script: 1 where a claim misses.
    """
    table = Table(title=f"{environment['hardware'].get('gpu', environment['hardware']['cpu'])}")
    for column in ("claim", "ours", "peer or bound", "ratio", "spread", "target"):
        table.add_column(column, justify="left" if column == "claim" else "right", overflow="fold")
    for claim in claims:
        low, high = claim.spread
        table.add_row(
            claim.name,
            f"{claim.ours:.4g} {claim.unit}",
            f"{claim.peer:.4g} {claim.unit}",
            f"{claim.ratio:.2f}",
            f"{low:.2f}-{high:.2f}",
            "" if claim.target is None else f"{claim.target:.2f} {'held' if claim.holds else 'MISSED'}",
        )
    console = Console()
    console.width = max(console.width, 140)  # also where the output goes to a file
    console.print(table)
    missed = [claim.name for claim in claims if not claim.holds]
    for name in missed:
        console.print(f"missed: {name}", style="bold red")
    if output is not None:
        content = {"claims": [asdict(claim) for claim in claims], "environment": environment, **extra}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"written to {output}")
    return 1 if missed else 0
