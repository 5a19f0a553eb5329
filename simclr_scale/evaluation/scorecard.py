"""The scorecard: all evaluations of one or several encoders on one data set, in one table and one JSON.

Nothing here computes a feature: it is given the records of evaluations and their answers, and says how sure each value
is and whether two encoders differ.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simclr_scale.errors import InputError
from simclr_scale.evaluation.few_labels import LabelBudget
from simclr_scale.evaluation.manifest import library_versions, now, require_new_file, write_json
from simclr_scale.evaluation.metrics import OF_SCORES
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.published import Published, known_dataset, published
from simclr_scale.evaluation.uncertainty import Comparison, Interval, bootstrap_interval, permutation_test

KINDS = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuned"}
TRANSFER = "transfer"
DEFAULT_TASKS = ("knn", "linear", "linear@0.1", "linear@0.01", "linear@5-shot")
_SCORE_PERMUTATIONS = 2000


@dataclass(frozen=True)
class Task:
    """An evaluation with so many labels: "knn", "linear@0.1", "finetune@0.01"; or transfer to a set of a suite."""

    kind: str
    labels: str = "1"
    transfer_set: str = ""
    """The name of the set in its suite, where the kind is "transfer"."""

    @classmethod
    def parse(cls, text: str) -> "Task":
        """Raises InputError for an evaluation or a number of labels that there is not."""
        kind, _, labels = text.strip().partition("@")
        if kind not in KINDS:
            raise InputError(
                f"tasks: {text.strip()!r}, wanted {', '.join(KINDS)}, or one of them with fewer labels, such as "
                "linear@0.1 or knn@5-shot"
            )
        LabelBudget.parse(labels or "1")
        return cls(kind, labels or "1")

    @property
    def budget(self) -> LabelBudget:
        return LabelBudget.parse(self.labels)

    def __str__(self) -> str:
        name = f"{self.kind}:{self.transfer_set}" if self.transfer_set else self.kind
        return name if self.budget.is_all else f"{name}@{self.labels}"

    @property
    def title(self) -> str:
        """In words, for tables."""
        budget, name = self.budget, f"{self.transfer_set}: linear" if self.transfer_set else KINDS[self.kind]
        if budget.is_all:
            return f"{name}, all labels"
        if budget.shots is not None:
            return f"{name}, {budget.shots} a class"
        return f"{name}, " + (
            f"{budget.fraction * 100:g}% of the labels" if budget.file is None else f"labels of {budget}"
        )


@dataclass(frozen=True)
class Contestant:
    """An encoder on the scorecard."""

    spec: str
    """As the user named it."""
    fingerprint: str
    parameters: int
    """Numbers that training could change."""
    num_features: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one encoder."""

    record: Mapping[str, Any]
    """`Manifest.as_dict`."""
    outcome: Outcome

    @property
    def mean(self) -> float:
        return self.record["value"]["mean"]

    @property
    def std(self) -> float | None:
        return self.record["value"]["std"]

    @property
    def training_images(self) -> int:
        """Labelled images that the evaluation has used in one draw."""
        return self.record["train"]["images"]


@dataclass(frozen=True)
class Row:
    """One task: what each encoder came to, how sure that is, and how the first differs from the others."""

    task: Task
    metric: str
    cells: tuple[Evaluated, ...]
    intervals: tuple[Interval, ...]
    comparisons: tuple[Comparison, ...]
    """Of the first encoder with each of the others."""
    published: tuple[Published, ...]


@dataclass(frozen=True)
class Scorecard:
    """All evaluations of one or several encoders on one data set."""

    contestants: tuple[Contestant, ...]
    rows: tuple[Row, ...]
    health: tuple[Mapping[str, Any], ...] = ()
    """`HealthReport.as_dict` of each encoder; empty where health was not asked for."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Tasks left out, each with the reason."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=library_versions)
    created: str = field(default_factory=now)
    """UTC, ISO 8601."""

    @classmethod
    def of(
        cls,
        contestants: Sequence[Contestant],
        results: Mapping[Task, Sequence[Evaluated]],
        *,
        health: Sequence[Mapping[str, Any]] = (),
        skipped: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        published_transfer: Mapping[Task, Published] = MappingProxyType({}),
        resamples: int = 2000,
        permutations: int = 100_000,
        seed: int = 0,
    ) -> "Scorecard":
        """Puts results together, with their intervals and comparisons.

        Args:
            contestants: the encoders; the others are compared with the first.
            results: of each task, in the order of `contestants`.
            health: of each encoder, in that order.
            skipped: tasks left out, and why.
            settings: what the results depend on.
            published_transfer: what a suite says of its sets.
            resamples: see `bootstrap_interval`.
            permutations: see `permutation_test`; of a metric of scores, each of which takes long, 2,000 at most.
            seed: of both.

        Raises:
            InputError: two encoders were judged by different images.
        """
        rows = []
        for task, cells in results.items():
            if len(cells) != len(contestants):
                raise InputError(f"{task}: {len(cells)} results for {len(contestants)} encoders")
            first, *others = cells
            metric = first.record["metric"]
            test = first.record["test"]
            try:
                number = min(permutations, _SCORE_PERMUTATIONS) if metric in OF_SCORES else permutations
                comparisons = tuple(
                    permutation_test(first.outcome, other.outcome, metric, permutations=number, seed=seed)
                    for other in others
                )
            except InputError as error:
                raise InputError(f"{task}: {error}") from error
            rows.append(
                Row(
                    task=task,
                    metric=metric,
                    cells=tuple(cells),
                    intervals=tuple(
                        bootstrap_interval(cell.outcome, metric, resamples=resamples, seed=seed) for cell in cells
                    ),
                    comparisons=comparisons,
                    published=(published_transfer[task],)
                    if task in published_transfer
                    else published(known_dataset(tuple(test["classes"]), test["images"]), task.kind, str(task.budget)),
                )
            )
        chance = {"resamples": resamples, "permutations": permutations, "statistics_seed": seed}
        return cls(
            contestants=tuple(contestants),
            rows=tuple(rows),
            health=tuple(health),
            skipped=dict(skipped or {}),
            settings={**(settings or {}), **chance},
        )

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "encoders": [vars(contestant) for contestant in self.contestants],
            "rows": [
                {
                    "task": str(row.task),
                    "title": row.task.title,
                    "metric": row.metric,
                    "cells": [
                        {
                            "encoder": contestant.spec,
                            "mean": cell.mean,
                            "std": cell.std,
                            "interval": asdict(interval),
                            "manifest": dict(cell.record),
                        }
                        for contestant, cell, interval in zip(self.contestants, row.cells, row.intervals, strict=True)
                    ],
                    "comparisons": [
                        {"first": self.contestants[0].spec, "second": contestant.spec, **asdict(comparison)}
                        for contestant, comparison in zip(self.contestants[1:], row.comparisons, strict=True)
                    ],
                    "published": [asdict(one) for one in row.published],
                }
                for row in self.rows
            ],
            "health": [dict(report) for report in self.health],
            "skipped": dict(self.skipped),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "created": self.created,
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON to `path`, whole or not at all. Raises InputError as `require_new_file` does."""
        return write_json(self.as_dict(), require_new_file(path))
