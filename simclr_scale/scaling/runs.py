"""Runs to compare: what ours measured, and what others stated in a table."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from simclr_scale.errors import InputError

SUMMARY = "summary.json"
SHIPPED = {path.stem: path for path in Path(__file__).parent.glob("*.csv")}

# A month of 30 days: 8 device-months on 1,024 devices are then 5.625 hours.
HOURS_OF_A_MONTH = 720


@dataclass(frozen=True)
class RunSpeed:
    """How fast one run was. All that it was is stated; the rest is derived.

    Attributes:
        name: of the run.
        devices: that shared each step.
        batch: images in a step over all devices.
        seconds_per_step: median of ours; as stated of others.
        mean_seconds_per_step: over all steps, where that is known beside the median.
        p95_seconds_per_step: 95th percentile.
        steps: of the whole training.
        train_images: in an epoch.
        device_months: work in place of steps: 30 days of one device each.
        stated_minutes: that others say the whole took.
        hardware, software, encoder, image_size, precision: runs are compared only where these agree.
        data_wait: share of the time without images.
        sent_bytes_per_step: that leave one rank.
        peak_memory_bytes, joules_per_image: as the run measured them.
        optimizer, accuracy: carried along.
    """

    name: str
    devices: int
    batch: int | None = None
    seconds_per_step: float | None = None
    mean_seconds_per_step: float | None = None
    p95_seconds_per_step: float | None = None
    steps: int | None = None
    train_images: int | None = None
    device_months: float | None = None
    stated_minutes: float | None = None
    hardware: str | None = None
    software: str | None = None
    encoder: str | None = None
    image_size: int | None = None
    precision: str | None = None
    data_wait: float | None = None
    sent_bytes_per_step: int | None = None
    peak_memory_bytes: int | None = None
    joules_per_image: float | None = None
    optimizer: str | None = field(default=None, compare=False)
    accuracy: float | None = field(default=None, compare=False)

    @property
    def images_per_second(self) -> float | None:
        """Over all devices; an image counts once, however many views it has."""
        step = self.mean_seconds_per_step or self.seconds_per_step
        return self.batch / step if self.batch and step else None

    @property
    def images_per_second_per_device(self) -> float | None:
        rate = self.images_per_second
        return rate / self.devices if rate else None

    @property
    def seconds(self) -> float | None:
        """Of the whole training: steps by the time of one, or the device-months shared out among the devices."""
        if self.device_months is not None:
            return self.device_months * HOURS_OF_A_MONTH * 3600 / self.devices
        step = self.mean_seconds_per_step or self.seconds_per_step
        return self.steps * step if self.steps and step else None

    @property
    def epochs(self) -> float | None:
        """That the steps are, where the size of the training set is known."""
        return self.steps * self.batch / self.train_images if self.steps and self.batch and self.train_images else None

    def seconds_of_epochs(self, epochs: float) -> float | None:
        """Of so many epochs of whole batches."""
        step = self.mean_seconds_per_step or self.seconds_per_step
        if not (step and self.batch and self.train_images):
            return None
        return math.ceil(epochs * (self.train_images // self.batch)) * step


_NUMBERS = {name: kind for name, kind in RunSpeed.__annotations__.items() if kind not in (str, str | None)}
_FIELDS = tuple(f.name for f in fields(RunSpeed))


def read_runs(what: str) -> list[RunSpeed]:
    """The runs behind one argument of ``report``.

    Args:
        what: a run's folder, or a ``summary.json``; or a table of stated runs: a .csv (lines that begin with # are
            comments), .json or .yaml file, or the name of a table that comes with the package
            (``imagenet_large_batch``).

    Raises:
        InputError: there is no such run or table, or it lacks what a comparison needs.
    """
    path = Path(what).expanduser()
    if path.is_dir():
        path = path / SUMMARY
        if not path.is_file():
            raise InputError(f"{what} has no {SUMMARY}: it is no run, or one that has not ended")
    elif not path.exists() and what in SHIPPED:
        path = SHIPPED[what]
    if not path.is_file():
        close = get_close_matches(what, SHIPPED, n=1)
        hint = f"did you mean {close[0]}?" if close else f"tables that ship are {', '.join(SHIPPED)}"
        raise InputError(f"there is no run or table {what!r}; {hint}")
    content = _read(path)
    if path.name == SUMMARY:
        return [_of_summary(content, path)]
    rows = content.get("runs") if isinstance(content, Mapping) else content
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: a table is a list of runs, each with {', '.join(_FIELDS[:4])} and so on")
    return [_of_row(row, f"{path}, run {number}") for number, row in enumerate(rows, 1)]


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(line for line in text.splitlines() if line.strip() and line[0] != "#"))
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, csv.Error) as error:
        raise InputError(f"{path}: it cannot be read as {path.suffix or 'YAML'}: {error}") from error


def _of_summary(summary: Any, path: Path) -> RunSpeed:
    measured = summary.get("scaling") if isinstance(summary, Mapping) else None
    if not isinstance(measured, Mapping):
        raise InputError(f"{path} has no entry 'scaling': this run did not measure its speed")
    if not measured["steps_timed"]:
        raise InputError(f"{path}: no step of this run was timed; it needs at least 2 of them")
    return RunSpeed(
        name=path.absolute().parent.name,
        devices=measured["devices"],
        batch=measured["global_batch_size"],
        seconds_per_step=measured["step_seconds"]["median"],
        mean_seconds_per_step=measured["step_seconds"]["mean"],
        p95_seconds_per_step=measured["step_seconds"]["p95"],
        steps=summary["steps"],
        train_images=summary["train_images"],
        hardware=measured["device"],
        software=f"simclr_scale {summary['version']}",
        encoder=measured["encoder"],
        image_size=measured["image_size"],
        precision=measured["precision"],
        data_wait=measured["data_wait"],
        sent_bytes_per_step=measured["sent_bytes_per_step"],
        peak_memory_bytes=measured["peak_memory_bytes"],
        joules_per_image=measured["joules_per_image"],
    )


def _of_row(row: Any, where: str) -> RunSpeed:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a run is written as names and values, got {row!r}")
    given = {key: value for key, value in row.items() if value not in (None, "")}
    for key in given:
        if key not in _FIELDS:
            close = get_close_matches(str(key), _FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(_FIELDS)}"
            raise InputError(f"{where}: there is no column {key!r}; {hint}")
    missing = [key for key in ("name", "devices") if key not in given]
    if missing:
        raise InputError(f"{where}: it has no {missing[0]}")
    for key in _NUMBERS.keys() & given.keys():
        given[key] = _number(given[key], key, where)
    values: dict[str, Any] = {key: value if key in _NUMBERS else str(value) for key, value in given.items()}
    run = RunSpeed(**values)
    if run.images_per_second is None and run.device_months is None:
        raise InputError(f"{where}: give batch and seconds_per_step, or device_months")
    return run


def _number(value: Any, key: str, where: str) -> float:
    whole = _NUMBERS[key] in (int, int | None)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < 0 or (whole and number != int(number)):
        raise InputError(f"{where}: {key} must be a {'whole ' if whole else ''}number, not below 0; got {value!r}")
    if number == 0 and key in ("devices", "batch", "seconds_per_step"):
        raise InputError(f"{where}: {key} must be above 0")
    return int(number) if whole else number


def all_runs(arguments: Iterable[str]) -> list[RunSpeed]:
    """The runs of all arguments; equal names get their number."""
    runs = [run for argument in arguments for run in read_runs(argument)]
    seen: dict[str, int] = {}
    named = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        count = seen[run.name]
        named.append(run if count == 1 else RunSpeed(**{**vars(run), "name": f"{run.name} ({count})"}))
    return named
