"""Many names in little memory."""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from simclr_scale.errors import InputError


class PackedNames:
    """File names in two flat buffers.

    A list of a million strings is copied into every forked worker page by page, as reading a string writes its
    reference count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "PackedNames":
        """What `to_arrays` gave. Raises InputError where the two do not fit together."""
        steps = np.diff(ends, prepend=0)
        if text.dtype != np.uint8 or ends.dtype.kind not in "iu" or (steps < 0).any() or steps.sum() != text.size:
            raise InputError("names and their ends do not fit together")
        names = cls(())
        names._bytes, names._ends = text.tobytes(), ends.astype(np.int64)
        return names

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The names one after another, uint8, and (N,) int64, where each ends."""
        return np.frombuffer(self._bytes, dtype=np.uint8), self._ends

    def __len__(self) -> int:
        return self._ends.size

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield os.fsdecode(self._bytes[start:end])
            start = end

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._ends.size:
            raise IndexError(f"image {index} of {self._ends.size}")
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]])
