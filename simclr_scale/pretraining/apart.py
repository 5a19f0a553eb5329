"""Weights that differ between ranks for a while, and the moments at which they must not."""

from abc import ABC, abstractmethod
from typing import Any


class WeightsApart(ABC):
    """A callback under which each rank trains weights of its own between synchronisations."""

    @abstractmethod
    def bring_together(self, trainer: Any, pl_module: Any) -> None:
        """Called on every rank: makes weights, buffers and the states of optimizers those of all ranks, in place."""


def bring_weights_together(trainer: Any, pl_module: Any) -> None:
    """What has to precede every look at the weights: a score, a checkpoint. To be called on every rank."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightsApart):
            callback.bring_together(trainer, pl_module)
