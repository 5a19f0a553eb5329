"""MATLAB files, by SciPy, which parses them as data and runs nothing."""

import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from simclr_scale.data.sources.decoding import reason_of
from simclr_scale.errors import InputError

_NUMERIC = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | {"single", "double"}

# What SciPy raises on damaged files, found by corrupting bytes at random.
_UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class Variable(NamedTuple):
    """One variable of a file, before its values are read. Text and cells have a MATLAB class of their own."""

    name: str
    shape: tuple[int, ...]
    matlab_class: str

    @property
    def numeric(self) -> bool:
        return self.matlab_class in _NUMERIC


def list_variables(path: str) -> list[Variable]:
    """All variables of a file of MATLAB 4 to 7.

    Raises:
        InputError: it is missing or damaged, or of MATLAB 7.3, which is HDF5 inside.
    """
    from scipy.io import whosmat

    return [Variable(*entry) for entry in _parsed(path, lambda: whosmat(path, appendmat=False))]


def read_variables(path: str, names: Sequence[str]) -> dict[str, Any]:
    """The values of some variables, indexed as in MATLAB: rows first, then columns. Errors as of `list_variables`."""
    from scipy.io import loadmat

    values = _parsed(path, lambda: loadmat(path, appendmat=False, variable_names=list(names)))
    return {name: values[name] for name in names}


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


def _parsed(path: str, parse: Any) -> Any:
    from scipy.io.matlab import MatReadError

    try:
        with warnings.catch_warnings():
            # Of variables of the same name, for one: the last is taken.
            warnings.simplefilter("ignore")
            with np.errstate(all="ignore"):
                return parse()
    except NotImplementedError as error:
        raise InputError(
            f"{path}: is of MATLAB 7.3 (HDF5), which is not supported; save it in MATLAB with '-v7', or as .npy"
        ) from error
    except (MatReadError, *_UNREADABLE) as error:
        raise InputError(f"{path}: not a readable MATLAB file ({reason_of(error)})") from error
