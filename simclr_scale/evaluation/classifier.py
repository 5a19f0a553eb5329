"""A linear classifier on features, however it was fitted."""

from dataclasses import dataclass

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features
from simclr_scale.evaluation.metrics import top1


@dataclass(frozen=True)
class LinearClassifier:
    """The logits of features (N, D) are features @ weight.T + bias, (N, C)."""

    weight: torch.Tensor
    """(C, D) float64."""
    bias: torch.Tensor
    """(C,) float64."""
    classes: torch.Tensor
    """(C,) int64, ascending: the label each logit stands for."""

    def predict(self, features: Array) -> torch.Tensor:
        """The most probable class, (N,) int64, of each row of `features` (N, D)."""
        matrix = as_features(features, "features", torch.float64)
        if matrix.shape[1] != self.weight.shape[1]:
            raise InputError(f"features: {matrix.shape[1]} an image, but the probe takes {self.weight.shape[1]}")
        return self.classes[(matrix @ self.weight.T + self.bias).argmax(dim=1)]

    def accuracy(self, features: Array, labels: Array) -> float:
        """Top-1 on `features` (N, D) and `labels` (N,); a class that the training labels lack counts as an error."""
        return top1(self.predict(features), labels)
