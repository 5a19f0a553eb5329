"""Class-balanced selections of labelled images, the same on every machine."""

import numpy as np

from simclr_scale.errors import InputError


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut labelled images in two, each class in the same proportion.

    Every class is put in one seeded order, from which `first` takes the head. A smaller fraction of the same labels
    and seed is therefore contained in a larger one.

    Args:
        labels: (N,) integers >= 0.
        fraction: the share of every class that goes to `first`, between 0 and 1, both excluded.
        seed: of the order within the classes; >= 0.

    Returns:
        `first` and `second`: sorted int64 indices into `labels`, disjoint, together complete. Of a class of n images
        `first` holds `fraction * n`, rounded, but at least one, and `second` at least one if n >= 2.

    Raises:
        InputError: the fraction is out of range, the seed is negative or an image has no label.
    """
    labels = np.asarray(labels)
    if not 0 < fraction < 1:
        raise InputError(f"fraction {fraction} of the labels: must lie between 0 and 1")
    if seed < 0:
        raise InputError(f"seed {seed}: must not be negative")
    if labels.size and labels.min() < 0:
        raise InputError(f"{int((labels < 0).sum())} of {labels.size} images have no label: select the labelled first")
    classes, counts = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = np.zeros(labels.size, dtype=bool)
    for label, indices in zip(classes, members, strict=False):
        taken = min(max(int(fraction * indices.size + 0.5), 1), max(indices.size - 1, 1))
        chosen[indices[_class_order(indices.size, seed, int(label))[:taken]]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _class_order(size: int, seed: int, label: int) -> np.ndarray:
    """A permutation of `size` elements.

    NumPy may change `Generator.permutation` between releases; the raw stream of Philox and a stable sort of it are
    fixed.
    """
    return np.argsort(np.random.Philox(key=[seed, label]).random_raw(size), kind="stable")
