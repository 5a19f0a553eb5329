"""The points of a scaling law: from runs, from manifests of their evaluation, and from tables."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from simclr_scale.errors import InputError
from simclr_scale.scaling.error_laws.runs import Measure, read_run, run_of_manifest

Axis = Literal["params", "data", "compute"]

_SIZES = ("params", "data", "compute")
_CONDITIONS = ("global_batch_size", "temperature")
_COLUMNS = ("name", *_SIZES, "error", "accuracy", "loss", *_CONDITIONS)


@dataclass(frozen=True)
class Point:
    """One encoder: how large, and how good.

    Attributes:
        name: of the run.
        x: its size on the axis.
        y: error, 1 - accuracy, or loss.
        conditions: what must be alike in all points, by name: how y was measured, and the sizes not on the axis.
        settings: what may differ, but is told where it does.
    """

    name: str
    x: float
    y: float
    conditions: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def all_points(arguments: Iterable[str], axis: Axis, measure: Measure) -> list[Point]:
    """The points behind all arguments.

    Args:
        arguments: folders of runs; manifests of `linear` or `knn` (.json), whose encoder is a run; or tables (.csv;
            lines that begin with # are comments) with a column of the axis (params; data, in images; compute, in FLOP)
            and one of error, accuracy (0 to 1) or loss.
        measure: what y is: 1 - accuracy of ``knn`` or ``linear``, or the contrastive ``loss``.

    Raises:
        InputError: something is not there or not readable, or the points cannot be compared; the message says why.
    """
    points = [point for argument in arguments for point in _points_of(argument, axis, measure)]
    _refuse_mixtures(points, axis, measure)
    return points


def _points_of(what: str, axis: Axis, measure: Measure) -> list[Point]:
    path = Path(what).expanduser()
    if path.is_dir():
        return [Point(*read_run(path, axis, measure))]
    if not path.is_file():
        raise InputError(f"there is no run, manifest or table {what!r}")
    if path.suffix == ".csv":
        return _of_table(path, axis, measure)
    return [Point(*read_run(run_of_manifest(path), axis, measure, manifest=path))]


def _of_table(path: Path, axis: Axis, measure: Measure) -> list[Point]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
        rows = list(csv.DictReader(lines))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: it cannot be read as CSV: {error}") from error
    columns = list(rows[0]) if rows else []
    for column in columns:
        if column not in _COLUMNS:
            close = get_close_matches(str(column), _COLUMNS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_COLUMNS)}"
            raise InputError(f"{path}: there is no column {column!r}; {hint}")
    if axis not in columns:
        raise InputError(f"{path}: it has no column {axis!r}, the sizes of --axis {axis}")
    given = [name for name in ("error", "accuracy", "loss") if name in columns]
    if len(given) != 1 or (given[0] == "loss") != (measure == "loss"):
        wanted = "loss" if measure == "loss" else "error or accuracy, one of them (a loss needs --measure loss)"
        raise InputError(f"{path}: --measure {measure} needs a column {wanted}; it has {', '.join(given) or 'none'}")
    missing = [name for name in _CONDITIONS if given == ["loss"] and name not in columns]
    if missing:
        raise InputError(
            f"{path}: losses need a column {missing[0]!r}: a loss belongs to its negatives and temperature"
        )
    return [_of_row(row, f"{path}, point {number}", axis, given[0]) for number, row in enumerate(rows, 1)]


def _of_row(row: Mapping[str, str], where: str, axis: Axis, value: str) -> Point:
    x, y = _number(row[axis], axis, where), _number(row[value], value, where)
    if value == "accuracy":
        if y >= 1:
            raise InputError(f"{where}: accuracy {y:g}, wanted below 1, such as 0.76 for 76%")
        y = 1 - y
    others = [name for name in _CONDITIONS if row.get(name)]
    others += [name for name in _SIZES if name != axis and row.get(name) and axis != "compute"]
    return Point(row.get("name") or where, x, y, {name: _number(row[name], name, where) for name in others})


def _number(value: str | None, name: str, where: str) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{where}: {name} must be a number above 0, got {value!r}")
    return number


def _refuse_mixtures(points: list[Point], axis: Axis, measure: Measure) -> None:
    for point in points[1:]:
        for name in sorted({*points[0].conditions, *point.conditions}):
            here, there = points[0].conditions.get(name), point.conditions.get(name)
            if here != there and not (name == "compute" and axis != "compute"):
                why = _reason(name, measure)
                raise InputError(
                    f"{points[0].name} and {point.name} differ in {name} ({_short(here)}, {_short(there)}): {why}"
                )


def _reason(name: str, measure: Measure) -> str:
    if measure == "loss" and name in ("global_batch_size", "temperature", "loss", "negatives"):
        return (
            "a contrastive loss grows with the logarithm of its negatives and with 1 / temperature, so there is no law "
            "across them; fit --measure linear or knn"
        )
    if name in ("params", "data", "images seen", "encoder"):
        return "only the size on the axis may vary"
    return "errors that are measured differently are on no curve"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def differing_settings(points: list[Point]) -> list[str]:
    """Names of settings in which runs differ, beside their size."""
    names = sorted({name for point in points for name in point.settings})
    return [name for name in names if len({json.dumps(point.settings.get(name)) for point in points}) > 1]
