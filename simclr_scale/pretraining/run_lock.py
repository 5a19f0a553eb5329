"""One run, one writer: a lock that lasts as long as the process that holds it."""

import errno
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """Holds the folder of a run, on the first rank alone.

    It is the system's lock on the folder itself: nothing lies there, and nothing is left of it when the process is
    killed. Processes that read images do not inherit it. A file system without such locks is used without one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether nobody else holds it."""
        if fcntl is None:
            return True
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        self._descriptor = descriptor
        _held.add(self)
        return True

    def release(self) -> None:
        """Lets it go; a process that was forked off closes its copy so, by which the lock itself stays."""
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if descriptor is not None:
            os.close(descriptor)


_held: set[RunLock] = set()


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go_in_child)
