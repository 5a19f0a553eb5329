import numpy as np
import pytest
import scipy.stats

from simclr_scale.errors import InputError
from simclr_scale.evaluation import METRICS, bootstrap_interval, permutation_test
from simclr_scale.evaluation.outcome import Outcome


def outcome(accuracy: float, images: int = 257, draws: int = 1, seed: int = 0, classes: int = 5) -> Outcome:
    """Answers that are right with this probability; the targets do not depend on `seed`."""
    targets = np.random.default_rng(99).integers(classes, size=images)
    generator = np.random.default_rng(seed)
    answers = tuple(
        np.where(generator.random(images) < accuracy, targets, (targets + 1) % classes) for _ in range(draws)
    )
    return Outcome(np.arange(images), targets, answers)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_the_interval_of_one_draw_is_that_of_scipy(metric: str) -> None:
    one = outcome(0.7)
    found = bootstrap_interval(one, metric, resamples=4000)

    def value(answers: np.ndarray, targets: np.ndarray) -> float:
        return METRICS[metric](answers, targets)

    expected = scipy.stats.bootstrap(
        (one.answers[0], one.targets),
        value,
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.006)
    assert found.high == pytest.approx(expected.high, abs=0.006)
    assert (found.level, found.resamples) == (0.95, 4000)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth, trials = 0.6, 300
    covered = 0
    for seed in range(trials):
        interval = bootstrap_interval(outcome(truth, images=200, seed=seed), "top1", level=0.9, resamples=300)
        covered += interval.low <= truth <= interval.high
    # The standard deviation of the share is .017.
    assert 0.84 < covered / trials < 0.95


def test_draws_that_differ_widen_the_interval() -> None:
    alike = outcome(0.6, draws=5)
    spread = Outcome(
        alike.indices,
        alike.targets,
        tuple(outcome(accuracy, seed=3).answers[0] for accuracy in (0.3, 0.45, 0.6, 0.75, 0.9)),
    )
    narrow, wide = (bootstrap_interval(one, "top1") for one in (alike, spread))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    # sqrt of the variance of the mean of five draws: their variance is .045, and the bootstrap sees 4/5 of it.
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 0.3 * 0.5**0.5 / 5**0.5, rel=0.25)


def test_a_class_that_a_resample_misses_is_not_left_out_of_the_mean() -> None:
    targets = np.array([0] * 40 + [1])
    one = Outcome(np.arange(41), targets, (np.where(targets == 1, 0, targets),))
    interval = bootstrap_interval(one, "mean_per_class", resamples=200)
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_one_seed_gives_one_interval_and_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one = outcome(0.7, draws=2)
    first = bootstrap_interval(one, "top1", seed=4)
    assert bootstrap_interval(one, "top1", seed=4) == first
    # The values are multiples of 1 / 514, so that few resamples are needed to tell two seeds apart.
    assert len({bootstrap_interval(one, "top1", resamples=50, seed=seed) for seed in range(8)}) > 1
    monkeypatch.setattr("simclr_scale.evaluation.uncertainty._BLOCK", 1)
    other = bootstrap_interval(one, "top1", seed=4)
    assert other.low == pytest.approx(first.low, abs=0.01)


@pytest.mark.parametrize("accuracies", [(0.7, 0.7), (0.72, 0.65), (0.8, 0.6)])
def test_p_of_one_draw_is_that_of_the_sign_test(accuracies: tuple[float, float]) -> None:
    first, second = (outcome(accuracy, images=300, seed=seed) for seed, accuracy in enumerate(accuracies))
    found = permutation_test(first, second, "top1", permutations=50_000)
    better = int(((first.answers[0] == first.targets) & (second.answers[0] != first.targets)).sum())
    worse = int(((first.answers[0] != first.targets) & (second.answers[0] == first.targets)).sum())
    exact = scipy.stats.binomtest(better, better + worse).pvalue
    assert found.difference == pytest.approx((better - worse) / 300, abs=1e-12)
    assert found.p_value == pytest.approx(exact, abs=0.007)
    assert permutation_test(second, first, "top1", permutations=50_000).difference == -found.difference


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
@pytest.mark.parametrize("draws", [1, 3])
def test_p_is_that_of_exchanging_answers_one_by_one(metric: str, draws: int) -> None:
    first, second = (outcome(accuracy, 61, draws, seed) for seed, accuracy in enumerate((0.75, 0.62)))
    found = permutation_test(first, second, metric, permutations=20_000)
    generator, value = np.random.default_rng(7), METRICS[metric]

    def difference(exchange: np.ndarray) -> float:
        total = 0.0
        for a, b in zip(first.answers, second.answers, strict=True):
            total += value(np.where(exchange, b, a), first.targets) - value(np.where(exchange, a, b), first.targets)
        return total / draws

    assert found.difference == pytest.approx(difference(np.zeros(61, dtype=bool)), abs=1e-12)
    trials = [difference(generator.random(61) < 0.5) for _ in range(1500)]
    p = np.mean(np.abs(trials) >= abs(found.difference) - 1e-12)
    assert found.p_value == pytest.approx(p, abs=0.04)


def test_a_metric_of_scores_is_compared_by_exchanging_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "brier", lambda scores, targets: -float(((scores - targets) ** 2).mean()))
    generator = np.random.default_rng(0)
    targets = generator.integers(2, size=(40, 3))
    near, far = (np.clip(targets + generator.normal(0, noise, targets.shape), 0, 1) for noise in (0.2, 0.6))
    first, second = (Outcome(np.arange(40), targets, (scores,)) for scores in (near, far))
    found = permutation_test(first, second, "brier", permutations=400)
    assert found.difference == pytest.approx(METRICS["brier"](near, targets) - METRICS["brier"](far, targets))
    assert found.p_value == pytest.approx(1 / 401)
    assert permutation_test(first, first, "brier", permutations=50).p_value == 1
    interval = bootstrap_interval(first, "brier", resamples=200)
    assert interval.low < METRICS["brier"](near, targets) < interval.high


def test_equal_answers_do_not_differ() -> None:
    assert permutation_test(outcome(0.7), outcome(0.7), "top1").p_value == 1


def test_bad_input() -> None:
    one = outcome(0.7)
    with pytest.raises(InputError, match="metric: 'f1', wanted one of top1"):
        bootstrap_interval(one, "f1")
    with pytest.raises(InputError, match="level: 95, wanted between 0 and 1"):
        bootstrap_interval(one, "top1", level=95)
    with pytest.raises(InputError, match="resamples: 0, wanted at least 1"):
        bootstrap_interval(one, "top1", resamples=0)
    with pytest.raises(InputError, match="permutations: 0, wanted at least 1"):
        permutation_test(one, one, "top1", permutations=0)
    with pytest.raises(InputError, match="other test images"):
        permutation_test(one, outcome(0.7, images=9), "top1")
    with pytest.raises(InputError, match="1 draws of the labels for one encoder, 2 for the other"):
        permutation_test(one, outcome(0.7, draws=2), "top1")
