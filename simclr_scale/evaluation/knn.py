"""k-nearest-neighbour classification on frozen features: no training, one number, exact.

B images in a chunk, k neighbours, C classes, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_labels
from simclr_scale.evaluation.unit_rows import UnitRows

# Test images at a time. faiss searches in blocks of this size: more gains no speed and holds more votes (B, C).
_CHUNK = 4096

# Of a cosine by float32, in practice: some 1e-7 for thousands of features.
_FLOAT32_ERROR = 2e-6
# Candidates beyond k that float64 looks at, and the most there are: where thousands of images are equal to float32, as
# of a collapsed encoder, which of them come first says nothing.
_SPARE_CANDIDATES = 16
_MOST_CANDIDATES = 2048
_RANKED_BYTES = 2**26
_GRID = 2.0**40


def knn_classify(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    k: int = 200,
    temperature: float = 0.07,
    *,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Class of each test image by a weighted vote of its k most similar training images.

    A neighbour of cosine similarity s votes for its class with weight exp(s / temperature) (Wu et al. 2018,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4, where the defaults come
    from). Among classes with equal votes the smallest wins.

    Features are read in blocks, and no copy of them all is made: the arrays may be memory maps larger than memory.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers >= 0, in any numbering; there are no other classes than these.
        test_features: (M, D).
        k: a number above N means all N.
        temperature: of the weights.
        progress: is told how many test images are done, now and then.

    Returns:
        (M,) int64 classes.

    Raises:
        InputError: before any search, where shapes do not fit, features are not finite, a training image is
            unlabelled, or k or temperature is not above 0.
    """
    return knn_classify_each(train_features, train_labels, test_features, (k,), temperature, progress=progress)[0]


def knn_classify_each(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """What `knn_classify` gives for each of `ks`, by one search for the neighbours of the largest.

    Args:
        ks: the numbers of neighbours, in any order; above N means all N.

    Returns:
        (len(ks), M) int64 classes.

    Raises:
        InputError: as `knn_classify` does.
    """
    check_knn_settings(ks, temperature)
    train, test = _unit_pair(train_features, test_features)
    classes, votes_for = as_labels(train_labels, "train_labels", rows=len(train)).unique(return_inverse=True)
    predictions = torch.empty(len(ks), len(test), dtype=torch.int64)
    done = 0
    for similarities, neighbours in _searches(train, test, max(ks)):
        stop = done + len(neighbours)
        for row, k in enumerate(ks):
            winners = _vote(similarities[:, :k], votes_for[neighbours[:, :k]], len(classes), temperature)
            predictions[row, done:stop] = classes[winners]
        done = stop
        if progress:
            progress(done)
    return predictions


def knn_neighbors(train_features: Array, test_features: Array, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k training images most similar to each test image, by exhaustive search (faiss, then float64).

    Args:
        train_features: (N, D).
        test_features: (M, D).
        k: a number above N means all N.

    Returns:
        Cosine similarities (M, k) float32 and rows of `train_features` (M, k) int64, the most similar first, and of
        equally similar ones the first in `train_features`. The order is that of float64.

    Raises:
        InputError: as `knn_classify` does.
    """
    check_knn_settings(k)
    found = list(_searches(*_unit_pair(train_features, test_features), k))
    return torch.cat([similarities for similarities, _ in found]).float(), torch.cat([rows for _, rows in found])


def check_knn_settings(k: int | Sequence[int], temperature: float = 1.0) -> None:
    """Raises InputError for settings out of range; for a command to call before it computes features."""
    ks = (k,) if isinstance(k, int) else tuple(k)
    if not ks:
        raise InputError("k: none given, wanted at least one number of neighbours")
    for number in ks:
        if number < 1:
            raise InputError(f"k: {number}, wanted at least 1")
    if len(set(ks)) < len(ks):
        raise InputError(f"k: {', '.join(map(str, ks))}, wanted each number once")
    if not temperature > 0:
        raise InputError(f"temperature: {temperature}, wanted above 0")


def _unit_pair(train_features: Array, test_features: Array) -> tuple[UnitRows, UnitRows]:
    train = UnitRows(train_features, "train_features")
    test = UnitRows(test_features, "test_features")
    if train.width != test.width:
        raise InputError(f"test_features: {test.width} features an image, but train_features has {train.width}")
    return train, test


def _searches(train: UnitRows, test: UnitRows, k: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Similarities, float64, and neighbours (B, k) of one chunk of test images after another.

    faiss's float32 similarities depend in their last bits on the sizes of blocks, and its choice among equals on k. So
    it is asked for more than k, and float64 decides among them; where it could have left out one of the k for another
    as similar to float32, it is asked for more again.
    """
    k = min(k, len(train))
    most = max(_MOST_CANDIDATES, 2 * k)
    blocks = list(train.blocks())
    # Where one block is all, it is made once.
    only = train.read(*blocks[0]) if len(blocks) == 1 else None
    for start in range(0, len(test), _CHUNK):
        queries = test.read(start, start + _CHUNK)
        numbers = torch.arange(start, start + len(queries))
        similarities = torch.empty(len(queries), k, dtype=torch.float64)
        neighbours = torch.empty(len(queries), k, dtype=torch.int64)
        open_rows, candidates = torch.arange(len(queries)), min(k + _SPARE_CANDIDATES, len(train))
        while len(open_rows):
            least, found = _candidates(train, blocks, only, queries[open_rows], candidates)
            similarities[open_rows], neighbours[open_rows] = _ranked(train, test, numbers[open_rows], found, k)
            if candidates == min(most, len(train)):
                break
            open_rows = open_rows[least > similarities[open_rows, -1] - _FLOAT32_ERROR]
            candidates = min(4 * candidates, most, len(train))
        yield similarities, neighbours


def _candidates(
    train: UnitRows, blocks: list[tuple[int, int]], only: torch.Tensor | None, queries: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of the similarities (B,) and the rows (B, count) of the most similar by float32, in no sure order."""
    similarities, neighbours = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first, last in blocks:
        more, rows = _search(train.read(first, last) if only is None else only, queries, count)
        similarities, neighbours = torch.cat([similarities, more], dim=1), torch.cat([neighbours, rows + first], dim=1)
        if similarities.shape[1] > count:
            similarities, order = similarities.topk(count, dim=1)
            neighbours = neighbours.gather(1, order)
    return similarities.amin(dim=1), neighbours


def _ranked(
    train: UnitRows, test: UnitRows, queries: torch.Tensor, candidates: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities, float64, and rows (B, k) of the most similar candidates; of equals, the first in the matrix."""
    candidates = candidates.sort(dim=1).values
    step = max(1, _RANKED_BYTES // (8 * train.width * candidates.shape[1]))
    parts = []
    for rows, numbers in zip(candidates.split(step), queries.split(step), strict=True):
        directions = train.at(rows.flatten()).view(*rows.shape, train.width)
        parts.append((directions @ test.at(numbers)[:, :, None])[:, :, 0])
    # To a grid: the last bits of a product may depend on how many there are, and equal rows are to be equal.
    similarities = (torch.cat(parts) * _GRID).round_() / _GRID
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], candidates.gather(1, order[:, :k])


def _search(train: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import faiss

    with _faiss_threads(torch.get_num_threads()):
        similarities, neighbours = faiss.knn(
            queries.numpy(), train.numpy(), min(k, len(train)), metric=faiss.METRIC_INNER_PRODUCT
        )
    return torch.from_numpy(similarities), torch.from_numpy(neighbours)


@contextmanager
def _faiss_threads(threads: int) -> Iterator[None]:
    """faiss would take every core of the machine, whatever torch was limited to."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _vote(similarities_Bk: torch.Tensor, votes_for_Bk: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    # Relative to the nearest neighbour: the same winner, and no temperature overflows.
    weights = ((similarities_Bk - similarities_Bk[:, :1]) / temperature).exp()
    votes_BC = weights.new_zeros(len(weights), classes).scatter_add_(1, votes_for_Bk, weights)
    # Equal sets of neighbours sum in the same order, so equal votes are equal bits; argmax then takes the first class.
    return votes_BC.argmax(dim=1)
