"""Features as directions: rows of length one, made a block at a time, so that the whole is never copied."""

from collections.abc import Iterator

import numpy as np
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array

# 8,192 rows of 2,048 features: a search in such blocks is as fast as in larger ones.
_BLOCK_BYTES = 2**26


class UnitRows:
    """The rows of a matrix (N, D), divided by their lengths when they are read. The matrix may be a memory map.

    A row of zeros has no direction: it stays zero, as far from everything as from its opposite. One black image, which
    an encoder without biases maps there, must not end an evaluation.

    Args:
        features: (N, D), N and D at least 1, finite in float32.
        name: what an error calls it.

    Raises:
        InputError: features of another shape, or not finite. Reads all of them once.
    """

    def __init__(self, features: Array, name: str) -> None:
        self._features = features.detach() if isinstance(features, torch.Tensor) else np.asanyarray(features)
        shape = tuple(self._features.shape)
        if len(shape) != 2 or 0 in shape:
            raise InputError(f"{name}: shape {shape}, wanted (images, features), neither of them 0")
        self.width = shape[1]
        self._norms = torch.empty(shape[0], 1, dtype=torch.float64)
        for start, stop in self.blocks(2):
            # No finite float32 row over- or underflows its norm in float64.
            torch.linalg.vector_norm(
                self._read(start, stop), dim=1, keepdim=True, dtype=torch.float64, out=self._norms[start:stop]
            )
        if not self._norms.isfinite().all():
            row = int((~self._norms.isfinite()).nonzero()[0, 0])
            raise InputError(f"{name}: row {row} holds NaN or infinity")
        self._norms = self._norms.where(self._norms > 0, 1.0)

    def __len__(self) -> int:
        return len(self._norms)

    def blocks(self, parts: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of rows that are small in memory, the whole in order; `parts` makes them smaller."""
        step = max(1, _BLOCK_BYTES // (4 * self.width * parts))
        for start in range(0, len(self), step):
            yield start, min(start + step, len(self))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows (stop - start, D), contiguous float32 on the CPU, of length one."""
        stop = min(stop, len(self))
        rows = self._read(start, stop)
        return torch.div(rows, self._norms[start:stop], out=torch.empty_like(rows))

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers (n,), (n, D) float64 on the CPU, of length one to float64."""
        if isinstance(self._features, torch.Tensor):
            chosen = self._features[rows.to(self._features.device)].to("cpu", torch.float32)
        else:
            chosen = torch.from_numpy(np.asarray(self._features[rows.numpy()], dtype=np.float32))
        return chosen.double().div_(self._norms[rows])

    def _read(self, start: int, stop: int) -> torch.Tensor:
        rows = self._features[start:stop]
        if isinstance(rows, torch.Tensor):
            return rows.to("cpu", torch.float32).contiguous()
        # Into an array of our own: torch warns of one that cannot be written to, as a memory map may be.
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(rows, dtype=np.float32, order="C"))
