"""k-nearest-neighbour classification on frozen features: no training, one number, exact.

B images in a chunk, k neighbours, C classes, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features, as_labels

# Test images at a time. faiss searches in blocks of this size: more gains no speed and holds more votes (B, C).
_CHUNK = 4096


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
        InputError: shapes do not fit, features are not finite, a training image is unlabelled, or k or
            temperature is not above 0.
    """
    check_knn_settings(k, temperature)
    train, test = _unit_pair(train_features, test_features)
    classes, votes_for = as_labels(train_labels, "train_labels", rows=len(train)).unique(return_inverse=True)
    predictions = torch.empty(len(test), dtype=torch.int64)
    for start in range(0, len(test), _CHUNK):
        similarities, neighbours = _search(train, test[start : start + _CHUNK], k)
        winners = _vote(similarities, votes_for[neighbours], len(classes), temperature)
        predictions[start : start + _CHUNK] = classes[winners]
        if progress:
            progress(start + len(winners))
    return predictions


def knn_neighbors(train_features: Array, test_features: Array, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k training images most similar to each test image, by exhaustive search (faiss).

    Args:
        train_features: (N, D).
        test_features: (M, D).
        k: a number above N means all N.

    Returns:
        Cosine similarities (M, k) float32 and rows of `train_features` (M, k) int64, the most similar first. Which of
        several equally similar images takes the k-th place is faiss's choice.

    Raises:
        InputError: as `knn_classify` does.
    """
    check_knn_settings(k)
    return _search(*_unit_pair(train_features, test_features), k)


def check_knn_settings(k: int, temperature: float = 1.0) -> None:
    """Raises InputError for settings out of range; for a command to call before it computes features."""
    if k < 1:
        raise InputError(f"k: {k}, wanted at least 1")
    if not temperature > 0:
        raise InputError(f"temperature: {temperature}, wanted above 0")


def _unit_pair(train_features: Array, test_features: Array) -> tuple[torch.Tensor, torch.Tensor]:
    train = _unit_rows(train_features, "train_features")
    test = _unit_rows(test_features, "test_features")
    if train.shape[1] != test.shape[1]:
        raise InputError(f"test_features: {test.shape[1]} features an image, but train_features has {train.shape[1]}")
    return train, test


def _unit_rows(features: Array, name: str) -> torch.Tensor:
    matrix = as_features(features, name)
    # No finite float32 row over- or underflows its norm in float64.
    norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True, dtype=torch.float64)
    # A zero row has no direction: it stays zero, as far from everything as from its opposite. One black image, which an
    # encoder without biases maps there, must not end an evaluation.
    return torch.div(matrix, norms.where(norms > 0, 1.0), out=torch.empty_like(matrix))


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
    weights = ((similarities_Bk - similarities_Bk[:, :1]).double() / temperature).exp()
    votes_BC = weights.new_zeros(len(weights), classes).scatter_add_(1, votes_for_Bk, weights)
    # Equal sets of neighbours sum in the same order, so equal votes are equal bits; argmax then takes the first class.
    return votes_BC.argmax(dim=1)
