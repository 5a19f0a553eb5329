"""Runs side by side: rates, efficiencies against the smallest run, the serial fraction that explains them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from simclr_scale import __version__
from simclr_scale.errors import InputError
from simclr_scale.scaling.laws import Fit, amdahl, fit_serial_fraction, gustafson
from simclr_scale.scaling.runs import RunSpeed

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["strong", "weak"]
Mode = Literal["auto", "strong", "weak"]


@dataclass(frozen=True)
class Series:
    """Runs that differ in nothing but the number of devices.

    Attributes:
        kind: "strong": of one global batch; "weak": of one batch a device.
        batch: that batch.
        runs: by devices, the fewest first.
        efficiency: of each run, images a second a device over those of the fewest devices (their mean, where several
            runs have the fewest).
        fit: Amdahl's law of the time of a step for strong, Gustafson's of the images a second for weak scaling.
    """

    kind: Kind
    batch: float
    runs: tuple[RunSpeed, ...]
    efficiency: tuple[float, ...]
    fit: Fit

    @property
    def title(self) -> str:
        what = "global batch" if self.kind == "strong" else "batch a device"
        return f"{self.kind} scaling, {what} {self.batch:g}"


def find_series(runs: Sequence[RunSpeed], mode: Mode = "auto") -> list[Series]:
    """All series of two or more numbers of devices.

    Args:
        mode: "strong" and "weak" look for that kind alone.

    Raises:
        InputError: a kind was asked for and there is no such series.
    """
    kinds: tuple[Kind, ...] = ("strong", "weak") if mode == "auto" else (mode,)
    found = [series for kind in kinds for series in _series_of(runs, kind)]
    if mode != "auto" and not found:
        what = "global batch" if mode == "strong" else "batch a device"
        raise InputError(
            f"--mode {mode} needs two runs of one {what} on different numbers of devices, the hardware, encoder, image "
            "size and precision alike; there are none"
        )
    return found


def _series_of(runs: Sequence[RunSpeed], kind: Kind) -> list[Series]:
    groups: dict[tuple[Any, ...], list[RunSpeed]] = {}
    for run in runs:
        if run.batch is not None and run.images_per_second is not None:
            batch = run.batch if kind == "strong" else run.batch / run.devices
            alike = (run.hardware, run.software, run.encoder, run.image_size, run.precision)
            groups.setdefault((batch, *alike), []).append(run)
    return [
        _series(kind, key[0], sorted(group, key=lambda run: run.devices))
        for key, group in groups.items()
        if len({run.devices for run in group}) > 1
    ]


def _series(kind: Kind, batch: float, runs: list[RunSpeed]) -> Series:
    rates = [float(run.images_per_second_per_device or 0) for run in runs]
    fewest = [rate for run, rate in zip(runs, rates, strict=True) if run.devices == runs[0].devices]
    reference = sum(fewest) / len(fewest)
    totals = [float(run.images_per_second or 0) for run in runs]
    if kind == "strong":
        fit = fit_serial_fraction([run.devices for run in runs], [batch / total for total in totals], amdahl)
    else:
        fit = fit_serial_fraction([run.devices for run in runs], totals, gustafson)
    return Series(kind, batch, tuple(runs), tuple(rate / reference for rate in rates), fit)


@dataclass(frozen=True)
class ScalingReport:
    """A comparison of runs, to be printed, written or drawn."""

    runs: tuple[RunSpeed, ...]
    series: tuple[Series, ...]
    epochs: float

    def efficiency(self, run: RunSpeed, kind: Kind) -> float | None:
        """Of a run in its series of that kind; None where it is in none."""
        for series in self.series:
            if series.kind == kind and run in series.runs:
                return series.efficiency[series.runs.index(run)]
        return None

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is not known is None."""
        return {
            "epochs": self.epochs,
            "runs": [
                vars(run)
                | {
                    "images_per_second": run.images_per_second,
                    "images_per_second_per_device": run.images_per_second_per_device,
                    "seconds": run.seconds,
                    "seconds_of_epochs": run.seconds_of_epochs(self.epochs),
                    "strong_efficiency": self.efficiency(run, "strong"),
                    "weak_efficiency": self.efficiency(run, "weak"),
                }
                for run in self.runs
            ],
            "series": [
                {
                    "kind": series.kind,
                    "batch": series.batch,
                    "runs": [run.name for run in series.runs],
                    "devices": [run.devices for run in series.runs],
                    "efficiency": list(series.efficiency),
                    "law": "Amdahl" if series.kind == "strong" else "Gustafson",
                    "serial_fraction": series.fit.serial_fraction,
                    "standard_error": series.fit.error,
                    "worst_relative_distance": series.fit.worst,
                }
                for series in self.series
            ],
            "version": __version__,
        }

    def print_table(self, console: "Console | None" = None) -> None:
        """One line a run, then one a series."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        if not console.is_terminal:
            console = Console(width=200)
        table = Table(box=box.ROUNDED)
        for title, cells in self._columns():
            if any(cells):
                table.add_column(title, justify="left" if title == "run" else "right", overflow="fold")
        for row in zip(*(cells for _, cells in self._columns() if any(cells)), strict=True):
            table.add_row(*row)
        console.print(table)
        for series in self.series:
            console.print(f"{series.title}: {_explained(series)}", highlight=False, soft_wrap=True)
        if not self.series and len(self.runs) > 1:
            console.print(
                "No two of them differ in the number of devices alone, so there is no efficiency to state.",
                highlight=False,
                soft_wrap=True,
            )

    def _columns(self) -> list[tuple[str, list[str]]]:
        def column(show: Callable[[RunSpeed], str | None]) -> list[str]:
            return [show(run) or "" for run in self.runs]

        def number(name: str, pattern: str) -> list[str]:
            return column(lambda run: format(value, pattern) if (value := getattr(run, name)) is not None else None)

        def share(kind: Kind) -> list[str]:
            return column(lambda run: f"{value:.1%}" if (value := self.efficiency(run, kind)) is not None else None)

        views = column(
            lambda run: f"{2 * run.images_per_second:,.0f}" if run.images_per_second and run.encoder else None
        )
        return [
            ("run", column(lambda run: run.name)),
            ("devices", column(lambda run: f"{run.devices:,}")),
            ("batch", number("batch", ",")),
            ("step, s", number("seconds_per_step", ".4g")),
            ("p95, s", number("p95_seconds_per_step", ".4g")),
            ("images/s", number("images_per_second", ",.0f")),
            ("views/s", views),
            ("images/s\na device", number("images_per_second_per_device", ",.1f")),
            ("strong", share("strong")),
            ("weak", share("weak")),
            ("data\nwait", column(lambda run: f"{run.data_wait:.0%}" if run.data_wait is not None else None)),
            (
                "MB sent\na step",
                column(lambda run: f"{(run.sent_bytes_per_step or 0) / 1e6:,.1f}" if run.encoder else ""),
            ),
            ("peak\nGiB", column(lambda run: f"{run.peak_memory_bytes / 2**30:.2f}" if run.peak_memory_bytes else "")),
            ("J/image", number("joules_per_image", ".3g")),
            ("time", column(lambda run: _duration(run.seconds))),
            ("stated", column(lambda run: _duration(run.stated_minutes and 60 * run.stated_minutes))),
            (f"{self.epochs:g}\nepochs", column(lambda run: _duration(run.seconds_of_epochs(self.epochs)))),
            ("accuracy", number("accuracy", ".1f")),
        ]


def _explained(series: Series) -> str:
    fit = series.fit
    devices = f"{series.runs[0].devices} to {series.runs[-1].devices} devices"
    error = f" +- {fit.error:.2%}" if fit.error is not None else ", from two numbers of devices, which no law can miss"
    law = "Amdahl" if series.kind == "strong" else "Gustafson"
    text = f"efficiency {series.efficiency[-1]:.1%} from {devices}; "
    text += f"serial fraction ({law}) {fit.serial_fraction:.2%}{error}"
    if series.kind == "strong" and fit.serial_fraction > 0:
        text += f"; no number of devices is more than {1 / fit.serial_fraction:,.0f} times as fast as one"
    return text


def _duration(seconds: float | None) -> str | None:
    """As a person says it: to a tenth of the largest unit that fits."""
    if seconds is None:
        return None
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.4g} {unit}" if seconds / size < 100 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.3g} s"
