"""The losses written down as the papers have them, and what tests on several ranks share."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def paper_loss(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Equation 1 of SimCLR, term by term in float64."""
    views = [row / math.sqrt(float(row @ row)) for row in np.concatenate([z1, z2]).astype(np.float64)]
    n = len(z1)
    total = 0.0
    for i in range(2 * n):
        j = i + n if i < n else i - n
        denominator = sum(math.exp(float(views[i] @ views[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(float(views[i] @ views[j]) / temperature) / denominator)
    return total / (2 * n)


def paper_decoupled_loss(z1: np.ndarray, z2: np.ndarray, temperature: float, sigma: float | None = None) -> float:
    """DCL (sigma None) and DCLW of Yeh et al. 2022, term by term in float64."""
    views = [row / math.sqrt(float(row @ row)) for row in np.concatenate([z1, z2]).astype(np.float64)]
    n = len(z1)
    agreement = [float(views[k] @ views[k + n]) for k in range(n)]
    total = 0.0
    for i in range(2 * n):
        k = i % n
        weight = 1.0
        if sigma is not None:
            weight = 2 - math.exp(agreement[k] / sigma) / (sum(math.exp(a / sigma) for a in agreement) / n)
        negatives = sum(math.exp(float(views[i] @ views[j]) / temperature) for j in range(2 * n) if j % n != k)
        total += -weight * agreement[k] / temperature + math.log(negatives)
    return total / (2 * n)


def masked_cross_entropy(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent as torch's own operations give it; autograd differentiates it."""
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def decoupled(z: Tensor, temperature: float, sigma: float | None = None) -> Tensor:
    """DCL and DCLW as torch's own operations give them."""
    unit, n = F.normalize(z, dim=1), len(z) // 2
    agreement = (unit[:n] * unit[n:]).sum(1)
    weight = torch.ones(n) if sigma is None else 2 - n * torch.softmax(agreement / sigma, 0).detach()
    same_image = torch.eye(n, dtype=torch.bool).repeat(2, 2)
    negatives = (unit @ unit.T / temperature).masked_fill(same_image, -math.inf).logsumexp(1)
    return negatives.mean() - (weight * agreement).mean() / temperature


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def images(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x1 = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x1, x1 + 0.3 * torch.randn(n, 6, generator=generator, dtype=torch.float64)


def share(rank: int, world_size: int, n: int) -> Tensor:
    """This rank's images, rows [view 1; view 2]."""
    x1, x2 = (x.chunk(world_size)[rank] for x in images(n))
    return torch.cat([x1, x2])
