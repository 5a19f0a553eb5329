"""How sure a value is: intervals by bootstrap, and the permutation test between two encoders.

M test images, S values of a manifest (one for each draw of the labels).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simclr_scale.errors import InputError
from simclr_scale.evaluation.metrics import METRICS
from simclr_scale.evaluation.outcome import Outcome

# Numbers that are held at a time.
_BLOCK = 2**22
# Differences that are equal in exact arithmetic must count as such.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a metric, by the percentiles of the bootstrap."""

    low: float
    high: float
    level: float
    resamples: int


def bootstrap_interval(
    outcome: Outcome, metric: str, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The interval of the mean value over other test images and, of several draws of the labels, other draws.

    A resample takes M of the M test images with replacement and S of the S draws, and the metric is that of all chosen
    draws on all chosen images. Of a single draw the interval says nothing of how the value depends on the draw; of
    five it does so roughly. (Efron 1979; percentile method.)

    Args:
        outcome: the answers behind the value.
        metric: its name in `METRICS`.
        level: of confidence.
        resamples: how many.
        seed: of their choice.

    Raises:
        InputError: a level or a number out of range, or an unknown metric.
    """
    _check(metric, "resamples", resamples)
    if not 0 < level < 1:
        raise InputError(f"level: {level}, wanted between 0 and 1, such as 0.95")
    images, draws = len(outcome.targets), len(outcome.answers)
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    if metric == "top1":
        hits = _hits(outcome)
        for part in _parts(resamples, images):
            # How often each image is chosen says as much as which were, and a product does the rest.
            chosen = generator.multinomial(images, np.full(images, 1 / images), size=len(part))
            each = chosen @ hits.T / images
            drawn = generator.integers(draws, size=(len(part), draws))
            values[part] = np.take_along_axis(each, drawn, axis=1).mean(axis=1)
    else:
        value_of = METRICS[metric]
        for number in range(resamples):
            rows = _with_every_class(outcome, generator.integers(images, size=images), metric)
            drawn = generator.integers(draws, size=draws)
            values[number] = np.mean([value_of(outcome.answers[draw][rows], outcome.targets[rows]) for draw in drawn])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, resamples)


@dataclass(frozen=True)
class Comparison:
    """Two encoders on the same test images."""

    difference: float
    """Mean value of the first less that of the second."""
    p_value: float
    """How often chance alone gives a difference at least as large, in either direction."""
    permutations: int


def permutation_test(
    first: Outcome, second: Outcome, metric: str, *, permutations: int = 100_000, seed: int = 0
) -> Comparison:
    """Tests that two encoders do equally well, by exchanging their answers for images at random.

    The test of Chen et al. 2020, appendix B.8 (100,000 permutations; after Kornblith et al. 2019): if both are equally
    good, then on each image their answers could as well be exchanged, those for all draws of the labels together.
    p = (1 + permutations that differ at least as much) / (1 + permutations), which is never 0.

    Args:
        first: answers of one encoder.
        second: answers of the other, to the same images and for as many draws.
        metric: their name in `METRICS`.
        permutations: how many.
        seed: of the exchanges.

    Raises:
        InputError: the images or the number of draws differ, or the metric is unknown.
    """
    _check(metric, "permutations", permutations)
    if not np.array_equal(first.indices, second.indices) or not np.array_equal(first.targets, second.targets):
        raise InputError("the two encoders were judged by other test images: there is nothing to exchange")
    if len(first.answers) != len(second.answers):
        raise InputError(
            f"{len(first.answers)} draws of the labels for one encoder, {len(second.answers)} for the other"
        )
    generator = np.random.default_rng(seed)
    if metric in _MEANS:
        found, differences = _exchanged_means(first, second, metric, permutations, generator)
    else:
        found, differences = _exchanged(first, second, metric, permutations, generator)
    extreme = int((np.abs(differences) >= abs(found) - _ROUNDING).sum())
    return Comparison(found, (1 + extreme) / (1 + permutations), permutations)


# Metrics that are a weighted mean over images of "is the answer right".
_MEANS = ("top1", "mean_per_class")


def _exchanged_means(
    first: Outcome, second: Outcome, metric: str, permutations: int, generator: np.random.Generator
) -> tuple[float, np.ndarray]:
    """The difference, and those after exchanges, (permutations,).

    An exchange turns the sign of an image's part of the difference. Images whose parts are equal in size need not be
    told apart: the sum of so many random signs is a binomial draw.
    """
    part = (_hits(first) - _hits(second)).mean(axis=0) * _weights(first, metric)
    sizes, counts = np.unique(np.round(np.abs(part[part != 0]), 15), return_counts=True)
    differences = np.zeros(permutations)
    for size, count in zip(sizes, counts, strict=True):
        differences += size * (2.0 * generator.binomial(count, 0.5, size=permutations) - count)
    return float(part.sum()), differences


def _exchanged(
    first: Outcome, second: Outcome, metric: str, permutations: int, generator: np.random.Generator
) -> tuple[float, np.ndarray]:
    value_of = METRICS[metric]
    pairs = [np.stack(both) for both in zip(first.answers, second.answers, strict=True)]

    def difference(exchange: np.ndarray) -> float:
        rows = np.arange(len(exchange))
        return float(
            np.mean(
                [
                    value_of(pair[exchange, rows], first.targets) - value_of(pair[1 - exchange, rows], first.targets)
                    for pair in pairs
                ]
            )
        )

    images = len(first.targets)
    found = difference(np.zeros(images, dtype=np.int64))
    return found, np.array([difference(generator.integers(2, size=images)) for _ in range(permutations)])


def _hits(outcome: Outcome) -> np.ndarray:
    """(S, M), 1 where the answer is right."""
    return np.stack([answers == outcome.targets for answers in outcome.answers]).astype(np.float64)


def _weights(outcome: Outcome, metric: str) -> np.ndarray:
    """(M,), what a right answer adds to the metric."""
    if metric == "top1":
        return np.full(len(outcome.targets), 1 / len(outcome.targets))
    _, position, counts = np.unique(outcome.targets, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[position])


def _with_every_class(outcome: Outcome, rows: np.ndarray, metric: str) -> np.ndarray:
    """`rows`, or where a class of the test images has none among them, some of its own images beside them.

    Without them the metric of a resample would be of fewer classes.
    """
    if metric != "mean_per_class":
        return rows
    missing = np.setdiff1d(outcome.targets, outcome.targets[rows])
    return np.concatenate([rows, np.flatnonzero(np.isin(outcome.targets, missing))]) if missing.size else rows


def _parts(count: int, width: int) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK // width)
    for start in range(0, count, step):
        yield np.arange(start, min(start + step, count))


def _check(metric: str, name: str, count: int) -> None:
    if metric not in METRICS:
        raise InputError(f"metric: {metric!r}, wanted one of {', '.join(METRICS)}")
    if count < 1:
        raise InputError(f"{name}: {count}, wanted at least 1")
