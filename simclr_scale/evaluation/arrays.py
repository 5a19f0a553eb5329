"""Feature matrices and label vectors as users hand them over: numpy or torch, checked and brought to one form."""

import numpy as np
import torch

from simclr_scale.errors import InputError

Array = np.ndarray | torch.Tensor


def as_features(features: Array, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`features` as a finite, contiguous (N, D) tensor of `dtype` on the CPU, N and D at least 1.

    `name` is what the error calls it. Raises InputError for another shape, no rows, or values that are not finite
    in `dtype`.
    """
    matrix = torch.as_tensor(features).detach().to("cpu", dtype).contiguous()
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"{name}: shape {tuple(matrix.shape)}, wanted (images, features), neither of them 0")
    if not torch.isfinite(matrix).all():
        row = int((~torch.isfinite(matrix)).any(dim=1).nonzero()[0])
        raise InputError(f"{name}: row {row} holds NaN or infinity")
    return matrix


def as_labels(labels: Array, name: str, rows: int) -> torch.Tensor:
    """`labels` as a (rows,) int64 tensor on the CPU, every one of them a class (none is -1, unlabelled).

    Raises InputError for another length or shape, for labels that are not integers, and for negative ones.
    """
    vector = as_classes(labels, name)
    if len(vector) != rows:
        raise InputError(f"{name}: {len(vector)} labels for {rows} rows of features")
    unlabelled = int((vector < 0).sum())
    if unlabelled:
        raise InputError(f"{name}: {unlabelled} of {rows} are negative (unlabelled); leave those images out")
    return vector


def as_classes(classes: Array, name: str) -> torch.Tensor:
    """`classes` as an (N,) int64 tensor on the CPU. Raises InputError for another shape or for non-integers."""
    vector = torch.as_tensor(classes).detach().cpu()
    if vector.ndim != 1:
        raise InputError(f"{name}: shape {tuple(vector.shape)}, wanted (images,)")
    if vector.is_floating_point() or vector.is_complex() or vector.dtype is torch.bool:
        raise InputError(f"{name}: {vector.dtype}, wanted integer classes")
    return vector.long()
