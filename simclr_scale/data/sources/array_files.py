"""Named arrays in one .npz file, written whole or not at all, read without trust."""

import os
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np

# What numpy and zipfile raise on a damaged or foreign file.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError)


class ArrayFileError(ValueError):
    """The file is missing, damaged, or not one of plain arrays."""


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` beside `path` and move them into place. The same arrays give the same bytes.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **dict(sorted(arrays.items())))  # type: ignore[arg-type]


class replacing:
    """``with replacing(path) as partial``: a new file beside `path`, which takes its place if the block ends well."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> str:
        folder, name = os.path.split(self._path)
        handle, self._partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder or ".")
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
