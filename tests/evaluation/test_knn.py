from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation import knn, knn_classify, knn_classify_each, knn_neighbors, unit_rows


def by_brute_force(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, and votes (M, C), in float64 by the plainest loop."""
    train = train.astype(np.float64) / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
    test = test.astype(np.float64) / np.linalg.norm(test.astype(np.float64), axis=1, keepdims=True)
    classes = sorted(set(labels.tolist()))
    votes = np.zeros((len(test), len(classes)))
    for row, query in enumerate(test):
        similarities = [float(query @ image) for image in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarities[i])[:k]
        for i in nearest:
            votes[row, classes.index(labels[i])] += np.exp(similarities[i] / temperature)
    return np.array(classes)[votes.argmax(axis=1)], votes


@pytest.mark.parametrize(
    ("n", "m", "features", "classes", "k", "temperature"),
    [
        (301, 67, 17, 7, 200, 0.07),
        (301, 67, 17, 7, 1, 0.07),
        (53, 19, 5, 3, 200, 0.07),  # k beyond n
        (53, 23, 1, 2, 5, 0.5),
        (257, 1, 33, 11, 10, 1.0),
        (2, 3, 4, 2, 2, 0.07),
    ],
)
def test_equals_brute_force_in_float64(n: int, m: int, features: int, classes: int, k: int, temperature: float) -> None:
    rng = np.random.default_rng([n, k])
    names = rng.choice(10_000, size=classes, replace=False)  # class ids are any integers
    labels = names[np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])]
    train = rng.normal(size=(n, features)) * rng.uniform(0.1, 50, size=(n, 1))
    test = rng.normal(size=(m, features)) * rng.uniform(0.1, 50, size=(m, 1))
    if features == 1:  # similarities are all 1 or -1: keep the k-th place free of ties
        train = np.concatenate([np.full((k, 1), 2.0), np.full((n - k, 1), -3.0)])
        test = np.abs(test)
    wanted, votes = by_brute_force(train, labels, test, k, temperature)
    top, second = np.sort(votes, axis=1)[:, :-3:-1].T
    assert (top - second > 1e-4 * top).all(), "the oracle's winners must be clear of float32 rounding"
    predictions = knn_classify(train, labels, test, k=k, temperature=temperature)
    assert predictions.dtype == torch.int64
    np.testing.assert_array_equal(predictions.numpy(), wanted)


def test_default_k_and_temperature_are_those_of_the_field() -> None:
    rng = np.random.default_rng(3)
    train, test, labels = rng.normal(size=(400, 9)), rng.normal(size=(50, 9)), rng.integers(5, size=400)
    assert torch.equal(knn_classify(train, labels, test), knn_classify(train, labels, test, k=200, temperature=0.07))
    other = knn_classify(train, labels, test, k=20, temperature=0.07)
    assert not torch.equal(knn_classify(train, labels, test), other)


def test_numpy_and_torch_of_any_precision_agree_and_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(90, 6, generator=generator), torch.randn(31, 6, generator=generator).requires_grad_()
    labels = torch.arange(90) % 4
    copy = train.clone()
    wanted = knn_classify(train, labels, test, k=7)
    assert torch.equal(wanted, knn_classify(train.double().numpy(), labels.int().numpy(), test.detach().numpy(), k=7))
    assert torch.equal(wanted, knn_classify(train.double(), labels, test.double(), k=7))
    assert torch.equal(train, copy)


def test_equal_votes_go_to_the_smallest_class() -> None:
    # The same four directions in both classes, so that every query sees equal similarities in each.
    directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.float32)
    test = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    for classes in ((9, 4), (4, 9)):
        labels = np.repeat(classes, 4)
        assert set(knn_classify(np.tile(directions, (2, 1)), labels, test, k=8).tolist()) == {4}


def test_a_near_neighbour_outweighs_two_far_ones_at_low_temperature_only() -> None:
    train = np.array([[1, 0.05], [1, 1], [1, 1.01]])
    labels = np.array([0, 1, 1])
    query = np.array([[1.0, 0.0]])
    assert knn_classify(train, labels, query, k=3, temperature=0.07).tolist() == [0]
    assert knn_classify(train, labels, query, k=3, temperature=10.0).tolist() == [1]
    assert knn_classify(train, labels, query, k=3, temperature=1e-6).tolist() == [0]  # exp(1e6) would overflow


def test_a_class_that_only_the_test_images_have_is_never_predicted() -> None:
    # Wrong where the number of classes is taken from the test labels.
    rng = np.random.default_rng(1)
    predictions = knn_classify(rng.normal(size=(30, 4)), np.array([7, 2, 5] * 10), rng.normal(size=(20, 4)), k=5)
    assert set(predictions.tolist()) <= {2, 5, 7}


def test_many_queries_are_cut_in_chunks_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    train, labels, test = rng.normal(size=(80, 6)), rng.integers(4, size=80), rng.normal(size=(101, 6))
    whole = knn_classify(train, labels, test, k=9)
    monkeypatch.setattr(knn, "_CHUNK", 25)
    told: list[int] = []
    assert torch.equal(knn_classify(train, labels, test, k=9, progress=told.append), whole)
    assert told == [25, 50, 75, 100, 101]


def test_neighbors_are_the_most_similar_in_order() -> None:
    rng = np.random.default_rng(4)
    train, test = rng.normal(size=(70, 12)), rng.normal(size=(9, 12))
    similarities, neighbours = knn_neighbors(train, test, k=6)
    cosine = (test / np.linalg.norm(test, axis=1)[:, None]) @ (train / np.linalg.norm(train, axis=1)[:, None]).T
    order = np.argsort(-cosine, axis=1)[:, :6]
    np.testing.assert_array_equal(neighbours.numpy(), order)
    np.testing.assert_allclose(similarities.numpy(), np.take_along_axis(cosine, order, axis=1), atol=1e-6)
    assert knn_neighbors(train, test, k=500)[0].shape == (9, 70)


@pytest.mark.parametrize("rows", [1, 3, 64, 200, 301, 1000])  # in a block of training images; k lies within and beyond
@pytest.mark.parametrize("k", [1, 50, 400])
def test_blocks_of_training_images_find_the_neighbours_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, rows: int, k: int
) -> None:
    import faiss

    rng = np.random.default_rng(5)
    train = (rng.normal(size=(301, 17)) + 2).astype(np.float32)
    test = (rng.normal(size=(43, 17)) + 2).astype(np.float32)
    train[200:220] = train[:20]  # equally similar to everything, in another block
    monkeypatch.setattr(unit_rows, "_BLOCK_BYTES", 4 * 17 * rows)
    monkeypatch.setattr(knn, "_CHUNK", 10)
    sizes: list[int] = []
    search = faiss.knn

    def spy(queries: np.ndarray, block: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(block))
        return search(queries, block, *args, **kwargs)

    monkeypatch.setattr(faiss, "knn", spy)
    similarities, neighbours = knn_neighbors(train, test, k=k)
    assert max(sizes) == min(rows, 301)

    def unit(matrix: np.ndarray) -> np.ndarray:
        wide = matrix.astype(np.float64)
        return wide / np.linalg.norm(wide, axis=1, keepdims=True)

    cosine = unit(test) @ unit(train).T
    found = np.take_along_axis(cosine, neighbours.numpy(), axis=1)
    assert all(len(set(row)) == min(k, 301) for row in neighbours.tolist())
    np.testing.assert_allclose(found, -np.sort(-cosine, axis=1)[:, :k], rtol=0, atol=1e-6)
    np.testing.assert_allclose(similarities.numpy(), found, rtol=0, atol=1e-6)
    assert (similarities.diff(dim=1) <= 0).all()
    # Equal rows: the first of them first, and at the k-th place too.
    np.testing.assert_array_equal(neighbours.numpy(), np.argsort(-cosine.round(12), axis=1, kind="stable")[:, :k])


def test_many_k_at_once_are_each_k_by_itself() -> None:
    rng = np.random.default_rng(6)
    train, labels, test = rng.normal(size=(90, 6)), rng.integers(4, size=90), rng.normal(size=(71, 6))
    ks = (20, 1, 500, 7)
    together = knn_classify_each(train, labels, test, ks, temperature=1.0)
    assert together.shape == (4, 71)
    for k, predictions in zip(ks, together, strict=True):
        assert torch.equal(predictions, knn_classify(train, labels, test, k=k, temperature=1.0))
    assert len({tuple(predictions.tolist()) for predictions in together}) == 4


@pytest.mark.parametrize("spread", [1e-3, 1e-4, 0.0])
def test_k_and_blocks_change_no_neighbour_where_all_are_equal_to_float32(
    monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    rng = np.random.default_rng(8)
    train, test = (1 + spread * rng.normal(size=(rows, 33)).astype(np.float32) for rows in (150, 40))
    wanted = knn_neighbors(train, test, k=150)[1]
    wide = [
        matrix.astype(np.float64) / np.linalg.norm(matrix.astype(np.float64), axis=1)[:, None]
        for matrix in (train, test)
    ]
    cosine = wide[1] @ wide[0].T
    found = np.take_along_axis(cosine, wanted.numpy(), axis=1)
    np.testing.assert_allclose(found, -np.sort(-cosine, axis=1), rtol=0, atol=2e-12)
    if spread == 0:
        assert (wanted == torch.arange(150)).all()
    for rows in (1, 7, 64):
        monkeypatch.setattr(unit_rows, "_BLOCK_BYTES", 4 * 33 * rows)
        for k in (1, 5, 149):
            assert torch.equal(knn_neighbors(train, test, k=k)[1], wanted[:, :k])


def test_training_features_may_be_a_read_only_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    train, labels, test = rng.normal(size=(90, 6)).astype(np.float32), np.arange(90) % 4, rng.normal(size=(31, 6))
    np.save(tmp_path / "train.npy", train)
    wanted = knn_classify(train, labels, test, k=7)
    monkeypatch.setattr(unit_rows, "_BLOCK_BYTES", 4 * 6 * 11)
    assert torch.equal(knn_classify(np.load(tmp_path / "train.npy", mmap_mode="r"), labels, test, k=7), wanted)


@pytest.mark.parametrize("row", [0, 40, 89])
def test_a_value_that_is_not_finite_is_found_in_any_block_before_any_search(
    monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    monkeypatch.setattr(unit_rows, "_BLOCK_BYTES", 4 * 6 * 11)
    monkeypatch.setattr(knn, "_search", None)
    train = np.ones((90, 6))
    train[row, 3] = -np.inf
    with pytest.raises(InputError, match=f"train_features: row {row} holds NaN or infinity"):
        knn_classify(train, np.arange(90) % 4, np.ones((2, 6)))


def test_extreme_scales_have_a_direction_too() -> None:
    train = np.array([[1e-30, 0], [0, 3e38]], dtype=np.float32)
    assert knn_classify(train, np.array([0, 1]), np.array([[3e38, 1e38], [1e-36, 1e-35]]), k=1).tolist() == [0, 1]


def test_faiss_takes_the_threads_of_torch_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    threads: list[int] = []
    search = faiss.knn

    def spy(*args: Any, **kwargs: Any) -> Any:
        threads.append(faiss.omp_get_max_threads())
        return search(*args, **kwargs)

    monkeypatch.setattr(faiss, "knn", spy)
    before = faiss.omp_get_max_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    knn_neighbors(np.eye(3), np.eye(3), k=1)
    assert threads == [before + 1]
    assert faiss.omp_get_max_threads() == before


def test_a_zero_row_is_similar_to_nothing() -> None:
    train = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    similarities, _ = knn_neighbors(train, np.array([[0.0, 0.0], [3.0, 0.0]]), k=4)
    assert similarities.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]
    assert knn_classify(train, np.array([0, 1, 2, 0]), np.array([[3.0, 0.0]]), k=1).tolist() == [1]


GOOD = np.ones((4, 3))
LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("train", "labels", "test", "settings", "message"),
    [
        (np.array([[1.0, np.nan]] * 4), LABELS, GOOD, {}, "train_features: row 0 holds NaN"),
        (GOOD, LABELS, np.array([[1e300, 1, 1]]), {}, "test_features: row 0 holds NaN or infinity"),
        (GOOD, LABELS, np.ones((2, 5)), {}, "test_features: 5 features an image, but train_features has 3"),
        (GOOD, LABELS, np.ones(3), {}, r"test_features: shape \(3,\)"),
        (np.ones((0, 3)), LABELS[:0], GOOD, {}, r"train_features: shape \(0, 3\)"),
        (GOOD, LABELS[:3], GOOD, {}, "train_labels: 3 labels for 4 rows"),
        (GOOD, np.array([0, -1, -1, 1]), GOOD, {}, "train_labels: 2 of 4 are negative"),
        (GOOD, LABELS / 2, GOOD, {}, "train_labels: torch.float64, wanted integer"),
        (GOOD, LABELS[:, None], GOOD, {}, r"train_labels: shape \(4, 1\)"),
        (GOOD, LABELS, GOOD, {"k": 0}, "k: 0, wanted at least 1"),
        (GOOD, LABELS, GOOD, {"temperature": 0.0}, "temperature: 0.0, wanted above 0"),
        (GOOD, LABELS, GOOD, {"temperature": float("nan")}, "temperature: nan"),
    ],
)
def test_bad_input_is_named(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        knn_classify(train, labels, test, **settings)  # type: ignore[arg-type]
