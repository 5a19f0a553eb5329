"""A linear classifier on features, however it was fitted."""

from dataclasses import dataclass

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features
from simclr_scale.evaluation.metrics import OF_SCORES, top1


@dataclass(frozen=True)
class LinearClassifier:
    """The logits of features (N, D) are features @ weight.T + bias, (N, C)."""

    weight: torch.Tensor
    """(C, D) float64."""
    bias: torch.Tensor
    """(C,) float64."""
    classes: torch.Tensor
    """(C,) int64, ascending: the label each logit stands for."""

    def logits(self, features: Array) -> torch.Tensor:
        """(N, C) float64, of `features` (N, D)."""
        matrix = as_features(features, "features", torch.float64)
        if matrix.shape[1] != self.weight.shape[1]:
            raise InputError(f"features: {matrix.shape[1]} an image, but the probe takes {self.weight.shape[1]}")
        return matrix @ self.weight.T + self.bias

    def predict(self, features: Array) -> torch.Tensor:
        """The most probable class, (N,) int64, of each row of `features` (N, D)."""
        return self.classes[self.logits(features).argmax(dim=1)]

    def answers(self, features: Array, metric: str, num_classes: int) -> torch.Tensor:
        """What `METRICS[metric]` takes for `features` (N, D): the class predicted, (N,), or scores (N, num_classes).

        Scores are logarithms of probabilities, as probabilities of nearly 1 would be equal where they are not. A class
        that the training labels lack is the least probable for every image alike.
        """
        if metric not in OF_SCORES:
            return self.predict(features)
        scores = self.logits(features).log_softmax(dim=1)
        answers = scores.new_full((len(scores), num_classes), float(scores.min()) - 1)
        answers[:, self.classes] = scores
        return answers

    def accuracy(self, features: Array, labels: Array) -> float:
        """Top-1 on `features` (N, D) and `labels` (N,); a class that the training labels lack counts as an error."""
        return top1(self.predict(features), labels)
