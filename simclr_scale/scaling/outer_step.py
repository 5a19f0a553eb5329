"""The outer step of DiLoCo: what a round of local steps has changed, taken as a gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class OuterNesterov:
    """SGD with Nesterov momentum on the weights of the last round.

    With w the weights at the end of the last round and m the mean over ranks at the end of this one, the gradient is
    w - m (Douillard et al. 2023, "DiLoCo", algorithm 1; a rate of .7 and a momentum of .9 there). A rate of 1 without
    momentum is the mean itself. Costs two copies of the weights on every rank.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self.learning_rate, self.momentum = learning_rate, momentum
        self._weights: list[Tensor] = []
        self._optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Any] | None = None

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Starts from the weights as they are, which all ranks share; or goes on from a checkpoint."""
        saved, self._saved = self._saved, None
        self._weights = [parameter.detach().clone() for parameter in parameters]
        self._optimizer = torch.optim.SGD(
            self._weights, lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0
        )
        if saved is not None:
            for weight, kept in zip(self._weights, saved["weights"], strict=True):
                weight.copy_(kept)
            self._optimizer.load_state_dict(saved["optimizer"])

    @torch.no_grad()
    def step(self, parameters: Sequence[Tensor]) -> None:
        """Replaces the means, the same on every rank, by what the outer step makes of them."""
        assert self._optimizer is not None
        for weight, mean in zip(self._weights, parameters, strict=True):
            weight.grad = weight - mean
        self._optimizer.step()
        for weight, parameter in zip(self._weights, parameters, strict=True):
            weight.grad = None
            parameter.copy_(weight)

    def state_dict(self) -> dict[str, Any] | None:
        """Weights of the last round and momentum; None before the first."""
        if self._optimizer is None:
            return self._saved
        return {"weights": self._weights, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To be taken up at the beginning: the weights are then on their device."""
        self._saved = state
