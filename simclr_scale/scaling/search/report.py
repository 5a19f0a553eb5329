"""A search in a table: scores of all candidates, and how far they agree with a linear classifier."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import spearmanr

from simclr_scale import __version__
from simclr_scale.scaling.pictures import save_figure
from simclr_scale.scaling.search.study import SearchStudy

if TYPE_CHECKING:
    from rich.console import Console

_ENOUGH = 8
_OUTCOMES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_SCORES = ("knn", "rankme")


@dataclass(frozen=True)
class Row:
    """What came of one candidate.

    Attributes:
        label: of the candidate.
        outcome: complete, pruned, failed or running.
        score: at the end, or the last one of a pruned trial.
        epoch: of that score.
        attempts: how often it was begun.
        facts: params, knn and rankme of a complete trial, and the reason of a failed one.
        linear: accuracy of the linear classifier.
    """

    label: str
    outcome: str
    score: float | None
    epoch: int | None
    attempts: int
    facts: dict[str, Any]
    linear: float | None


@dataclass(frozen=True)
class SearchReport:
    """All of a search, the best first."""

    score: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, study: SearchStudy, score: str) -> "SearchReport":
        rows = []
        for label, trial in study.latest().items():
            outcome = _OUTCOMES.get(trial.state.name, trial.state.name.lower())
            steps = trial.intermediate_values
            value = trial.value if outcome == "complete" else steps[max(steps)] if steps else None
            epoch = None if outcome == "complete" or not steps else max(steps)
            facts = {key: value for key, value in trial.user_attrs.items() if key != "label"}
            linear = linear_of(study.folder, label)
            rows.append(Row(label, outcome, value, epoch, study.attempts(label), facts, linear))
        rows.sort(key=lambda row: (row.outcome != "complete", -(row.score if row.score is not None else -1)))
        notes = []
        if score == "rankme" and len({row.facts.get("features") for row in rows if row.outcome == "complete"}) > 1:
            notes.append("RankMe is at most the number of features, so it favours encoders that have more of them")
        return cls(score, tuple(rows), tuple(notes))

    @property
    def best(self) -> Row | None:
        return self.rows[0] if self.rows and self.rows[0].outcome == "complete" else None

    def correlations(self) -> dict[str, dict[str, float]]:
        """Spearman's correlation with linear accuracy, of each score that trials have, and its p-value."""
        found = {}
        for name in ("params", *_SCORES):
            pairs = [(row.facts[name], row.linear) for row in self.rows if row.linear is not None and name in row.facts]
            if len({x for x, _ in pairs}) > 2 and len({y for _, y in pairs}) > 2:
                result = spearmanr(*zip(*pairs, strict=True))
                found[name] = {
                    "spearman": float(result.statistic),
                    "p_value": float(result.pvalue),
                    "encoders": len(pairs),
                }
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "score": self.score,
            "best": self.best.label if self.best else None,
            "trials": [vars(row) for row in self.rows],
            "correlation_with_linear": self.correlations(),
            "notes": list(self.notes),
            "version": __version__,
        }

    def print_table(self, console: "Console | None" = None) -> None:
        """One line a candidate; the best, and the correlations, below."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        if not console.is_terminal:
            console = Console(width=120)
        table = Table(box=box.ROUNDED)
        table.add_column("", justify="right")  # the number of its point in the plot
        for title in ("encoder, width, head", "outcome"):
            table.add_column(title, overflow="fold")
        for title in ("parameters", "kNN", "RankMe", "linear"):
            table.add_column(title, justify="right")
        for number, row in enumerate(self.rows, start=1):
            known = {self.score: row.score} if row.score is not None else {}
            known |= {name: row.facts[name] for name in _SCORES if name in row.facts}
            outcome = row.outcome + (f" at epoch {row.epoch}" if row.epoch is not None else "")
            if row.attempts > 1:
                outcome += f", {row.attempts} attempts"
            table.add_row(
                str(number),
                row.label,
                outcome if "reason" not in row.facts else f"{outcome}: {row.facts['reason']}",
                f"{row.facts['params']:,}" if "params" in row.facts else "",
                f"{known['knn']:.1%}" if "knn" in known else "",
                f"{known['rankme']:.1f}" if "rankme" in known else "",
                f"{row.linear:.1%}" if row.linear is not None else "",
            )
        console.print(table)
        lines = [f"best by {self.score}: {self.best.label}"] if self.best else ["no trial is complete"]
        for name, found in self.correlations().items():
            what = {"knn": "kNN", "rankme": "RankMe", "params": "the number of parameters"}[name]
            count = found["encoders"]
            few = f"; of fewer than {_ENOUGH} that says little" if count < _ENOUGH else ""
            lines.append(
                f"Spearman correlation of {what} with linear accuracy {found['spearman']:.2f} "
                f"(p {found['p_value']:.2g}, {count:.0f} encoders{few})"
            )
        for line in (*lines, *(f"note: {note}" for note in self.notes)):
            console.print(line, highlight=False, soft_wrap=True)


def linear_manifest(folder: Path, label: str) -> Path:
    """Where the linear evaluation of a candidate is kept."""
    return folder / "linear" / f"{label}.json"


def linear_of(folder: Path, label: str) -> float | None:
    """Its accuracy; None where there is none yet."""
    file = linear_manifest(folder, label)
    return json.loads(file.read_text(encoding="utf-8"))["value"]["mean"] if file.is_file() else None


def draw(report: SearchReport, file: Path) -> None:
    """Writes linear accuracy over each score, with its rank correlation; the points have the numbers of the table."""
    from matplotlib.figure import Figure

    rows = [(number, row) for number, row in enumerate(report.rows, start=1) if row.linear is not None]
    found = report.correlations()
    names = [name for name in _SCORES if name in found]
    figure = Figure(figsize=(4.6 * max(1, len(names)), 4.2), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, max(1, len(names)), squeeze=False)[0], strict=False):
        for number, row in rows:
            if name in row.facts:
                axes.plot(row.facts[name], row.linear, "o", color="#0072B2")
                place = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(str(number), (row.facts[name], row.linear), **place)
        axes.set_xlabel({"knn": "kNN top-1", "rankme": "RankMe"}[name])
        axes.set_ylabel("linear top-1")
        axes.set_title(f"Spearman {found[name]['spearman']:.2f}", fontsize=9)
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    save_figure(figure, file)
