"""Gradients in bfloat16: what the ranks agree on, and what it takes to say so."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from simclr_scale.losses import NTXentLoss
from simclr_scale.models import ProjectionHead
from simclr_scale.pretraining.strategies import CompressedDDPStrategy, gradient_bytes_of_a_number
from simclr_scale.scaling.communication import collectives_of_a_step, gradient_bytes
from tests.gloo_pool import GlooPool
from tests.pretraining.runs import Pairs, fit
from tests.pretraining.test_ranks import IMAGES, Pool, Step, networks


def as_it_is(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """This rank's own gradient."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class NotReduced(CompressedDDPStrategy):
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, as_it_is)


def gradients(rank: int, world_size: int, kind: type[DDPStrategy]) -> dict[str, Tensor]:
    encoder, head = networks("tiny")
    module = Step(encoder, head=head, warmup_epochs=0)
    share = IMAGES // world_size
    fit(
        module,
        data=DataLoader(Subset(Pairs(IMAGES), range(rank * share, (rank + 1) * share)), batch_size=share),
        devices=world_size,
        strategy=kind(process_group_backend="gloo"),
        plugins=[Pool(rank, world_size)],
        max_epochs=-1,
        max_steps=1,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    return module.gradients


def compressed_and_own(
    rank: int, world_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[str, int]]]:
    sent = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.bfloat16:
            sent.append((str(tensor.dtype), tensor.nbytes))
        return reduce(tensor, *args, **kwargs)

    own = gradients(rank, world_size, NotReduced)
    with mock.patch.object(default_hooks.dist, "all_reduce", counting):
        return gradients(rank, world_size, CompressedDDPStrategy), own, sent


def test_the_gradient_is_the_mean_of_rounded_ones(gloo: GlooPool) -> None:
    (first, own_first, sent), (second, own_second, _) = gloo(2, compressed_and_own)
    encoder, head = networks("tiny")
    assert first.keys() == {
        f"d {part}.{name}" for part, n in (("encoder", encoder), ("head", head)) for name, _ in n.named_parameters()
    }
    for key, gradient in first.items():
        halves = [own[key].bfloat16() / 2 for own in (own_first, own_second)]  # halving rounds nothing
        assert torch.equal(gradient, sum(halves).float()), key  # type: ignore[union-attr]
        assert torch.equal(gradient, second[key])
    exact = {key: (own_first[key] + own_second[key]) / 2 for key in first}
    assert any(not torch.equal(first[key], exact[key]) for key in first), "nothing was rounded"
    for key, gradient in first.items():
        torch.testing.assert_close(gradient, exact[key], rtol=0.02, atol=0.01 * exact[key].abs().max().item())
    assert sum(size for _, size in sent) == gradient_bytes([encoder, head]) // 2


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (CompressedDDPStrategy(), 2),
        (DDPStrategy(), 4),
        (DDPStrategy(ddp_comm_hook=default_hooks.bf16_compress_hook), 2),
        (DDPStrategy(ddp_comm_hook=default_hooks.allreduce_hook), 4),
    ],
)
def test_the_count_of_bytes_knows_the_hook(strategy: DDPStrategy, expected: int) -> None:
    assert gradient_bytes_of_a_number(strategy) == expected


def test_half_the_bytes_are_counted_for_gradients_and_no_fewer_for_the_rest() -> None:
    encoder, _ = networks("tiny")
    head = ProjectionHead(int(encoder.num_features), out_features=5)

    def counted(size: int) -> dict[str, int]:
        found = collectives_of_a_step(encoder, head, NTXentLoss(), rows=8, width=5, gradient_size=size)
        assert found is not None
        return {c.part: c.put_in for c in found}

    full, half = counted(4), counted(2)
    assert half["gradients"] * 2 == full["gradients"]
    assert {key: half[key] for key in half if key != "gradients"} == {k: full[k] for k in full if k != "gradients"}
