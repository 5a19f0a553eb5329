"""A whole SimCLR step on real processes equals one process with the whole batch, in float64."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.pretraining import SimCLR
from tests.pretraining.runs import QUIET, Pairs, arguments, fit, last_checkpoint, pretrain

IMAGES = 16
TEMPERATURE, LOSS_SCALE = 0.2, 2.0
# The head's batch norm takes away what shifts all features alike: a gradient of zero, but for rounding.
NO_GRADIENT = {"d encoder.norm.bias"}


class Pool(ClusterEnvironment):
    """Lets Lightning run in the processes of the test's pool, which are in their group already."""

    main_address, main_port = "localhost", 0
    creates_processes_externally = True

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world_size

    def set_world_size(self, size: int) -> None:
        assert size == self._world_size

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._rank

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0


def torchvision_resnet18() -> nn.Module:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.num_features = 512
    return network


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: create_encoder("simclr_resnet_tiny", channels=(4, 6, 8)),
    "selective kernels": lambda: create_encoder("simclr_resnet50", width=0.0625, sk_ratio=0.0625, small_images=True),
    "timm's ResNet-18": lambda: create_encoder("resnet18"),
    "torchvision's ResNet-18": torchvision_resnet18,
    "vision transformer": lambda: create_encoder("test_vit", img_size=16, patch_size=8),
}


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and head, batch norms at random: the last gamma of a block starts at 0, and gradients would be 0 too."""
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    head = ProjectionHead(int(encoder.num_features), hidden_features=12, out_features=7)
    for module in (*encoder.modules(), *head.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
    return encoder, head


def loss_by_definition(z: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def one_process(name: str, world_size: int, chunk_size: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, gradients and running statistics by plain torch; a chunk is that of all ranks together."""
    encoder, head = (network.double() for network in networks(name))
    views = Pairs(IMAGES).views.double()
    share = IMAGES // world_size
    ranks = [views[:, rank * share : (rank + 1) * share].flatten(0, 1) for rank in range(world_size)]
    count = math.ceil(2 * share / (chunk_size or 2 * share))
    chunks = zip(*(x.tensor_split(count) for x in ranks), strict=True)
    features = [encoder(torch.cat(chunk)).chunk(world_size) for chunk in chunks]
    h_by_rank = [torch.cat(parts).chunk(2) for parts in zip(*features, strict=True)]
    h = torch.cat([*(first for first, _ in h_by_rank), *(second for _, second in h_by_rank)])
    loss = loss_by_definition(head(h))
    (LOSS_SCALE * loss).backward()
    facts = {}
    for part, network in {"encoder": encoder, "head": head}.items():
        facts |= {f"d {part}.{key}": parameter.grad for key, parameter in network.named_parameters()}
        facts |= {f"{part}.{key}": buffer for key, buffer in network.named_buffers()}
    return loss.detach(), facts


class Step(SimCLR):
    """Keeps the gradients that the optimizer is given, and what dropout would draw."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients = {f"d {key}": p.grad.clone() for key, p in self.named_parameters() if p.grad is not None}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn = torch.rand(()).item()
        return super().training_step(batch, batch_idx)


def train_one_step(rank: int, world_size: int, name: str, options: dict[str, Any]) -> Step:
    encoder, head = networks(name)
    options = dict(options)
    ddp = options.pop("ddp", {})
    module = Step(encoder, head=head, temperature=TEMPERATURE, loss_scale=LOSS_SCALE, warmup_epochs=0, **options)
    share = IMAGES // world_size
    data = DataLoader(Subset(Pairs(IMAGES), range(rank * share, (rank + 1) * share)), batch_size=share)
    environment = Pool(rank, world_size)
    strategy = (
        DDPStrategy(cluster_environment=environment, process_group_backend="gloo", **ddp) if world_size > 1 else "auto"
    )
    fit(
        module,
        data=data,
        devices=world_size,
        strategy=strategy,
        precision="64-true",
        max_epochs=-1,
        max_steps=1,
        log_every_n_steps=1,
        use_distributed_sampler=False,
    )
    return module


def step_against_one_process(
    rank: int, world_size: int, name: str, options: dict[str, Any], oracle_chunks: bool
) -> tuple[float, float, dict[str, float]]:
    """Loss, what dropout would draw, and the relative error of every gradient and running statistic."""
    with torch.random.fork_rng():
        module = train_one_step(rank, world_size, name, options)
    torch.set_default_dtype(torch.float32)
    loss = module.trainer.callback_metrics["loss"].item()
    if rank > 0:
        return loss, module.drawn, {}
    expected_loss, expected = one_process(name, world_size, options.get("chunk_size") if oracle_chunks else None)
    buffers = {key: value for key, value in module.named_buffers() if not key.startswith("loss")}
    actual = {**module.gradients, **buffers}
    assert actual.keys() == expected.keys()
    errors = {"loss": abs(loss / expected_loss.item() - 1)}
    for key, value in expected.items():
        largest = value.abs().max().item()
        assert (largest > 1e-6) == (key not in NO_GRADIENT), f"{key} is at most {largest}"
        errors[key] = (actual[key] - value).abs().max().item() / (1 if key in NO_GRADIENT else largest)
    return loss, module.drawn, errors


@pytest.mark.parametrize(
    ("name", "world_size", "options", "oracle_chunks"),
    [
        *(("tiny", world_size, {}, False) for world_size in (1, 2, 4)),
        *(("tiny", world_size, {"chunk_size": 3}, True) for world_size in (1, 2)),
        ("tiny", 2, {"chunk_size": 3, "channels_last": True, "ddp": {"static_graph": True}}, True),
        ("tiny", 2, {"chunk_size": 3, "ddp": {"find_unused_parameters": True}}, True),
        ("tiny", 2, {"channels_last": True}, False),
        ("selective kernels", 2, {}, False),
        ("timm's ResNet-18", 2, {}, False),
        ("torchvision's ResNet-18", 2, {}, False),
        *(("vision transformer", world_size, {"chunk_size": 3}, False) for world_size in (1, 2)),
    ],
)
def test_step_equals_one_process(
    gloo, name: str, world_size: int, options: dict[str, Any], oracle_chunks: bool
) -> None:
    results = gloo(world_size, step_against_one_process, name, options, oracle_chunks)
    losses, draws, errors = zip(*results, strict=True)
    assert len(set(losses)) == 1, "the value must be the same on every rank"
    assert len(set(draws)) == world_size, "no two ranks may share their dropout"
    wrong = {key: error for key, error in errors[0].items() if not error <= 1e-10}
    assert wrong == {}


def step_with_local_batch_norm(rank: int, world_size: int) -> dict[str, float]:
    with mock.patch("simclr_scale.pretraining.simclr.convert_global_batch_norm", lambda module, group: module):
        return step_against_one_process(rank, world_size, "tiny", {}, False)[2]


def test_the_check_catches_local_batch_norm(gloo) -> None:
    errors = gloo(2, step_with_local_batch_norm)[0]
    assert errors["loss"] > 1e-3
    assert all(error > 1e-3 for key, error in errors.items() if key.startswith("d "))


@QUIET
@pytest.mark.slow
def test_the_command_on_two_processes(images: Path, tmp_path: Path) -> None:
    """Two gloo processes that the command starts itself, against one."""
    options = ("--trainer.max_epochs", "2", "--knn.every_n_epochs", "1")
    pretrain(arguments(images, tmp_path, "one", *options))
    command = [sys.executable, "-m", "simclr_scale", "pretrain", *arguments(images, tmp_path, "two", *options)]
    result = subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("What to try next") == 1, "rank 0 speaks for all"
    assert "Warning" not in result.stderr

    one, two = (last_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 10
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-5, atol=1e-5, msg=key)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["knn_top1"] == summaries[1]["knn_top1"]
    assert [summary["devices"] for summary in summaries] == [1, 2]
