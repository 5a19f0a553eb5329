"""The processes that decode images: how many there may be, and what it means when one is killed."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from simclr_scale.errors import RunFailed

_MOST = 8

# What torch says of a worker that is gone (torch/csrc/DataLoader.cpp and torch/utils/data/dataloader.py).
_GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) "
    r"(?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly(?: with exit code (?P<code>-?\d+))?)"
)


def default_workers(processes_beside: int = 1) -> int:
    """One for each core this process may use, shared with the other ranks on the machine, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, cores // processes_beside))


def outlive_first_sigterm(_worker: int = 0) -> None:
    """For ``worker_init_fn``: a worker ends with its run, not with the signals that its run is sent.

    A scheduler signals all processes of a job, and the run then wants its batches until its checkpoint is written. The
    second SIGTERM ends the worker: the one by which multiprocessing ends what is left when the run itself ends.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@contextmanager
def killed_workers_explained(afterwards: str = "") -> Iterator[None]:
    """Says in one line that a process which reads images was killed, where torch raises an error of many.

    Args:
        afterwards: what to do then, after the advice.

    Raises:
        RunFailed: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        gone = _GONE.search(str(error))
        if gone is None:
            raise
        how, advice = _what_happened((gone["signal"] or "").strip(), gone["code"])
        raise RunFailed(
            f"a process that reads images (pid {gone['pids'].strip()}) {how}; {advice}{afterwards}"
        ) from None


def _what_happened(signal: str, code: str | None) -> tuple[str, str]:
    """How a process ended, from the system's name of the signal or the exit code, and what may help."""
    fewer = "fewer of them (--data.num_workers), or smaller batches or images"
    if signal == "Bus error":
        return (
            f"was killed by the system (signal: {signal})",
            f"the shared memory is full: give the machine or container more (--shm-size), or use {fewer}",
        )
    if signal in ("Terminated", "Interrupt", "Hangup"):
        return f"was ended from outside (signal: {signal})", "a scheduler does so when the time of a job is up"
    if signal in ("Segmentation fault", "Aborted", "Illegal instruction"):
        return f"crashed (signal: {signal})", "--data.num_workers 0 shows where, python -X faulthandler before it"
    if signal:
        how = f"was killed by the system (signal: {signal})"
    else:
        how = f"ended with exit code {code}" if code else "is gone"
    return how, f"most likely the memory did not suffice: use {fewer}"
