"""The data sets of a suite as rows of a scorecard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from simclr_scale.evaluation.few_labels import LabelBudget
from simclr_scale.evaluation.published import Published
from simclr_scale.evaluation.scorecard import TRANSFER, Evaluated, Task
from simclr_scale.evaluation.scorecard_run import Entrant, Protocol, Work
from simclr_scale.evaluation.suites import Suite, load_suite
from simclr_scale.evaluation.transfer import Transfer, TransferResult, plan_transfer


@dataclass(frozen=True)
class Transfers:
    """A suite, opened and checked for every encoder."""

    suite: Suite
    plans: tuple[Transfer, ...]

    @classmethod
    def plan(
        cls, entrants: Sequence[Entrant], suite: str, root: str | None, labels: Sequence[str], protocol: Protocol
    ) -> "Transfers":
        """Raises InputError as `plan_transfer` does."""
        opened = load_suite(suite)
        return cls(
            opened,
            tuple(
                plan_transfer(
                    entrant.transform,
                    opened,
                    root=root,
                    labels=labels,
                    seeds=protocol.seeds,
                    seed=protocol.seed,
                    allow_missing_classes=protocol.allow_missing_classes,
                )
                for entrant in entrants
            ),
        )

    def run(self, entrants: Sequence[Entrant], work: Work) -> tuple[dict[Task, tuple[Evaluated, ...]], dict[str, str]]:
        """What every encoder came to on every set, and the sets left out, each with the reason."""
        columns = [
            plan.run(
                entrant.encoder,
                batch_size=work.batch_size,
                num_workers=work.num_workers,
                device=work.device,
                spec=entrant.spec,
                cache=work.cache,
            )
            for entrant, plan in zip(entrants, self.plans, strict=True)
        ]
        found: dict[Task, tuple[Evaluated, ...]] = {}
        skipped: dict[str, str] = {}
        for row in zip(*columns, strict=True):
            task = _task(row[0])
            reasons = [result.skipped for result in row if result.manifest is None]
            if reasons:
                skipped[str(task)] = reasons[0]
            else:
                found[task] = tuple(map(_evaluated, row))
        return found, skipped

    def published(self) -> dict[Task, Published]:
        """What the suite says of its sets, with all labels."""
        return {
            Task(TRANSFER, "1", entry.name): Published(
                entry.name, TRANSFER, "1", self.suite.published, entry.published / 100, f"suite {self.suite.name}"
            )
            for entry in self.suite.entries
            if entry.published is not None
        }


def _task(result: TransferResult) -> Task:
    return Task(TRANSFER, str(LabelBudget.parse(result.labels)), result.entry.name)


def _evaluated(result: TransferResult) -> Evaluated:
    assert result.manifest is not None  # checked by the caller
    assert result.manifest.outcome is not None  # which transfer always hands out
    return Evaluated(json.loads(json.dumps(result.manifest.as_dict())), result.manifest.outcome)
