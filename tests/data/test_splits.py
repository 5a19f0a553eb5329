from itertools import pairwise

import numpy as np
import pytest

from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError


def uneven_labels() -> np.ndarray:
    """Classes of 1, 2, 3, 10, 37 and 500 images, shuffled; numbers with gaps."""
    labels = np.repeat([7, 0, 3, 100, 4, 11], [1, 2, 3, 10, 37, 500])
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.8, 0.99])
def test_sides_are_disjoint_complete_and_sorted(fraction: float) -> None:
    labels = uneven_labels()
    first, second = stratified_split(labels, fraction, seed=3)
    assert sorted([*first, *second]) == list(range(labels.size))
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.8, 0.99])
def test_every_class_is_cut_in_proportion(fraction: float) -> None:
    labels = uneven_labels()
    first, second = stratified_split(labels, fraction, seed=0)
    for label in np.unique(labels):
        total = (labels == label).sum()
        on_first, on_second = (labels[first] == label).sum(), (labels[second] == label).sum()
        assert abs(on_first - fraction * total) < 1
        assert on_first >= 1
        assert on_second >= (1 if total >= 2 else 0)


def test_smaller_fractions_are_nested_in_larger_ones() -> None:
    labels = uneven_labels()
    selections = [set(stratified_split(labels, fraction, seed=5)[0]) for fraction in (0.01, 0.1, 0.3, 0.8)]
    for smaller, larger in pairwise(selections):
        assert smaller < larger


def test_seed_and_class_decide_and_nothing_else() -> None:
    labels = np.repeat([0, 1], 50)
    first, _ = stratified_split(labels, 0.5, seed=1)
    assert np.array_equal(first, stratified_split(labels, 0.5, seed=1)[0])
    assert not np.array_equal(first, stratified_split(labels, 0.5, seed=2)[0])
    # Classes are ordered independently of each other and of which others exist.
    assert not np.array_equal(first[first < 50], first[first >= 50] - 50)
    assert np.array_equal(first[first < 50], stratified_split(labels[:50], 0.5, seed=1)[0])


def test_selection_is_pinned_for_all_machines() -> None:
    """The split of a published result must not move with the platform or the NumPy release."""
    first, _ = stratified_split(np.repeat([0, 1, 2], [5, 6, 7]), 0.4, seed=42)
    assert first.tolist() == [1, 4, 9, 10, 11, 13, 17]


def test_every_image_is_as_likely_as_another() -> None:
    labels = np.zeros(10, dtype=int)
    counts = np.zeros(10)
    for seed in range(2000):
        counts[stratified_split(labels, 0.3, seed)[0]] += 1
    # Binomial(2000, .3): standard deviation 20.5; five of them.
    assert np.abs(counts - 600).max() < 103


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=r"fraction .* between 0 and 1"):
        stratified_split(np.array([0, 0, 1, 1]), fraction, seed=0)


def test_unlabelled_images_and_negative_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 3 images have no label"):
        stratified_split(np.array([0, -1, 0]), 0.5, seed=0)
    with pytest.raises(InputError, match="seed -1"):
        stratified_split(np.array([0, 0]), 0.5, seed=-1)


def test_no_images_give_two_empty_sides() -> None:
    first, second = stratified_split(np.array([], dtype=np.int64), 0.5, seed=0)
    assert first.size == second.size == 0
