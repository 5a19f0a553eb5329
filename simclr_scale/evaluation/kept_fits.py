"""Fits on disk, beside the features that they are of: what a killed evaluation need not do again."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simclr_scale.errors import InputError
from simclr_scale.evaluation.manifest import library_versions


@dataclass(frozen=True)
class FitRecord:
    """What came of one fit."""

    answers: np.ndarray
    """For the test images, as `Outcome` has them."""
    details: Mapping[str, Any]
    warnings: tuple[str, ...]


def kept_fit(
    cache: str | os.PathLike[str] | None,
    parts: Sequence[np.ndarray],
    settings: Mapping[str, Any],
    fit: Callable[[], FitRecord],
) -> FitRecord:
    """What `fit` gives, from the cache where it is there, and kept in it afterwards.

    A fit is known by the content of `parts`, all arrays that it depends on, by `settings` and by the versions of the
    libraries. A file that is damaged counts as none.

    Raises:
        InputError: the cache cannot be written.
    """
    if cache is None:
        return fit()
    facts = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in settings.items()}
    digest = hashlib.sha256(json.dumps([facts, library_versions()], sort_keys=True).encode())
    for part in parts:
        digest.update(f"{part.dtype.str} {part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data)
    file = Path(cache) / "fits" / f"{digest.hexdigest()[:32]}.npz"
    found = _read(file)
    if found is None:
        found = fit()
        _write(file, found)
    return found


def _read(file: Path) -> FitRecord | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            told = json.loads(bytes(arrays["told"]))
            return FitRecord(arrays["answers"], told["details"], tuple(told["warnings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: Path, record: FitRecord) -> None:
    told = json.dumps({"details": dict(record.details), "warnings": list(record.warnings)})
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as target:
            np.savez(target, answers=record.answers, told=np.frombuffer(told.encode(), np.uint8))
        os.replace(draft, file)
    except OSError as error:
        raise InputError(f"the cache {file.parent} cannot be written ({error.strerror or error})") from error
    finally:
        draft.unlink(missing_ok=True)
