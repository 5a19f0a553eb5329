"""Bytes of a step, counted by formula, against every collective that real processes dispatch."""

from collections import Counter
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_scale.distributed import convert_global_batch_norm
from simclr_scale.losses import DCLLoss, NTXentLoss
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.models.chunked import encode_in_chunks
from simclr_scale.pretraining.local_losses import staged_step
from simclr_scale.pretraining.local_simclr import LocalSimCLR
from simclr_scale.pretraining.probe import OnlineProbe
from simclr_scale.scaling.communication import Collective, LossInput, collectives_of_a_step, sent_by_part
from simclr_scale.scaling.local_sgd import LocalSGD
from tests.scaling.test_local_sgd import model as local_sgd_model
from tests.scaling.test_local_sgd import train

IMAGES, CHANNELS = 6, (4, 6, 8)


class Watch(TorchDispatchMode):
    """What this rank puts into each collective, by operation and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace.startswith(("c10d", "_c10d")):
            name = func.name().split("::")[1].strip("_").split(".")[0].rstrip("_")
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            operation = {"allgather_base": "all_gather", "allreduce": "all_reduce"}.get(name, name)
            # An all-gather is given what it fills, too.
            self.seen[operation, min(x.nbytes for x in tensors)] += 1
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    def __init__(self, chunk_size: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = create_encoder("simclr_resnet_tiny", channels=CHANNELS)
        self.head = ProjectionHead(int(self.encoder.num_features), out_features=5)
        self.chunk_size = chunk_size

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.encoder(x) if self.chunk_size is None else encode_in_chunks(self.encoder, x, self.chunk_size)
        return h, self.head(h)


def staged(rank: int, world_size: int, overlap: int) -> tuple[Counter, list[Collective]]:
    """The same of local losses."""
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=CHANNELS)
    model = LocalSimCLR(encoder, overlap=overlap, expansion=10, head=ProjectionHead(CHANNELS[-1], out_features=5))
    convert_global_batch_norm(model)
    given = LossInput(model.loss)
    # In place of the trainer's: what calls the step from within the wrapper's forward.
    model.forward, encode = (lambda x: staged_step(_Encoding(model, encode), x).loss), model.forward
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped(torch.rand(2 * IMAGES, 3, 8, 8)).backward()
    with Watch() as watch:
        wrapped(torch.rand(2 * IMAGES, 3, 8, 8)).backward()
    parts = (model.encoder, model.head, model.loss)
    collectives = collectives_of_a_step(*parts, rows=given.rows, width=given.width, stage_losses=model.local)
    assert collectives is not None
    return watch.seen, collectives


class _Encoding:
    """A model whose call encodes."""

    def __init__(self, model: nn.Module, encode: Any) -> None:
        self.encoder, self.head, self.loss, self.local = model.encoder, model.head, model.loss, model.local
        self._encode = encode

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._encode(x)


def _but_for_ddp(counted: Counter[tuple[str, int]], collectives: list[Collective]) -> dict[tuple[str, int], int]:
    """DistributedDataParallel's own come in buckets; another test holds them against the model."""
    gradients = sum(c.put_in for c in collectives if c.part == "gradients")
    own = {("all_reduce", gradients)}
    return {key: n for key, n in counted.items() if key not in own and key[0] != "broadcast"}


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_formula_names_every_collective_of_local_losses(gloo, overlap: int) -> None:
    for seen, collectives in gloo(2, staged, overlap):
        counted: Counter[tuple[str, int]] = Counter()
        for collective in collectives:
            counted[collective.operation, collective.put_in] += collective.times
        assert _but_for_ddp(counted, collectives) == _but_for_ddp(seen, collectives)


class Steps(pl.Callback):
    """Watches a run from its second step to the end of its last."""

    def __init__(self) -> None:
        self.watch, self.open = Watch(), False

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.watch.__enter__()
            self.open = True

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 9:
            self.watch.__exit__(None, None, None)


def local_run(rank: int, world_size: int, negatives: str) -> tuple[Counter, list[Collective], int, int]:
    steps, sync = Steps(), LocalSGD(period=4, negatives=negatives)
    module = local_sgd_model(probe_classes=3)
    train(rank, world_size, module, sync, steps, precision="32-true", logger=False)
    collectives = collectives_of_a_step(
        module.encoder,
        module.head,
        module.loss,
        rows=8,
        width=128,
        ddp=False,
        alone=negatives == "local",
    )
    assert collectives is not None
    averaged = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return steps.watch.seen, collectives, sum(t.nbytes for t in averaged), sync.traffic.averaged_bytes


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_the_collectives_of_local_sgd(gloo, negatives: str) -> None:
    for seen, collectives, bytes_of_an_average, averaged in gloo(2, local_run, negatives):
        counted: Counter[tuple[str, int]] = Counter()
        for collective in collectives:
            counted[collective.operation, collective.put_in] += 8 * collective.times
        averages = {key: n for key, n in (seen - counted).items() if key[0] == "all_reduce"}
        assert not counted - seen
        # Steps 4 and 8, each with weights, buffers and a number for the spread.
        assert sum(put_in * n for (_, put_in), n in averages.items()) == 2 * (bytes_of_an_average + 8)
        # Twelve steps hold three averages, after the last of which nothing but the optimizers' states is apart.
        assert averaged >= 3 * bytes_of_an_average


def step(rank: int, world_size: int, chunk_size: int | None, gather: bool) -> tuple[Counter, list[Collective]]:
    model = Model(chunk_size)
    convert_global_batch_norm(model)
    # What DistributedDataParallel says to itself at its start and in its first step is not of every step.
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    loss, probe = NTXentLoss(gather=gather), OnlineProbe(int(model.encoder.num_features), 3)
    given = LossInput(loss)

    def run() -> None:
        h, z = wrapped(torch.rand(2 * IMAGES, 3, 8, 8))
        probe.update(h[:IMAGES], torch.zeros(IMAGES, dtype=torch.int64))
        loss(z).backward()
        model.zero_grad()

    run()
    run()
    with Watch() as watch:
        run()
    collectives = collectives_of_a_step(
        model.encoder,
        model.head,
        loss,
        rows=given.rows,
        width=given.width,
        element_size=given.element_size,
        chunk_size=chunk_size,
        probe=probe,
    )
    assert collectives is not None
    return watch.seen, collectives


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("chunk_size", "gather"), [(None, True), (None, False), (5, True)])
def test_the_formula_names_every_collective(gloo, world_size: int, chunk_size: int | None, gather: bool) -> None:
    for seen, collectives in gloo(world_size, step, chunk_size, gather):
        counted: Counter[tuple[str, int]] = Counter()
        for collective in collectives:
            counted[collective.operation, collective.put_in] += collective.times
        # DistributedDataParallel's own come in buckets; another test holds them against the model.
        own = {("all_reduce", c.put_in) for c in collectives if c.part == "gradients"}
        own |= {("broadcast", c.put_in) for c in collectives if c.part == "buffers"}
        assert len(own) == 2
        assert {key: n for key, n in counted.items() if key not in own} == {
            key: n for key, n in seen.items() if key not in own and key[0] != "broadcast"
        }


def test_gradients_and_buffers_are_those_of_the_model(gloo) -> None:
    model = Model(None)
    for _, collectives in gloo(2, step, None, True):
        parts = {c.part: c.put_in for c in collectives}
        assert parts["gradients"] == 4 * sum(p.numel() for p in model.parameters())
        assert parts["buffers"] == sum(b.nbytes for b in model.buffers())


def test_ring_bytes_by_hand() -> None:
    assert Collective("x", "all_gather", 10).sent(4) == 30
    assert Collective("x", "all_reduce", 10, 3).sent(4) == 3 * 2 * 3 / 4 * 10
    assert Collective("x", "broadcast", 10).sent(4) == 10
    assert sent_by_part([Collective("a", "all_gather", 10), Collective("a", "broadcast", 1)], 2) == {"a": 11}
    assert sent_by_part([Collective("a", "all_gather", 10)], 1) == {}


def test_half_precision_rows_travel_in_two_bytes_and_a_foreign_loss_is_not_guessed() -> None:
    parts = [nn.Identity(), nn.Identity()]
    collectives = collectives_of_a_step(*parts, DCLLoss(), rows=8, width=128, element_size=2)
    assert collectives is not None
    assert [c.put_in for c in collectives if c.part == "loss"] == [8, 8 * 128 * 2, 32]
    assert collectives_of_a_step(*parts, nn.CosineSimilarity(), rows=8, width=128) is None
