"""Encoding in chunks on real processes under DistributedDataParallel, against one process with the whole batch."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_scale.distributed import convert_global_batch_norm
from simclr_scale.losses import nt_xent
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.models.chunked import encode_in_chunks

ENGINES = ("dense", "tiled")
VIEWS, CHUNK = 10, 4  # of a rank
SIZES = [4, 3, 3]
STEPS = 3  # DDP with a static graph learns it in the first, and rebuilds its buckets


class Chunked(nn.Module):
    """Encoder, head and, where asked for, a parameter that the loss does not depend on."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
        self.head = ProjectionHead(self.encoder.num_features, hidden_features=12, out_features=7)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(encode_in_chunks(self.encoder, x, CHUNK))


def loss_by_definition(z: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def views(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(VIEWS, 3, 16, 16, dtype=torch.float64, generator=generator)


def by_one_process(network: Chunked, step: int, world_size: int) -> Tensor:
    """The loss by plain torch; chunk k is that of all ranks together."""
    chunks = zip(*(views(step, rank).split(SIZES) for rank in range(world_size)), strict=True)
    encoded = [network.encoder(torch.cat(chunk)).chunk(world_size) for chunk in chunks]
    ranks = [torch.cat(parts).chunk(2) for parts in zip(*encoded, strict=True)]
    return loss_by_definition(network.head(torch.cat([rank[view] for view in range(2) for rank in ranks])))


class Collectives:
    """What this rank asks of the others from Python, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def noting(self, name: str) -> Any:
        real = getattr(dist, name)

        def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, tuple(tensor.shape)))
            return real(tensor, *args, **kwargs)

        return mock.patch.object(dist, name, note)


def steps_under_ddp(
    rank: int, world_size: int, engine: Any, options: dict[str, bool]
) -> tuple[list[float], list[tuple[str, tuple[int, ...]]], dict[str, float]]:
    """Losses, collectives, and the worst relative error of every gradient and buffer over the steps."""
    network = Chunked(unused="find_unused_parameters" in options).double()
    plain = copy.deepcopy(network)
    convert_global_batch_norm(network)
    parallel = DistributedDataParallel(network, **options)
    collectives, errors, losses = Collectives(), dict[str, float](), list[float]()
    for step in range(STEPS):
        for module in (network, plain):
            module.zero_grad()
        with collectives.noting("all_gather_into_tensor"), collectives.noting("all_reduce"):
            loss = nt_xent(parallel(views(step, rank)), 0.2, engine=engine)
            loss.backward()
        losses.append(loss.item())
        expected = by_one_process(plain, step, world_size)
        expected.backward()
        errors[f"loss {step}"] = abs(loss.item() / expected.item() - 1)
        twins = zip(network.named_parameters(), plain.parameters(), strict=True)
        facts = [(f"d {key}", parameter.grad, twin.grad) for (key, parameter), twin in twins]
        facts += [(key, b, c) for (key, b), c in zip(network.named_buffers(), plain.buffers(), strict=True)]
        for key, actual, wanted in facts:
            if wanted is None:
                assert key.startswith("d unused"), key
                assert actual is None or not actual.any(), key
                continue
            assert wanted.abs().max() > 1e-6, f"{key} is nothing to compare with"
            error = ((actual - wanted).abs().max() / wanted.abs().max()).item()
            errors[key] = max(errors.get(key, 0.0), error)
        with torch.no_grad():
            for module in (network, plain):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
    return losses, collectives.seen, errors


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {}),
        (2, {"static_graph": True}),
        (2, {"find_unused_parameters": True}),
        (3, {"gradient_as_bucket_view": True}),
    ],
)
def test_steps_equal_one_process(gloo, world_size: int, options: dict[str, bool], engine: Any) -> None:
    results = gloo(world_size, steps_under_ddp, engine, options)
    losses, collectives, errors = zip(*results, strict=True)
    assert all(own == losses[0] for own in losses), "the value must be the same on every rank"
    assert all(own == collectives[0] for own in collectives), "every rank must ask in the same order"
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in Chunked(False).encoder.modules())
    gathered = [shape for name, shape in collectives[0] if name == "all_gather_into_tensor" and len(shape) == 2]
    # Once a chunk in forward and, but for the last chunk, again in backward; at least, for the head has its own.
    assert len(gathered) >= STEPS * norms * (2 * len(SIZES) - 1)
    for own in errors:
        assert {key: error for key, error in own.items() if not error <= 1e-10} == {}


def unequal_batches(rank: int, world_size: int) -> str:
    network = convert_global_batch_norm(Chunked(False))
    with pytest.raises(ValueError, match="same number of views") as caught:
        network(torch.randn(VIEWS + 4 * rank, 3, 16, 16))
    return str(caught.value)


def test_unequal_batches_are_an_error_on_every_rank(gloo) -> None:
    """Rank 1 would have a chunk more, and its batch norm would wait for the others."""
    assert all("[10, 14]" in message for message in gloo(2, unequal_batches))
