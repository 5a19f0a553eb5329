"""Processes of this machine: whether they run, and how to end them."""

import multiprocessing
import os
import platform
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process of a job.

    ``space`` is equal for processes that see each other's pids and are one node of a network: the same boot of the same
    machine, the same container.
    ``started`` tells a process from a later one of the same pid.
    """

    host: str
    space: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "Process":
        pid = os.getpid()
        return cls(platform.node(), _space(), pid, _started(pid))

    def is_seen_from(self, other: "Process") -> bool:
        return self.space == other.space

    def runs(self) -> bool:
        """Whether it has not ended; of a process that can be seen from here. A zombie has ended."""
        return _started(self.pid) == self.started

    def kill(self) -> None:
        if self.runs():
            with suppress(OSError):  # it has ended since, or is another user's
                os.kill(self.pid, signal.SIGKILL)


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.readlink('/proc/self/ns/net')}"
    except OSError:  # no Linux, and so no containers that share a name
        return platform.node()


def _started(pid: int) -> str:
    """When a process started, in the system's own unit; empty where there is none, or one that has ended."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "running"
        return "running"
    try:
        # The name of the program, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZXx" else fields[19]


def kill_own_workers() -> None:
    """Ends the processes that read images for this one, which would otherwise outlive its sudden end."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1.0)
