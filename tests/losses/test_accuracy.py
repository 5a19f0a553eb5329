"""Contrastive accuracy: counted by hand, in parts, and over ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.losses import accuracy, contrastive_accuracy
from tests.losses.oracles import images, share


def counted(z: Tensor) -> float:
    unit = F.normalize(z, dim=1).double()
    n = len(z) // 2
    right = 0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        right += max(others, key=lambda j, i=i: float(unit[i] @ unit[j])) == (i + n) % (2 * n)
    return right / (2 * n)


def test_extremes() -> None:
    z = torch.eye(4)
    assert contrastive_accuracy(torch.cat([z, z])).item() == 1.0
    assert contrastive_accuracy(torch.cat([z, z.roll(1, 0)])).item() == 0.0


@pytest.mark.parametrize("similarities", [1, 100, 2**24])
def test_equals_a_count_however_it_is_cut(similarities: int, monkeypatch) -> None:
    monkeypatch.setattr(accuracy, "_SIMILARITIES", similarities)
    torch.manual_seed(0)
    z1 = torch.randn(15, 6)
    z = torch.cat([z1, z1 + 0.8 * torch.randn_like(z1)])
    assert 0 < counted(z) < 1
    assert contrastive_accuracy(z).item() == pytest.approx(counted(z))


def test_close_rows_under_autocast() -> None:
    torch.manual_seed(0)
    z1 = torch.randn(64) + 0.05 * torch.randn(64, 64)
    z = torch.cat([z1, z1 + 0.01 * torch.randn(64, 64)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_accuracy(z).item() == 1.0


def of_a_rank(rank: int, world_size: int) -> float:
    return contrastive_accuracy(share(rank, world_size, 8).float()).item()


def test_sees_all_ranks(gloo) -> None:
    everything = contrastive_accuracy(torch.cat(images(8)).float()).item()
    assert sum(gloo(2, of_a_rank)) / 2 == pytest.approx(everything)
