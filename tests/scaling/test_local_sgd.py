"""Local SGD on real processes: against DDP, between and after averages, broken and unbroken."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.distributed import all_gather, average_across_ranks
from simclr_scale.errors import InputError
from simclr_scale.losses import NTXentLoss, VICRegLoss
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.scaling.local_sgd import LocalSGD
from tests.pretraining.runs import CLASSES, QUIET, Pairs, arguments, assert_same_run, differences
from tests.pretraining.runs import fit as plain_fit
from tests.pretraining.test_ranks import Pool

pytestmark = QUIET

IMAGES, BATCH = 48, 8
STEPS_AN_EPOCH = IMAGES // BATCH
SAVED_AT = 7  # of two epochs of five steps


def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr, momentum=0.9)


def adam(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr / 30)


def model(optimizer: Callable[..., Any] | None = sgd, **options: Any) -> SimCLR:
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
    return SimCLR(encoder, optimizer=optimizer, learning_rate=2.0, warmup_epochs=0, temperature=0.3, **options)


def train(
    rank: int,
    world_size: int,
    module: SimCLR,
    *callbacks: pl.Callback,
    ddp: dict[str, Any] | None = None,
    **options: Any,
) -> pl.Trainer:
    """One rank's part of a run, on Pairs unless there is ``data``."""
    mine = Subset(Pairs(IMAGES), range(rank, IMAGES, world_size))
    data = options.pop("data", None) or DataLoader(mine, batch_size=BATCH // world_size)
    strategy = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo", **(ddp or {}))
    settings = {"strategy": strategy, "devices": world_size, "use_distributed_sampler": False, **options}
    settings = {"precision": "64-true", "max_epochs": 2, "log_every_n_steps": 100, **settings}
    try:
        return plain_fit(module, *callbacks, data=data, **settings)
    finally:
        torch.set_default_dtype(torch.float32)


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if value.is_floating_point()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def spread(module: torch.nn.Module) -> float:
    """The largest difference of any weight or floating-point buffer between two ranks."""
    flat = torch.cat([value.double().flatten() for value in weights(module).values()])
    every = all_gather(flat[None])
    return (every - every[:1]).abs().max().item()


class Spread(pl.Callback):
    """Looks after every step, before and after what the callbacks behind it do."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(spread(pl_module))


def against_ddp(
    rank: int, world_size: int, local: bool, ddp: dict[str, Any], module_options: dict[str, Any]
) -> tuple[float, float, float]:
    """How far the end of training with period 1 is from that of DDP; how far training went; the spread at the end."""
    start = weights(model(**module_options))
    sync = LocalSGD(period=1, negatives="local" if local else "global")
    ours = model(probe_classes=CLASSES, **module_options)
    train(rank, world_size, ours, sync, ddp=ddp)
    peer = model(probe_classes=CLASSES, loss=NTXentLoss(0.3, gather=not local), **module_options)
    keep = mock.patch("simclr_scale.pretraining.simclr.convert_global_batch_norm", lambda module, *_: module)
    with keep if local else mock.patch.object(peer, "unused", create=True):
        train(rank, world_size, peer, ddp=ddp)
    # Of ranks that each have their own batch norm, DDP keeps the statistics of the first.
    names = {name for name, _ in ours.named_parameters() if not name.startswith("probe")}
    keep_names = names if local else names | {name for name, _ in ours.named_buffers()}
    a, b = ({k: v for k, v in weights(m).items() if k in keep_names} for m in (ours, peer))
    return distance(a, b), distance({k: v.float() for k, v in a.items()}, {k: start[k] for k in a}), spread(ours)


@pytest.mark.parametrize(
    ("world_size", "local", "ddp", "options"),
    [
        (2, False, {}, {}),
        pytest.param(4, False, {}, {}, marks=pytest.mark.slow),
        (2, True, {}, {}),
        (2, False, {"find_unused_parameters": True}, {"chunk_size": 3}),
        (2, False, {"gradient_as_bucket_view": True}, {}),
    ],
)
def test_period_1_with_sgd_is_ddp(
    gloo, world_size: int, local: bool, ddp: dict[str, Any], options: dict[str, Any]
) -> None:
    for away, moved, apart in gloo(world_size, against_ddp, local, ddp, options):
        assert away <= 1e-6
        assert moved > 1e-2
        assert apart == 0


def spreads(rank: int, world_size: int, start: int, period: int) -> tuple[list[float], list[float], int, float]:
    before, after, sync = Spread(), Spread(), LocalSGD(start=start, period=period)
    module = model(probe_classes=CLASSES)
    train(rank, world_size, module, before, sync, after)
    return before.seen, after.seen, sync.steps_since_average, spread(module)


def test_ranks_differ_between_averages_and_not_after_one(gloo) -> None:
    start, period, steps = 2, 4, 2 * STEPS_AN_EPOCH
    for before, after, left, end in gloo(2, spreads, start, period):
        averages = [step for step in range(1, steps + 1) if step > start and (step - start) % period == 0]
        assert averages == [6, 10]
        assert [step for step, seen in enumerate(before, 1) if seen == 0] == [1, 2]
        assert [step for step, seen in enumerate(after, 1) if seen == 0] == [1, 2, *averages]
        assert min(x for x in before if x) > 1e-5
        assert left == 2
        assert end == 0, "training ends on an average, in the middle of a period too"


def average_of(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """Awkward shapes, types and memory formats, in buckets that are smaller than some of them."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3,), (), (2, 3, 5, 5), (1000,), (0,), (7, 2)]
    mine = [torch.randn(shape, generator=generator) for shape in shapes]
    mine[2] = mine[2].to(memory_format=torch.channels_last)
    mine[4], mine[5] = mine[4].double(), mine[5].bfloat16()
    every = [None] * world_size
    dist.all_gather_object(every, mine)
    expected = [torch.stack([one[i].double() for one in every]).mean(0) for i in range(len(shapes))]
    away = sum(((a.double() - b) ** 2).sum() for a, b in zip(mine, expected, strict=True))
    types = [tensor.dtype for tensor in mine]
    squared = average_across_ranks(mine, bucket_bytes=400)
    right = all(
        torch.allclose(a.double(), b, rtol=0, atol=2e-2 if a.dtype == torch.bfloat16 else 1e-6)
        for a, b in zip(mine, expected, strict=True)
    )
    return right, torch.isclose(squared, away, rtol=1e-4).item(), types == [t.dtype for t in mine]


def test_the_average_is_that_of_all_ranks(gloo) -> None:
    assert gloo(3, average_of) == [(True, True, True)] * 3


class SaveAt(pl.Callback):
    """A checkpoint after some steps, as a checkpoint callback takes it; and what it holds, against the weights."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.spreads: list[float] = []
        self.same: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            path = self.folder / f"{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            self.spreads.append(spread(pl_module))
            saved = torch.load(path, weights_only=True)["state_dict"]
            self.same.append(all(torch.equal(value, saved[key]) for key, value in pl_module.state_dict().items()))


def broken_and_unbroken(
    rank: int,
    world_size: int,
    images: Path,
    folder: Path,
    options: dict[str, Any],
    optimizer: Callable[..., Any] | None,
) -> tuple[list[float], list[bool], list[str], list[int], float]:
    save, path = SaveAt(folder, SAVED_AT), folder / f"{SAVED_AT}.ckpt"
    data = [SimCLRDataModule(str(images), global_batch_size=BATCH, num_workers=0) for _ in range(2)]
    unbroken, first = model(optimizer), LocalSGD(**options)
    whole = train(rank, world_size, unbroken, first, save, data=data[0], precision="32-true")
    again, second = model(optimizer), LocalSGD(**options)
    resumed = train(rank, world_size, again, second, data=data[1], ckpt_path=path, precision="32-true")
    unequal = differences(dict(unbroken.state_dict()), dict(again.state_dict()))
    for one, other in ((whole.optimizers[0], resumed.optimizers[0]), (unbroken.probe.optimizer, again.probe.optimizer)):
        unequal += differences(one.state_dict(), other.state_dict(), "optimizer")
    unequal += differences(first.state_dict(), second.state_dict(), "callback")
    saved = torch.load(path, weights_only=True)["callbacks"]["LocalSGD"]
    phases = [saved["steps_since_average"], first.steps_since_average]
    return save.spreads, save.same, unequal, phases, distance(weights(unbroken.encoder), weights(model().encoder))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (sgd, {"period": 4}),
        (None, {"period": 4, "negatives": "local"}),
        (adam, {"period": 4, "start": 1, "outer": "nesterov"}),
    ],
)
def test_a_run_resumed_in_the_middle_of_a_period_is_the_unbroken_one(
    gloo, images: Path, tmp_path: Path, optimizer: Callable[..., Any] | None, options: dict[str, Any]
) -> None:
    expected = [(step - options.get("start", 0)) % options["period"] for step in (SAVED_AT, 10)]
    assert expected[0], "the checkpoint must lie within a period"
    results = gloo(2, broken_and_unbroken, images, tmp_path, options, optimizer)
    for spreads, same, unequal, phases, moved in results:
        assert spreads == [0]
        assert same == [True]
        assert unequal == []
        assert phases == expected
        assert moved > 1e-3


@pytest.mark.slow
def test_the_command_resumes_in_the_middle_of_a_period(images: Path, tmp_path: Path) -> None:
    """Two processes that the command starts; the broken run is the whole one without its later checkpoints."""
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "2")
    sync = ("--trainer.callbacks+=LocalSGD", "--trainer.callbacks.period", "4", "--knn.every_n_epochs", "1")
    saved = ("--checkpoint.every_n_steps", "2", "--checkpoint.keep", "20")
    options = arguments(images, tmp_path, "whole", *two, *sync, *saved)
    run_in_processes(*options)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for path in (tmp_path / "broken" / "checkpoints").iterdir():
        if path.name.partition(".ckpt")[0] not in ("step=2", "step=4", "step=6"):
            path.unlink()
    run_in_processes("--resume", "auto", "--runs_dir", str(tmp_path), "--name", "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    sent = json.loads((tmp_path / "whole" / "summary.json").read_text())["scaling"]["sent_bytes_by_part"]
    assert sent["gradients"] == sent["buffers"] == 0 < sent["averages"]
    with open(tmp_path / "whole" / "metrics.csv", newline="") as file:
        assert max(float(row["weight_spread"]) for row in csv.DictReader(file) if row["weight_spread"]) > 0


def run_in_processes(*options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simclr_scale", "pretrain", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def outer_steps(rank: int, world_size: int, momentum: float, rate: float) -> tuple[float, float]:
    """A round of DiLoCo after another, by hand, from the local weights at the end of each round."""
    ends: list[dict[str, Tensor]] = []

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step % 3 == 0:
                mine = {k: p.detach().clone() for k, p in pl_module.named_parameters() if not k.startswith("probe")}
                ends.append({k: all_gather(p[None]).mean(0) for k, p in mine.items()})

    module = model()
    outer = {k: p.detach().double().clone() for k, p in module.named_parameters()}
    velocity = {k: torch.zeros_like(p) for k, p in outer.items()}
    sync = LocalSGD(period=3, outer="nesterov", outer_learning_rate=rate, outer_momentum=momentum)
    train(rank, world_size, module, Ends(), sync)
    moved = 0.0
    for end in ends:
        for key, mean in end.items():
            change = outer[key] - mean
            velocity[key] = momentum * velocity[key] + change
            outer[key] = outer[key] - rate * (change + momentum * velocity[key])
            moved = max(moved, change.abs().max().item())
    final = {k: p.detach() for k, p in module.named_parameters()}
    return distance(final, outer), moved


@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 0.7), (0.0, 1.0)])
def test_the_outer_step_by_hand(gloo, momentum: float, rate: float) -> None:
    for away, moved in gloo(2, outer_steps, momentum, rate):
        assert away <= 1e-12
        assert moved > 1e-3


class Poison(pl.Callback):
    """A gradient that is not finite, on one rank."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            next(pl_module.parameters()).grad.fill_(torch.nan)


def with_a_bad_step(rank: int, world_size: int) -> tuple[int, float, bool]:
    from simclr_scale.pretraining.agreement import Agreement
    from simclr_scale.pretraining.bad_steps import BadSteps

    module, bad = model(), BadSteps(3)
    sync = LocalSGD(period=4, negatives="local")
    train(rank, world_size, module, Poison(), sync, Agreement(), bad, precision="32-true")
    return bad.total, spread(module), all(bool(value.isfinite().all()) for value in weights(module).values())


def test_a_bad_step_of_one_rank_is_skipped_by_all(gloo) -> None:
    assert gloo(2, with_a_bad_step) == [(1, 0.0, True)] * 2


def refused(rank: int, world_size: int, options: dict[str, Any], what: str) -> str:
    module = model(loss=VICRegLoss()) if what == "loss" else model()
    if what == "sharded":
        strategy = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1)
        trainer = pl.Trainer(accelerator="cpu", strategy=strategy, logger=False, enable_progress_bar=False)
        with mock.patch.object(pl.Trainer, "world_size", world_size), pytest.raises(InputError) as error:
            LocalSGD(**options).setup(trainer, module, "fit")
        return str(error.value)
    with pytest.raises(InputError) as error:
        train(rank, world_size, module, LocalSGD(**options), ddp={"static_graph": what == "static graph"})
    return str(error.value)


@pytest.mark.parametrize(
    ("world_size", "options", "what", "line"),
    [
        (1, {}, "", "LocalSGD needs several processes, whose weights it averages, and this run has one: add --trainer"),
        (2, {"start": 12}, "", "LocalSGD: start 12 lies beyond the end of training, which has 12 steps"),
        (2, {"negatives": "local"}, "loss", "needs a loss that can do without those of other ranks (NTXentLoss"),
        (2, {}, "static graph", "takes steps without a reduction, which static_graph of DDP forbids"),
        (2, {}, "sharded", "it needs --trainer.strategy ddp, and ModelParallelStrategy has none"),
    ],
)
def test_where_it_cannot_work(gloo, world_size: int, options: dict[str, Any], what: str, line: str) -> None:
    for message in gloo(world_size, refused, options, what):
        assert line in message


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"period": 0}, "period must be at least 1 step, got 0"),
        ({"period": -3}, "period must be at least 1 step, got -3"),
        ({"start": -1}, "start must be a number of steps from 0, got -1"),
        ({"outer": "adam"}, "outer must be null or nesterov, got 'adam'"),
        ({"negatives": "none"}, "negatives must be global or local, got 'none'"),
        ({"outer_learning_rate": 0.0}, "outer_learning_rate must be above 0, got 0.0"),
        ({"outer_momentum": 1.0}, "outer_momentum must be from 0 to below 1, got 1.0"),
    ],
)
def test_impossible_values(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        LocalSGD(**options)
