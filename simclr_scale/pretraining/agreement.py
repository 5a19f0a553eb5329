"""What all ranks must do alike at one step, agreed on by a single small reduction."""

from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.distributed import world


class Voter(ABC):
    """A callback that has a say at every step, before the optimizer's."""

    @abstractmethod
    def vote(self, trainer: Any, pl_module: Any) -> int | Tensor:
        """This rank's vote: a small whole number from 0, or a tensor () of one on the device."""

    @abstractmethod
    def decided(self, trainer: Any, pl_module: Any, vote: int) -> None:
        """Called on every rank with the largest vote of all ranks."""


class Agreement(pl.Callback):
    """Collects the votes of all callbacks that are :class:`Voter`, after the backward pass of every step.

    One reduction of a few bytes and one reading of its result, whatever the number of voters. Lightning's own exchange
    about SIGTERM, a broadcast and a reading at the start of every step, gives way to it: see :class:`Preemption`.
    """

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        voters = [callback for callback in trainer.callbacks if isinstance(callback, Voter)]
        votes = [voter.vote(trainer, pl_module) for voter in voters]
        for voter, result in zip(voters, largest_votes(votes, trainer.strategy.root_device), strict=True):
            voter.decided(trainer, pl_module, result)


def largest_votes(votes: list[int | Tensor], device: torch.device) -> list[int]:
    """The largest over all ranks, of each vote."""
    if world().size == 1 and not any(isinstance(vote, Tensor) for vote in votes):
        return [int(vote) for vote in votes]
    on_host = torch.tensor([0 if isinstance(vote, Tensor) else vote for vote in votes], dtype=torch.int32)
    together = on_host.to(device, non_blocking=True)
    for index, vote in enumerate(votes):
        if isinstance(vote, Tensor):
            together[index] = vote
    if world().size > 1:
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()
