"""Named arrays in one .npz file, written whole or not at all, read without trust."""

import os
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np

# What numpy and zipfile raise on a damaged or foreign file; NotImplementedError: zipfile, of an unknown compression.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


class ArrayFileError(ValueError):
    """The file is missing, damaged, or not one of plain arrays."""


def write_arrays(path: str, arrays: Mapping[str, np.ndarray], workplace: str | None = None) -> None:
    """Write `arrays` as by `replacing`. The same arrays give the same bytes.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replacing(path, workplace) as partial, open(partial, "wb") as file:
        np.savez(file, **dict(sorted(arrays.items())))  # type: ignore[arg-type]


class replacing:
    """``with replacing(path) as partial``: a new file, which takes the place of `path` if the block ends well.

    Args:
        path: the file.
        workplace: folder on the same disk for the new file, where a kill may leave it; by default that of `path`.
    """

    def __init__(self, path: str, workplace: str | None = None) -> None:
        self._path = path
        self._workplace = workplace or os.path.dirname(path) or "."

    def __enter__(self) -> str:
        handle, self._partial = tempfile.mkstemp(prefix=f".{os.path.basename(self._path)}.", dir=self._workplace)
        os.close(handle)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            os.unlink(self._partial)
            return
        # As files made without mkstemp, which lets only their owner read them.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self._partial, 0o666 & ~umask)
        os.replace(self._partial, self._path)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Compressed arrays are refused: `write_arrays` makes none, and a small file of them could fill the memory.

    Raises:
        ArrayFileError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ArrayFileError(f"{path}: holds compressed arrays")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except _UNREADABLE as error:
        raise ArrayFileError(f"{path}: {error}") from error
