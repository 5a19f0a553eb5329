"""Ways in which gathers are commonly wrong, put in the place of ours in this process."""

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.distributed import GlobalBatchNorm, all_gather, world
from simclr_scale.losses import NTXentLoss
from simclr_scale.optim import LARS


def without_gradient(loss: NTXentLoss, z: Tensor) -> Tensor:
    """The right value; but what the others' rows owe to ours is cut off, as ``dist.all_gather`` does."""
    rows, first = len(z), world().rank * len(z)
    unit = F.normalize(z, dim=1)
    everyone = all_gather(unit.detach())
    everyone = torch.cat([everyone[:first], unit, everyone[first + rows :]])
    own = torch.arange(rows)
    logits = unit @ everyone.T / loss.temperature
    logits = logits.masked_fill(F.one_hot(own + first, len(everyone)).bool(), -torch.inf)
    value = F.cross_entropy(logits, own.roll(rows // 2) + first)
    return value + (all_gather(value.detach()[None]).mean() - value).detach()


def local_negatives(loss: NTXentLoss, z: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / loss.temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def local_statistics(norm: GlobalBatchNorm, x: Tensor) -> Tensor:
    return torch.nn.BatchNorm2d.forward(norm, x)  # type: ignore[arg-type]


def step_of_its_own(optimizer: LARS, closure: None = None) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.mul_(1 + 1e-12 * world().rank)


LOSSES = {"without_gradient": without_gradient, "local_negatives": local_negatives}

if __name__ == "__main__":
    from simclr_scale.cli import main

    NTXentLoss.forward = LOSSES[os.environ["BREAKAGE"]]  # type: ignore[method-assign,assignment]
    sys.exit(main(["verify"]))
