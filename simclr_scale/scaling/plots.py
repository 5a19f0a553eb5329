"""The picture of a scaling report."""

from pathlib import Path
from typing import Any

import numpy as np

from simclr_scale.scaling.laws import amdahl, gustafson
from simclr_scale.scaling.pictures import save_figure
from simclr_scale.scaling.report import ScalingReport, Series

# Told apart also without colours, by their marks: Okabe & Ito 2008 without yellow, which is faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKS = "os^Dv*P"


def draw(report: ScalingReport, file: Path) -> None:
    """Writes images a second and efficiency (or images a second a device) over the devices, both axes by powers.

    The dashed lines lose nothing to the number of devices, the full ones are the fitted laws.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    rates, efficiencies = figure.subplots(1, 2)
    in_series = {id(run) for series in report.series for run in series.runs}
    alone = [run for run in report.runs if id(run) not in in_series and run.images_per_second]
    for number, series in enumerate(report.series):
        style = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKS[number % len(_MARKS)]}
        _draw_series(rates, efficiencies, series, style)
    if alone:
        devices = [run.devices for run in alone]
        rates.plot(devices, [run.images_per_second for run in alone], "o", color="#777777")
        _name_points(rates, [(run.devices, float(run.images_per_second or 0), run.name) for run in alone])
        if not report.series:
            per_device = [float(run.images_per_second_per_device or 0) for run in alone]
            efficiencies.plot(devices, per_device, "o", color="#777777")
            _name_points(efficiencies, [(n, y, run.name) for n, y, run in zip(devices, per_device, alone, strict=True)])
            _powers(efficiencies)
    _powers(rates)
    rates.set_ylabel("images / s")
    efficiencies.set_ylabel("efficiency" if report.series else "images / s a device")
    if report.series:
        efficiencies.axhline(1, color="#777777", linestyle="--", linewidth=1)
        efficiencies.set_ylim(0, max(1.1, 1.05 * max(max(series.efficiency) for series in report.series)))
        rates.legend(fontsize="small")
    counts = sorted({run.devices for run in report.runs if run.images_per_second})
    for axes in (rates, efficiencies):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("devices")
        _tick_at(axes, counts)
        axes.grid(alpha=0.3)
    save_figure(figure, file)


def _draw_series(rates: Any, efficiencies: Any, series: Series, style: dict[str, str]) -> None:
    devices = np.array([run.devices for run in series.runs])
    totals = np.array([float(run.images_per_second or 0) for run in series.runs])
    rates.plot(devices, totals, linestyle="", label=series.title, **style)
    efficiencies.plot(devices, series.efficiency, linestyle="", **style)
    n = np.geomspace(devices[0], devices[-1], 100)
    ideal = totals[0] / series.efficiency[0] * n / devices[0]
    rates.plot(n, ideal, linestyle="--", linewidth=1, color=style["color"])
    fit = series.fit
    if series.kind == "strong":
        law = series.batch / (fit.of_one * amdahl(n, fit.serial_fraction))
    else:
        law = fit.of_one * gustafson(n, fit.serial_fraction)
    rates.plot(n, law, linewidth=1, color=style["color"])
    efficiencies.plot(n, law / ideal, linewidth=1, color=style["color"])


def _name_points(axes: Any, points: list[tuple[int, float, str]]) -> None:
    for place, (x, y, name) in enumerate(sorted(points)):
        # Neighbours of one number of devices go to either side.
        left = place % 2 == 1
        offset = (-6, -3) if left else (6, -3)
        axes.annotate(
            name, (x, y), xytext=offset, textcoords="offset points", ha="right" if left else "left", fontsize=7
        )
    axes.margins(x=0.25)


def _powers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    # Not the powers of ten alone: a few devices span less than one.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _tick_at(axes: Any, counts: list[int]) -> None:
    """At the numbers of devices that there are, but for those too close to the one before."""
    ticks: list[int] = []
    for count in counts:
        if not ticks or count >= 1.4 * ticks[-1]:
            ticks.append(count)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
