"""MATLAB files of version 5 to 7, read as data and with every length checked.

SciPy reads them too, but its compiled reader ends the process by a segmentation fault on some damaged files, as
corrupting bytes at random showed. The layout is MathWorks' "MAT-File Format", chapter 1. Arrays of numbers, text,
cells and structures of these are read; of anything else the name and shape are known.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from simclr_scale.data.sources.decoding import reason_of
from simclr_scale.errors import InputError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# Types of stored numbers and classes of arrays, by their codes in the file.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_CELL, _STRUCT, _CHAR = 1, 2, 4
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_COMPLEX = 0x08
# What precedes the numbers of an array: flags, shape and name.
_LONGEST_PREAMBLE = 4096
_MOST_AXES = 32
_MOST_CELLS = 4096


@dataclass(frozen=True)
class Variable:
    """One variable of a file, its values not read yet."""

    name: str
    shape: tuple[int, ...]
    numeric: bool
    """Whether it is an array of real numbers, not text, cells, a structure, a sparse or a complex array."""
    start: int
    size: int
    compressed: bool


def list_variables(path: str) -> list[Variable]:
    """All variables of a file.

    Raises:
        InputError: it is missing or damaged, of MATLAB 7.3, which is HDF5 inside, or older than version 5.
    """
    with _Guarded(path), open(path, "rb") as file:
        return [variable for variable, _ in _variables(file)]


def read_variables(path: str, names: Sequence[str]) -> dict[str, Any]:
    """Some variables: arrays indexed as in MATLAB (rows, columns, ...), text as str, cells as lists of these, and
    structures as lists of dictionaries of these by field.

    What else a variable may be is None. Errors as of `list_variables`.
    """
    with _Guarded(path), open(path, "rb") as file:
        found = {variable.name: (variable, order) for variable, order in _variables(file)}
        return {name: _read(file, *found[name]) for name in names}


def choose_image(path: str, key: str | None) -> Variable:
    """The variable that is an image: that of name `key`; else the only numeric one of three axes, else of two.

    Raises:
        InputError: there is none, or there are several.
    """
    variables = [variable for variable in list_variables(path) if variable.numeric]
    if key is not None:
        chosen = [variable for variable in variables if variable.name == key]
        if not chosen:
            raise InputError(f"{path}: has no numeric variable {key!r} (image_key); it has {_names(variables)}")
        return chosen[0]
    planes = [variable for variable in variables if len(variable.shape) == 2 and min(variable.shape) > 1]
    candidates = [variable for variable in variables if len(variable.shape) == 3] or planes
    if len(candidates) != 1:
        found = f"holds several arrays, {_names(candidates)}" if candidates else "holds no array of 2 or 3 axes"
        raise InputError(f"{path}: {found}; name the image's variable by image_key")
    return candidates[0]


def _names(variables: Sequence[Variable]) -> str:
    return ", ".join(variable.name for variable in variables) or "none"


class _Guarded:
    """Turns what goes wrong with a file into an InputError that names it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | struct.error | zlib.error) and not isinstance(error, InputError):
            raise InputError(f"{self.path}: not a readable MATLAB file ({reason_of(error)})") from error


def _variables(file: BinaryIO) -> Iterator[tuple[Variable, str]]:
    """The variables, and the byte order of the file, '<' or '>'."""
    header = file.read(_HEADER)
    order = {b"IM": "<", b"MI": ">"}.get(header[126:])
    if order is None:
        raise ValueError("it does not begin as files of MATLAB 5 to 7 do")
    if struct.unpack(order + "H", header[124:126])[0] >= 0x0200:
        raise ValueError("it is of MATLAB 7.3 (HDF5), which is not supported: save it with '-v7', or as .npy")
    end = file.seek(0, 2)
    start = _HEADER
    while start + 8 <= end:
        file.seek(start)
        kind, size = struct.unpack(order + "II", file.read(8))
        start += 8
        if size > end - start:
            raise ValueError("it is truncated")
        if kind in (_MATRIX, _COMPRESSED):
            head = file.read(min(size, _LONGEST_PREAMBLE))
            if kind == _COMPRESSED:
                head = zlib.decompressobj().decompress(head, _LONGEST_PREAMBLE)[8:]
            preamble = _Elements(head, order).preamble()
            yield Variable(preamble.name, preamble.shape, preamble.numeric, start, size, kind == _COMPRESSED), order
        start += size


def _read(file: BinaryIO, variable: Variable, order: str) -> Any:
    file.seek(variable.start)
    content = file.read(variable.size)
    if variable.compressed:
        unpacker = zlib.decompressobj()
        kind, size = struct.unpack(order + "II", unpacker.decompress(content, 8))
        # No number is longer than 8 bytes; what a bomb has beyond them is never unpacked.
        if kind != _MATRIX or (variable.numeric and size > 8 * math.prod(variable.shape) + _LONGEST_PREAMBLE):
            raise ValueError("it is damaged")
        content = unpacker.decompress(unpacker.unconsumed_tail, size)
        if len(content) < size:
            raise ValueError("it is truncated")
    return _Elements(content, order).matrix()


@dataclass(frozen=True)
class _Preamble:
    kind: int
    shape: tuple[int, ...]
    name: str
    numeric: bool


class _Elements:
    """The data elements inside an array, one after the other."""

    def __init__(self, content: bytes, order: str) -> None:
        self._content, self._order, self._at = content, order, 0

    def next(self) -> tuple[int, bytes]:
        """Type and content of one element. A short one has its content in its tag."""
        tag = self._content[self._at : self._at + 8]
        kind, size = struct.unpack(self._order + "II", tag)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise ValueError("it is damaged")
            self._at += 8
            return kind, tag[4 : 4 + size]
        start = self._at + 8
        if start + size > len(self._content):
            raise ValueError("it is truncated")
        self._at = start + size + -size % 8
        return kind, self._content[start : start + size]

    def numbers(self) -> np.ndarray:
        kind, content = self.next()
        if kind not in _STORED:
            raise ValueError("it is damaged")
        return np.frombuffer(content, self._order + _STORED[kind])

    def preamble(self) -> _Preamble:
        flags, shape = self.numbers(), tuple(self.numbers().tolist())
        _, name = self.next()
        whole = all(isinstance(side, int) and side >= 0 for side in shape)
        if len(flags) < 1 or not 2 <= len(shape) <= _MOST_AXES or not whole:
            raise ValueError("it is damaged")
        kind, options = int(flags[0]) & 0xFF, int(flags[0]) >> 8
        return _Preamble(kind, shape, name.decode("latin-1"), kind in _CLASSES and not options & _COMPLEX)

    def matrix(self, in_cell: bool = False) -> Any:
        """An array, text, a list of them for a cell, of dictionaries for structures, or None."""
        preamble = self.preamble()
        count = math.prod(preamble.shape)
        if preamble.numeric:
            values = self.numbers()
            if len(values) != count:
                raise ValueError(f"{preamble.name} has {len(values)} values for a shape of {preamble.shape}")
            values = values.astype(_CLASSES[preamble.kind], copy=False)
            return values.reshape(preamble.shape, order="F")
        if preamble.kind == _CHAR and count:
            kind, text = self.next()
            byte_order = {"<": "-le", ">": "-be"}[self._order]
            encoding = _ENCODINGS.get(kind, "latin-1")
            return text.decode(encoding + byte_order if "utf-" in encoding and encoding != "utf-8" else encoding)
        if preamble.kind == _CELL and not in_cell and count <= _MOST_CELLS:
            return [self._cell() for _ in range(count)]
        if preamble.kind == _STRUCT and not in_cell:
            return self._structures(count)
        return None

    def _structures(self, count: int) -> list[dict[str, Any]]:
        """One dictionary for each element of an array of structures."""
        [length] = self.numbers().tolist()
        _, text = self.next()
        if not 0 < length <= _LONGEST_PREAMBLE or len(text) % length:
            raise ValueError("it is damaged")
        cells = (text[start : start + length] for start in range(0, len(text), length))
        fields = [cell.partition(b"\0")[0].decode("latin-1") for cell in cells]
        if count * len(fields) * 8 > len(self._content):  # each value has a tag of 8 bytes
            raise ValueError("it is truncated")
        return [{field: self._cell() for field in fields} for _ in range(count)]

    def _cell(self) -> Any:
        kind, content = self.next()
        if kind != _MATRIX:
            raise ValueError("it is damaged")
        return _Elements(content, self._order).matrix(in_cell=True) if content else None
