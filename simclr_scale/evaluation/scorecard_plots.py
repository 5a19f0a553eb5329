"""Plots of a scorecard: accuracy against the number of labels, and against the size of the encoder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simclr_scale.evaluation.manifest import require_new_file
from simclr_scale.evaluation.scorecard import KINDS, TRANSFER, Row, Scorecard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {"knn": ":", "linear": "-", "finetune": "--", TRANSFER: "-."}
_FILLS = {"knn": "left", "linear": "full", "finetune": "none"}
_MARKERS = "osD^vP*X"


def plot_labels(card: Scorecard, path: str | os.PathLike[str]) -> Path | None:
    """Accuracy against the number of labelled training images, one line for each encoder and way of using them.

    Returns:
        The file (PNG), or None where no evaluation was made with two numbers of labels.

    Raises:
        InputError: the file exists, or its folder does not.
    """
    by_kind = {kind: [row for row in card.rows if row.task.kind == kind] for kind in KINDS}
    if max(len({_labels(row) for row in rows}) for rows in by_kind.values()) < 2:
        return None

    def draw(axes: "Axes") -> None:
        for kind, rows in ((kind, sorted(rows, key=_labels)) for kind, rows in by_kind.items() if rows):
            for number, contestant in enumerate(card.contestants):
                means = [row.cells[number].mean for row in rows]
                intervals = [row.intervals[number] for row in rows]
                axes.errorbar(
                    [_labels(row) for row in rows],
                    [100 * mean for mean in means],
                    yerr=[
                        [100 * max(0.0, mean - each.low) for mean, each in zip(means, intervals, strict=True)],
                        [100 * max(0.0, each.high - mean) for mean, each in zip(means, intervals, strict=True)],
                    ],
                    color=f"C{number}",
                    linestyle=_STYLES[kind],
                    marker=_MARKERS[number % len(_MARKERS)],
                    fillstyle=_FILLS[kind],
                    capsize=3,
                    label=f"{contestant.spec}, {KINDS[kind]}",
                )
        axes.set_xscale("log")
        axes.set_xlabel("labelled training images")

    return _plot(card, draw, path)


def plot_sizes(card: Scorecard, path: str | os.PathLike[str]) -> Path | None:
    """Accuracy against the number of parameters, one line for each evaluation.

    The claim to see or to miss is that larger networks need fewer labels (Chen et al. 2020b, "Big Self-Supervised
    Models are Strong Semi-Supervised Learners", figure 1). Encoders without parameters are left out.

    Returns:
        The file (PNG), or None where there are no two sizes.

    Raises:
        InputError: the file exists, or its folder does not.
    """
    sized = [
        (contestant.parameters, number) for number, contestant in enumerate(card.contestants) if contestant.parameters
    ]
    if len({parameters for parameters, _ in sized}) < 2:
        return None

    def draw(axes: "Axes") -> None:
        order = sorted(sized)
        for position, row in enumerate(card.rows):
            axes.plot(
                [parameters for parameters, _ in order],
                [100 * row.cells[number].mean for _, number in order],
                color=f"C{position}",
                linestyle=_STYLES[row.task.kind],
                marker=_MARKERS[position % len(_MARKERS)],
                label=row.task.title,
            )
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the encoder")

    return _plot(card, draw, path)


def _labels(row: Row) -> int:
    return row.cells[0].training_images


def _plot(card: Scorecard, draw: Callable[["Axes"], None], path: str | os.PathLike[str]) -> Path:
    # Not pyplot, whose state is the caller's.
    from matplotlib.figure import Figure

    file = require_new_file(path)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    record = card.rows[0].cells[0].record
    axes.set_ylabel("top-1 accuracy, %" if {row.metric for row in card.rows} == {"top1"} else "value, %")
    axes.set_title(f"{record['test']['name']}, {record['test']['images']:,} test images")
    axes.grid(alpha=0.3)
    # Below, where the names of encoders, which may be long paths, have room.
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside lower center")
    figure.savefig(file, dpi=150)
    return file
