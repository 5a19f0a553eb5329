"""Processes that read images are forked at rest: under Python 3.11 a process forked at a bad moment never starts.

In the child, Python 3.11 takes a lock that another thread may have held when the process was forked and that nobody
will ever release there (CPython issue 112275; Python 3.12 makes the lock anew first). Any thread holds it that enters
Python from outside, without the GIL: in training most likely one of gloo's, which may be left with the last reference
to the tensor of a collective that has returned. The rank then waits for its first images until it is ended as one that
hangs.
"""

import os
import sys
import threading
import time

_LONGEST_WAIT = 0.5
_PAUSE = 0.0002
_RUNNING = ("R", "D")  # on a core, waiting for one or, in the system, for memory


def wait_for_other_threads() -> None:
    """Returns once every other thread of this process sleeps, and after half a second at the latest.

    A thread that sleeps within that lock is woken by one that runs, so it has to be seen asleep twice.
    """
    end = time.monotonic() + _LONGEST_WAIT
    looks = 0
    while looks < 2 and time.monotonic() < end:
        if _others_run():
            looks = 0
            time.sleep(_PAUSE)
        else:
            looks += 1


def _others_run() -> bool:
    own = str(threading.get_native_id())
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:  # no Linux, where forking is not the way to start a process
        return False
    return any(thread != own and _state(thread) in _RUNNING for thread in threads)


def _state(thread: str) -> str:
    """A letter, as of ``man 5 proc_pid_stat``; none where the thread has ended."""
    try:
        with open(f"/proc/self/task/{thread}/stat") as file:
            # The name of the thread, in brackets, may hold anything.
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


if sys.version_info < (3, 12) and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=wait_for_other_threads)
