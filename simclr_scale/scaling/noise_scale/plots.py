"""The picture of a noise scale along training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simclr_scale.scaling.pictures import save_figure
from simclr_scale.scaling.studies.plots import COLORS, new_figure


def draw_noise_scale(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """B_simple over the steps of training with its 95% interval, and its two parts over theirs."""
    figure, (scale, parts) = new_figure(2)
    known = [row for row in rows if row["noise_scale"] is not None]
    steps = [row["step"] for row in known]
    values = [row["noise_scale"] for row in known]
    errors = [
        [v - row["interval"][0] if row["interval"] else 0.0 for v, row in zip(values, known, strict=True)],
        [row["interval"][1] - v if row["interval"] else 0.0 for v, row in zip(values, known, strict=True)],
    ]
    scale.errorbar(steps, values, yerr=errors, marker="o", capsize=3, color=COLORS[0], label="noise scale")
    scale.axhline(rows[0]["batch"], color="#777777", linestyle="--", label=f"optimizer batch {rows[0]['batch']:,}")
    scale.set_ylabel("noise scale (images)")
    scale.set_title(f"{rows[0]['negatives_per_view']:,} negatives a view", fontsize="small")
    scale.legend(fontsize="small")
    every = [row["step"] for row in rows]
    parts.plot(
        every, [row["noise_of_one_image"] for row in rows], marker="s", color=COLORS[1], label="noise of one image, S"
    )
    parts.plot(every, [row["gradient_squared"] for row in rows], marker="^", color=COLORS[2], label="signal, |G|²")
    parts.legend(fontsize="small")
    for axes in (scale, parts):
        # An estimate without bias can be below 0, where no logarithm is.
        if axes is scale or all(row["gradient_squared"] > 0 for row in rows):
            axes.set_yscale("log")
        axes.set_xlabel("step of training")
        axes.grid(alpha=0.3, which="both")
    save_figure(figure, file)
