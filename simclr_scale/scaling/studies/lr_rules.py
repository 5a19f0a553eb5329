"""Two rules for the learning rate over batch sizes, and which wins where.

Chen et al. 2020, appendix B.1: with the square root of the batch, rates are higher at small batches, and shorter
trainings at small batches end better ("sqrt" .075 sqrt(B) against "linear" .3 B / 256, both 4.8 at 4096).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from simclr_scale.errors import InputError
from simclr_scale.scaling.studies.cells import Cell

RULES = ("linear", "sqrt")
_LEVEL = 0.95


def rate_of(rule: str, batch: int, reference_batch: int, reference_rate: float) -> float:
    """The peak rate by which a rule continues that of a reference batch."""
    share = batch / reference_batch
    return reference_rate * (share if rule == "linear" else math.sqrt(share))


def sweep_cells(
    batches: Sequence[int],
    rules: Sequence[str],
    seeds: Sequence[int],
    reference: tuple[int, float],
    negatives: int | None,
) -> list[Cell]:
    """Seed by seed, so that an unfinished sweep has all of the first seed."""
    return [
        Cell(batch, negatives or batch, rate_of(rule, batch, *reference), seed, rule)
        for seed in seeds
        for batch in batches
        for rule in rules
    ]


@dataclass(frozen=True)
class MeanOfSeeds:
    """Mean over seeds, its standard deviation and its 95% interval by Student's t; without these of one seed."""

    mean: float
    std: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanOfSeeds":
        x = np.asarray(values, float)
        if len(x) < 2:
            return cls(float(x.mean()), None, None, None)
        std = float(x.std(ddof=1))
        half = float(student.ppf((1 + _LEVEL) / 2, len(x) - 1)) * std / math.sqrt(len(x))
        return cls(float(x.mean()), std, float(x.mean()) - half, float(x.mean()) + half)


def compare_rules(results: Sequence[dict[str, Any]], metric: str = "linear_top1") -> list[dict[str, Any]]:
    """For every batch (and number of negatives): each rule's metric over seeds, and sqrt less linear, seed by seed.

    A training that diverged has no value; its seed is left out of the difference.

    Raises:
        InputError: there is nothing to compare.
    """
    rows = []
    for batch, negatives in sorted({(r["batch"], r["negatives"]) for r in results}):
        cells = [r for r in results if (r["batch"], r["negatives"]) == (batch, negatives)]
        row: dict[str, Any] = {"batch": batch, "negatives": negatives, "negatives_per_view": 2 * (negatives - 1)}
        values = {}
        for rule in RULES:
            of_rule = [r for r in cells if r["rule"] == rule]
            if not of_rule:
                continue
            values[rule] = {r["seed"]: r[metric] for r in of_rule if r[metric] is not None}
            row[rule] = {
                "rate": of_rule[0]["rate"],
                "steps": of_rule[0]["steps"],
                "seeds": len(of_rule),
                "diverged": sum(r["diverged"] for r in of_rule),
                metric: vars(MeanOfSeeds.of(list(values[rule].values()))) if values[rule] else None,
            }
        if len(values) == 2:
            both = sorted(values["linear"].keys() & values["sqrt"].keys())
            difference = MeanOfSeeds.of([values["sqrt"][s] - values["linear"][s] for s in both]) if both else None
            row["sqrt_less_linear"] = vars(difference) if difference else None
            row["better"] = _better(difference)
        rows.append(row)
    if not rows:
        raise InputError("no training of this study is done")
    return rows


def _better(difference: MeanOfSeeds | None) -> str | None:
    """The rule that the interval of the difference speaks for; None where it holds 0, or there is none."""
    if difference is None or difference.low is None or difference.high is None:
        return None
    return "sqrt" if difference.low > 0 else "linear" if difference.high < 0 else None
