"""Running the checks: in the processes of a launcher, or in new ones on this machine."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from simclr_scale.distributed import world
from simclr_scale.errors import InputError, RunFailed
from simclr_scale.scaling.hardware import device_name
from simclr_scale.scaling.verify import checks, speed
from simclr_scale.scaling.verify.outcomes import Outcome, Verdict


def under_a_launcher() -> ClusterEnvironment | None:
    """torchrun's or SLURM's, as Lightning finds them; None where nobody launched this process."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment() if SLURMEnvironment.detect() else None


def verify_here(environment: ClusterEnvironment, timeout: float) -> Verdict:
    """Joins the launcher's other processes and runs the checks with them; the same verdict on every rank.

    On CUDA with NCCL, each rank on the GPU of its local rank; on the CPU with gloo where there are no GPUs.

    Raises:
        InputError: it launched one process, which has nobody to agree with.
    """
    ranks, local = environment.world_size(), environment.local_rank()
    if ranks < 2:
        raise InputError("verify needs 2 processes at least, and the launcher started 1")
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"local rank {local} has no GPU of its own: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{environment.main_address}:{environment.main_port}"
        if isinstance(environment, SLURMEnvironment)
        else "env://",
        rank=environment.global_rank(),
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    try:
        return run_checks(device)
    finally:
        dist.destroy_process_group()


def run_checks(device: torch.device) -> Verdict:
    """All checks in the process group that there is; the same verdict on every rank."""
    outcomes = [_tried(name, check) for name, check in checks.correctness(device)]
    outcomes += [_tried(name, lambda name=name: speed.measure(name, device)) for name in speed.OPERATIONS]
    everyone: list[Any] = [None] * world().size
    dist.all_gather_object(everyone, (device_name(device), outcomes))
    return Verdict.of(str(dist.get_backend()), [name for name, _ in everyone], [found for _, found in everyone])


def _tried(name: str, check: Any) -> Outcome:
    """A check that breaks does not hold; the others go on, as far as the ranks are still together."""
    try:
        return check()
    except Exception as error:
        return Outcome(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def verify_in_new_processes(ranks: int, timeout: float) -> Verdict:
    """Starts so many gloo processes on this machine and runs the checks in them.

    Raises:
        RunFailed: one of them ended without an answer, or none came in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(there, rank, ranks, Path(folder) / "store", timeout))
            process.start()
            there.close()
            started.append((here, process))
        try:
            return _verdict_of([connection for connection, _ in started], timeout)
        finally:
            for connection, process in started:
                connection.close()
                process.kill()
                process.join()


def _verdict_of(connections: list[Connection], timeout: float) -> Verdict:
    verdict: Verdict | None = None
    waiting = list(connections)
    while waiting:
        ready = wait(waiting, timeout + 60)
        if not ready:
            silent = connections.index(waiting[0])
            raise RunFailed(f"rank {silent} has not answered within {timeout + 60:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = connections.index(connection)
            waiting.remove(connection)
            try:
                answer = connection.recv()
            except EOFError:
                raise RunFailed(
                    f"rank {rank} ended without an answer; most likely the memory did not suffice"
                ) from None
            if isinstance(answer, str):
                raise RunFailed(f"rank {rank}: {answer}")
            verdict = answer
    assert verdict is not None
    return verdict


def _run_rank(connection: Connection, rank: int, ranks: int, store: Path, timeout: float) -> None:
    # Processes that share few cores have one thread each, unless the user says otherwise.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        connection.send(run_checks(torch.device("cpu")))
    except Exception:
        connection.send(" ".join(traceback.format_exc().strip().splitlines()[-1].split()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
