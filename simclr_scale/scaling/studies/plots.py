"""Pictures of the studies of batch sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simclr_scale.scaling.pictures import save_figure

# Told apart also without colours, by their marks (Okabe & Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKS = "os^Dv*P"


def new_figure(columns: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


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
    _with_intervals(differences, [row["batch"] for row in both], [row["sqrt_less_linear"] for row in both], None, style)
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
    save_figure(figure, file)


def draw_branches(tasks: Sequence[dict[str, Any]], file: Path) -> None:
    """Steps and images to the target, the loss after all images and linear accuracy, over the optimizer's batch.

    A colour and mark for each number of negatives, so that the two are never one axis.
    """
    figure, (steps, trade, loss, linear) = new_figure(2, 2)
    batches = sorted({row["batch"] for task in tasks for row in task["rows"]})
    for number, task in enumerate(tasks):
        rows = task["rows"]
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKS[number % len(MARKS)]}
        label = f"{rows[0]['negatives_per_view']:,} negatives a view"
        # At a target that is met before the first step there is nothing to show by powers.
        own = [row for row in rows if row["steps_to_target"] and row["steps_to_target"]["mean"] > 0]
        if own:
            _draw_hyperbola(steps, trade, task, own, style, label)
        for axes, key, factor in ((loss, "final_loss", 1.0), (linear, "linear_top1", 100.0)):
            there = [row for row in rows if row[key]]
            _with_intervals(axes, [row["batch"] for row in there], [row[key] for row in there], label, style, factor)
    steps.set_ylabel("steps to the target loss")
    trade.set_xlabel("steps to the target loss")
    trade.set_ylabel("images to the target loss")
    loss.set_ylabel("loss at fixed negatives, after all images")
    linear.set_ylabel("linear top-1 (%), after all images")
    for axes in (steps, loss, linear):
        batch_axis(axes, batches)
    for axes in (steps, trade):
        axes.grid(alpha=0.3, which="both")
        if axes.has_data():
            axes.set_yscale("log")
    if trade.has_data():
        trade.set_xscale("log")
    for axes in (steps, trade, loss, linear):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    save_figure(figure, file)


def _draw_hyperbola(
    steps: Any, trade: Any, task: dict[str, Any], rows: Sequence[dict[str, Any]], style: dict[str, str], label: str
) -> None:
    x = [row["batch"] for row in rows]
    means = [row["steps_to_target"]["mean"] for row in rows]
    fit = task["hyperbola"]
    with_fit = f"{label}, target {task['target']:.3f}"
    if fit:
        with_fit += f", critical batch {fit['critical_batch']:,.0f}"
        low, high = min(x), max(x)
        # Powers of a common ratio: straight lines of the logarithm would hide the bend.
        over = [low * (high / low) ** (place / 100) for place in range(101)]
        curve = [fit["least_steps"] + fit["least_images"] / batch for batch in over]
        steps.plot(over, curve, linewidth=1, color=style["color"])
        trade.plot(curve, [b * s for b, s in zip(over, curve, strict=True)], linewidth=1, color=style["color"])
    steps.plot(x, means, linestyle="", label=with_fit, **style)
    trade.plot(means, [row["images_to_target"] for row in rows], linestyle="", label=label, **style)


def _with_intervals(
    axes: Any,
    x: Sequence[int],
    values: Sequence[dict[str, Any]],
    label: str | None,
    style: dict[str, str],
    factor: float = 100.0,
) -> None:
    y = [factor * value["mean"] for value in values]
    # Of one seed there is no interval.
    ends = [(v["mean"], v["mean"]) if v["low"] is None else (v["low"], v["high"]) for v in values]
    below = [factor * (v["mean"] - low) for v, (low, _) in zip(values, ends, strict=True)]
    above = [factor * (high - v["mean"]) for v, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], capsize=3, label=label, **style)
