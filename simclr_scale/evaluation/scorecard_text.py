"""A scorecard for readers: as tables on the terminal and as Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simclr_scale.evaluation.scorecard import Row, Scorecard

if TYPE_CHECKING:
    from rich.console import Console

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, names of the columns, rows."""

_HEALTH = {"rankme": "RankMe", "alpha_req": "alpha-ReQ", "alignment": "alignment", "uniformity": "uniformity"}


def markdown(card: Scorecard) -> str:
    """The tables of a scorecard, and how its numbers were made."""
    parts = [f"# {_title(card)}"]
    for title, columns, rows in _tables(card):
        lines = [
            f"| {' | '.join(map(_escaped, columns))} |",
            f"|{'---|' * len(columns)}",
            *(f"| {' | '.join(map(_escaped, row))} |" for row in rows),
        ]
        parts += [f"## {title}", "\n".join(lines)]
    parts += [f"- {note}" for note in _notes(card)]
    return "\n\n".join(parts) + "\n"


def print_tables(card: Scorecard, console: "Console | None" = None) -> None:
    """Prints the tables of a scorecard, to standard output unless `console` says otherwise."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    for title, columns, rows in _tables(card):
        table = RichTable(title=title, title_style="bold", box=box.ROUNDED)
        for number, column in enumerate(columns):
            table.add_column(Text(column), overflow="fold", style="cyan" if number == 0 else "")
        for row in rows:
            # The interval below its value, so that several encoders fit side by side.
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))
        console.print(table)
    for note in _notes(card):
        console.print(Text(note, style="dim"))


def _title(card: Scorecard) -> str:
    return f"Scorecard on {card.rows[0].cells[0].record['test']['name']}" if card.rows else "Scorecard"


def _tables(card: Scorecard) -> list[Table]:
    names = [contestant.spec for contestant in card.contestants]
    rows = [[_named(row), *(_value(row, number) for number in range(len(names)))] for row in card.rows]
    tables: list[Table] = [(_title(card), ["evaluation", *names], rows)]
    others = [[_named(row), f"{one.value:.1%}", one.encoder, one.source] for row in card.rows for one in row.published]
    if others:
        tables.append(("Published, by the same protocol", ["evaluation", "value", "encoder", "source"], others))
    if len(names) > 1 and card.rows:
        compared = [
            [_named(row), *(f"{one.difference:+.1%}, p {_p(one.p_value)}" for one in row.comparisons)]
            for row in card.rows
        ]
        tables.append((f"{names[0]} less", ["evaluation", *names[1:]], compared))
    if card.health:
        health = [
            [title, *("none" if (value := report["values"][key]) is None else f"{value:.3f}" for report in card.health)]
            for key, title in _HEALTH.items()
        ]
        tables.append(("Without labels", ["measure", *names], health))
    sizes = [
        [one.spec, f"{one.parameters:,}", f"{one.num_features:,}", f"sha256 {one.fingerprint[:12]}"]
        for one in card.contestants
    ]
    tables.append(("Encoders", ["encoder", "parameters", "features", "weights"], sizes))
    return tables


def _named(row: Row) -> str:
    return row.task.title if row.metric == "top1" else f"{row.task.title} ({row.metric})"


def _value(row: Row, number: int) -> str:
    cell, interval = row.cells[number], row.intervals[number]
    text = f"{cell.mean:.1%}"
    if cell.std is not None:
        text += f" ± {cell.std:.1%}"
    return f"{text} [{interval.low * 100:.1f}, {interval.high * 100:.1f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def _notes(card: Scorecard) -> list[str]:
    notes = []
    if card.rows:
        interval = card.rows[0].intervals[0]
        test = card.rows[0].cells[0].record["test"]
        notes.append(
            f"{test['images']:,} test images ({test['split']}). In brackets the {interval.level:.0%} interval over "
            f"test images, and over draws of the labels where there are several, by {interval.resamples:,} resamples; "
            "± is the standard deviation over draws."
        )
        notes.append("The values are top-1 accuracies where nothing else is said.")
    if any(row.comparisons for row in card.rows):
        tests = sum(len(row.comparisons) for row in card.rows)
        notes.append(
            f"p: the share of {card.settings['permutations']:,} random exchanges of two encoders' answers (of scores, "
            f"2,000) that differ at least as much; {tests} tests, not corrected for their number."
        )
    notes += [f"Left out: {task}: {reason}" for task, reason in card.skipped.items()]
    warnings = {
        f"{contestant.spec}, {row.task}: {warning}"
        for row in card.rows
        for contestant, cell in zip(card.contestants, row.cells, strict=True)
        for warning in cell.record["warnings"]
    }
    return notes + sorted(warnings)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
