"""Suites: which data sets an encoder is transferred to, each with its metric. A YAML file of a few lines.

published: what the numbers under `published` below are of     (optional)
sets:
  - name: Clothing                         # in the table
    source: clothing                       # as data.source of other commands
    metric: top1                           # a name of METRICS
    root: photos                           # where the source lies, below the root of the call (optional)
    splits: {train: a, val: b, test: c}    # where the data set's splits have unusual names (optional)
    shots: 30                              # training images of every class (optional); without a test split of
                                           # its own, all other images are the test
    published: 68.4                        # percent (optional)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simclr_scale.errors import InputError
from simclr_scale.evaluation.metrics import METRICS, check_metric

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "suites", _PACKAGE.parent / "suites")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SuiteEntry:
    """One data set of a suite; the module says what its fields mean."""

    name: str
    source: str
    metric: str
    root: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    shots: int | None = None
    published: float | None = None


@dataclass(frozen=True)
class Suite:
    """Data sets in the order of the table."""

    name: str
    entries: tuple[SuiteEntry, ...]
    published: str = ""
    """What the published values are of."""


def shipped_suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def load_suite(suite: str | os.PathLike[str]) -> Suite:
    """A suite from a file, or by the name of one that is shipped (`twelve`).

    Raises:
        InputError: there is neither, or the file does not say what it should; names the line, or the set and the key.
    """
    path = Path(suite).expanduser()
    if not path.is_file():
        shipped = shipped_suites()
        close = get_close_matches(str(suite), shipped, n=1)
        if str(suite) not in shipped:
            hint = f"did you mean {close[0]}?" if close else f"shipped suites are {', '.join(shipped)}"
            raise InputError(f"there is no suite file or shipped suite {str(suite)!r}; {hint}")
        path = shipped[str(suite)]
    content = _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("sets"), list) or not content["sets"]:
        raise InputError(f"{path}: wanted a key 'sets' with a list of data sets")
    _check_keys(content, {"sets": list, "published": str}, ("sets",), f"{path}")
    entries = tuple(_entry(item, f"{path}: set {number}") for number, item in enumerate(content["sets"], 1))
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two sets are called {twice!r}")
    return Suite(path.stem, entries, content.get("published", ""))


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InputError(f"{path}, line {mark.line + 1 if mark else '?'}: {error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from error


def _entry(item: Any, where: str) -> SuiteEntry:
    if not isinstance(item, dict):
        raise InputError(f"{where} is {item!r}, wanted keys such as name, source and metric")
    if isinstance(item.get("name"), str):
        where += f" ({item['name']})"
    kinds = {"name": str, "source": str, "metric": str, "root": str, "splits": dict, "shots": int, "published": float}
    _check_keys(item, kinds, ("name", "source", "metric"), where)
    try:
        check_metric(item["metric"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    _check_keys(item.get("splits", {}), dict.fromkeys(_SPLITS, str), (), f"{where}: splits")
    if "shots" in item and item["shots"] < 1:
        raise InputError(f"{where}: shots: {item['shots']}, wanted at least 1")
    return SuiteEntry(**item)


def _check_keys(item: Mapping[Any, Any], kinds: Mapping[str, type], required: tuple[str, ...], where: str) -> None:
    for key, value in item.items():
        if key not in kinds:
            close = get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}"
            raise InputError(f"{where}: there is no key {key!r}; {hint}")
        wanted = (int, float) if kinds[key] is float else (kinds[key],)
        if not isinstance(value, wanted) or isinstance(value, bool) or value == "":
            what = {str: "a text", int: "a whole number", float: "a number", dict: "keys with values", list: "a list"}
            raise InputError(f"{where}: {key}: {value!r}, wanted {what[kinds[key]]}")
    missing = [key for key in required if key not in item]
    if missing:
        hint = f"; one of {', '.join(METRICS)}" if missing[0] == "metric" else ""
        raise InputError(f"{where}: has no {missing[0]}{hint}")
