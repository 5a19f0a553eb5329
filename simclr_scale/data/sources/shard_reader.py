"""Random reads of members of tar shards."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from simclr_scale.data.sources.tar_index import BLOCK
from simclr_scale.errors import InputError

# Well below the 1,024 that a process may usually open.
_OPEN_FILES = 256
_SIZE_FIELD = slice(124, 136)  # of a tar header: octal digits (POSIX.1-1988, ustar)


class ShardReader:
    """Bytes from anywhere in a list of shards.

    Reads take no lock and share no position, so that forked workers can read by the same open files. Memory-mapped
    files would save a copy, but end the process (SIGBUS) where a shard is cut short under it.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of a shard, where a member of that size must begin.

        Raises:
            InputError: the shard cannot be read, is too short or has another member there: it has changed.
        """
        path = self.paths[shard]
        try:
            block = os.pread(self._file(shard), BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        written = block[_SIZE_FIELD].strip(b"\0 ").lstrip(b"0") or b"0"
        if len(block) != BLOCK + size or written != b"%o" % size:
            raise InputError(f"{path}: no image of {size} bytes at byte {offset}; the shard has changed")
        return block[BLOCK:]

    def _file(self, shard: int) -> int:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            file = os.open(self.paths[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._open[shard] = file
        return file

    def close(self) -> None:
        """Gives the open files back; the next read opens them anew."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()
