"""A fitted law in words, numbers and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simclr_scale import __version__
from simclr_scale.scaling.error_laws.fitting import Estimate, LawFit
from simclr_scale.scaling.error_laws.points import Point
from simclr_scale.scaling.pictures import save_figure

if TYPE_CHECKING:
    from rich.console import Console

_AXES = {"params": "parameters of the encoder", "data": "training images", "compute": "FLOP of the encoder in training"}
_NOTHING = 1e-6
_REACH = 4.0  # of the picture, beyond the largest size


@dataclass(frozen=True)
class LawReport:
    """A law of runs.

    Attributes:
        fit: the law.
        points: behind it.
        axis: "params", "data" or "compute".
        measure: "knn", "linear" or "loss".
        wanted: sizes to predict.
        notes: beside the fit's own.
    """

    fit: LawFit
    points: tuple[Point, ...]
    axis: str
    measure: str
    wanted: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def quantity(self) -> str:
        return "loss" if self.measure == "loss" else f"error (1 - {self.measure} top-1)"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        fit = self.fit
        return {
            "axis": self.axis,
            "measure": self.measure,
            "form": fit.form.name,
            "formula": fit.form.formula,
            "parameters": {name: value._asdict() for name, value in fit.parameters.items()},
            "level": fit.level,
            "resamples": len(fit.resamples),
            "rms_log_residual": fit.rms,
            "extrapolation": None if fit.extrapolation is None else vars(fit.extrapolation),
            "predictions": [{"x": x, **value._asdict()} for x, value in self._predictions()],
            "points": [{"name": point.name, "x": point.x, "y": point.y} for point in self.points],
            "notes": [*fit.notes, *self.notes],
            "version": __version__,
        }

    def _predictions(self) -> list[tuple[float, Estimate]]:
        return list(zip(self.wanted, self.fit.predict(self.wanted), strict=True)) if self.wanted else []

    def print_table(self, console: "Console | None" = None) -> None:
        """Parameters with intervals, then how well the law holds."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        fit = self.fit
        console = console or Console()
        console.print(f"y: {self.quantity}; x: {_AXES[self.axis]}", highlight=False, soft_wrap=True)
        table = Table(box=box.ROUNDED)
        table.add_column("")
        for title in ("value", f"{fit.level:.0%} interval"):
            table.add_column(title, justify="right")
        rows = [(name, value) for name, value in fit.parameters.items()]
        rows += [(f"y at {x:.4g}", value) for x, value in self._predictions()]
        for name, value in rows:
            table.add_row(name, _brief(value.value), f"{_brief(value.low)} to {_brief(value.high)}")
        console.print(table)
        lines = [f"{fit.form.name}: {fit.form.formula}", f"root mean square distance of the points {fit.rms:.2%}"]
        if (foreseen := fit.extrapolation) is not None:
            lines.append(
                f"without the {len(foreseen.held_out)} largest the law foresees them to {foreseen.error:.1%}, "
                f"a straight line of logarithms to {foreseen.line_error:.1%}"
            )
        for line in (*lines, *(f"note: {note}" for note in (*fit.notes, *self.notes))):
            console.print(line, highlight=False, soft_wrap=True)


def draw(report: LawReport, file: Path) -> None:
    """Writes the points, the law with the band of its interval, and its floor; both axes by powers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    fit = report.fit
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    x = np.geomspace(fit.x[0], _REACH * fit.x[-1], 200)
    curve = np.array(fit.predict(x))
    axes.fill_between(x, curve[:, 1], curve[:, 2], color="#0072B2", alpha=0.15, linewidth=0)
    axes.plot(x, curve[:, 0], color="#0072B2", label=_in_words(fit))
    axes.plot(fit.x, fit.y, "o", color="#000000", label="runs")
    if fit.extrapolation is not None:
        foreseen = fit.extrapolation
        axes.plot(foreseen.held_out, foreseen.predicted, "x", color="#D55E00", label="foreseen without them")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(_AXES[report.axis])
    axes.set_ylabel(report.quantity)
    if fit.x[-1] < 100 * fit.x[0]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=_ticks(curve[:, 1].min(), max(*fit.y, curve[:, 2].max()))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, file)


def _ticks(low: float, high: float) -> Sequence[float]:
    """Within a power of ten: more of them, the less of it is spanned."""
    span = high / low
    if span > 10:
        return 1, 2, 5
    return np.arange(1, 10, 0.2 if span < 1.6 else 0.5 if span < 3 else 1).tolist()


def _in_words(fit: LawFit) -> str:
    values = ", ".join(f"{name} {_brief(value.value, 3)}" for name, value in fit.parameters.items())
    return f"{fit.form.name}: {values}"


def _brief(value: float, digits: int = 4) -> str:
    """A floor at its lower end comes near 0 without reaching it."""
    return "0" if abs(value) < _NOTHING else f"{value:.{digits}g}"
