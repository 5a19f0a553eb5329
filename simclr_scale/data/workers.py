"""How many processes may decode images."""

import os

_MOST = 8


def default_workers(processes_beside: int = 1) -> int:
    """One for each core this process may use, shared with the other ranks on the machine, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, cores // processes_beside))
