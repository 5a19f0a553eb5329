"""What the checks found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console


class Outcome(NamedTuple):
    """Of one check: what was checked, on every rank, whether it holds, and a figure or the reason."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Of all checks on all ranks."""

    ranks: int
    backend: str
    devices: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, backend: str, devices: Sequence[str], by_rank: Sequence[Sequence[Outcome]]) -> "Verdict":
        """A check holds if it does on every rank; else the first rank where it does not gives the reason."""
        outcomes = []
        for same in zip(*by_rank, strict=True):
            failed = [(rank, outcome) for rank, outcome in enumerate(same) if not outcome.passed]
            if failed:
                rank, first = failed[0]
                elsewhere = f", and on {len(failed) - 1} more" if len(failed) > 1 else ""
                outcomes.append(Outcome(first.check, False, f"rank {rank}{elsewhere}: {first.detail}"))
            else:
                outcomes.append(same[0])
        return cls(len(by_rank), backend, tuple(sorted(set(devices))), tuple(outcomes))

    @property
    def failed(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [outcome.check for outcome in self.outcomes if not outcome.passed]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ranks": self.ranks,
            "backend": self.backend,
            "devices": list(self.devices),
            "passed": not self.failed,
            "checks": [outcome._asdict() for outcome in self.outcomes],
        }

    def print_table(self, console: "Console | None" = None) -> None:
        """One line a check."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = console or Console()
        if not console.is_terminal:
            console = Console(width=160)
        table = Table("check", "", "found", box=box.ROUNDED)
        for outcome in self.outcomes:
            style = "green" if outcome.passed else "bold red"
            table.add_row(outcome.check, f"[{style}]{'pass' if outcome.passed else 'FAIL'}[/]", outcome.detail)
        where = f"{self.ranks} ranks, {self.backend}, {', '.join(self.devices)}"
        console.print(where, highlight=False, soft_wrap=True)
        console.print(table)
