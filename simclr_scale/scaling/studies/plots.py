"""Pictures of the studies of batch sizes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Told apart also without colours, by their marks (Okabe & Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "os^Dv*P"


def new_figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.4), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure: Any, file: Path) -> None:
    """Whole or not at all."""
    draft = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        figure.savefig(draft, dpi=120, format=file.suffix[1:].lower())
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def batch_axis(axes: Any, batches: Sequence[int], label: str = "optimizer batch (images)") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(batches)), [f"{batch:,}" for batch in sorted(set(batches))])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def draw_rules(rows: Sequence[dict[str, Any]], metric: str, label: str, file: Path) -> None:
    """The metric of each rule over the batch, and the difference, with 95% intervals over seeds."""
    figure, (values, differences) = new_figure(2)
    batches = [row["batch"] for row in rows]
    for number, rule in enumerate(("linear", "sqrt")):
        own = [row for row in rows if rule in row and row[rule][metric]]
        style = {"color": COLORS[number], "marker": MARKS[number]}
        _with_intervals(values, [row["batch"] for row in own], [row[rule][metric] for row in own], rule, style)
        for row in own:
            values.annotate(
                f"{row[rule]['rate']:.3g}",
                (row["batch"], 100 * row[rule][metric]["mean"]),
                xytext=(5, -11 if number == 0 else 6),
                textcoords="offset points",
                fontsize=7,
                color=style["color"],
            )
    both = [row for row in rows if row.get("sqrt_less_linear")]
    style = {"color": "#000000", "marker": "o"}
    _with_intervals(
        differences, [row["batch"] for row in both], [row["sqrt_less_linear"] for row in both], None, style
    )
    differences.axhline(0, color="#777777", linewidth=1)
    same = all(row["negatives"] == row["batch"] for row in rows)
    groups = sorted({row["negatives"] for row in rows})
    title = "negatives: the whole batch" if same else f"negatives: groups of {', '.join(map(str, groups))} images"
    values.set_title(f"{title}; numbers: peak rate", fontsize="small")
    differences.set_title("sqrt less linear, paired by seed", fontsize="small")
    values.set_ylabel(f"{label} (%)")
    differences.set_ylabel("difference (points)")
    if values.get_legend_handles_labels()[0]:
        values.legend(title="rule", fontsize="small")
    for axes in (values, differences):
        batch_axis(axes, batches)
        axes.margins(x=0.12)
    save(figure, file)


def _with_intervals(
    axes: Any, x: Sequence[int], values: Sequence[dict[str, Any]], label: str | None, style: dict[str, str]
) -> None:
    y = [100 * value["mean"] for value in values]
    # Of one seed there is no interval.
    below = [100 * (value["mean"] - (value["low"] if value["low"] is not None else value["mean"])) for value in values]
    above = [100 * ((value["high"] if value["high"] is not None else value["mean"]) - value["mean"]) for value in values]
    axes.errorbar(x, y, yerr=[below, above], capsize=3, label=label, **style)
