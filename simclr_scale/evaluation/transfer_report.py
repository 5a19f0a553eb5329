"""The results of a suite for readers: a table, and a JSON file that holds every manifest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr_scale.evaluation.manifest import library_versions, now, require_new_file, write_json
from simclr_scale.evaluation.suites import Suite
from simclr_scale.evaluation.transfer import TransferResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TransferReport:
    """The results of one or several encoders, those of an encoder together."""

    suite: Suite
    results: Sequence[TransferResult]
    created: str = field(default_factory=now)

    def as_dict(self) -> dict[str, Any]:
        """The content of the file: every result with its manifest, or the reason why there is none."""
        return {
            "task": "transfer",
            "suite": self.suite.name,
            "published": self.suite.published or None,
            "results": [
                {
                    "set": result.entry.name,
                    "source": result.entry.source,
                    "metric": result.entry.metric,
                    "labels": result.labels,
                    "encoder": result.encoder,
                    "published_percent": result.entry.published,
                    "skipped": result.skipped or None,
                    "manifest": None if result.manifest is None else result.manifest.as_dict(),
                }
                for result in self.results
            ],
            "versions": library_versions(),
            "created": self.created,
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON to `path`, whole or not at all. Raises InputError as `require_new_file` does."""
        return write_json(self.as_dict(), require_new_file(path))

    def print_table(self, console: "Console | None" = None) -> None:
        """Prints a row for every set and budget of labels, a column for every encoder, and what was skipped and why."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        encoders = list(dict.fromkeys(result.encoder for result in self.results))
        table = Table(title=f"transfer, suite {self.suite.name}", title_style="bold", box=box.ROUNDED)
        for heading in ("set", "labels", "metric"):
            table.add_column(heading, style="cyan")
        for encoder in encoders:
            table.add_column(Text(encoder or "a module"), justify="right", overflow="fold")
        if self.suite.published:
            table.add_column(Text(self.suite.published), justify="right")
        cells = {(r.entry.name, r.labels, r.encoder): _cell(r) for r in self.results}
        for result in self.results:
            if result.encoder != encoders[0]:
                continue
            entry = result.entry
            row = [cells[entry.name, result.labels, encoder] for encoder in encoders]
            if self.suite.published:
                # Published values are of all labels.
                row.append("" if entry.published is None or result.labels != "1" else f"{entry.published:.1f}")
            table.add_row(Text(entry.name), result.labels, entry.metric, *row)
        console = console or Console()
        console.print(table)
        for result in self.results:
            where = f"{result.entry.name}, labels {result.labels}, {result.encoder or 'a module'}: "
            if result.skipped and result.encoder == encoders[0]:
                console.print(f"skipped {result.entry.name}, labels {result.labels}: {result.skipped}", style="yellow")
            for warning in () if result.manifest is None else result.manifest.warnings:
                console.print(Text(where + warning, style="yellow"))


def _cell(result: TransferResult) -> str:
    """In percent, as published values are."""
    if result.manifest is None:
        return "skipped"
    spread = "" if result.manifest.std is None else f" ± {100 * result.manifest.std:.1f}"
    return f"{100 * result.manifest.mean:.1f}{spread}"
