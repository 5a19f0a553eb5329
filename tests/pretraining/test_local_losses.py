"""Local losses: gradients against plain autograd, what they do not reach, memory, ranks, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from simclr_scale import load_encoder
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.local_losses import LocalLosses, StagedStep, staged_step
from simclr_scale.pretraining.local_simclr import LocalSimCLR
from simclr_scale.scaling.plan.footprint import Allocations
from tests.pretraining.runs import QUIET, KillAt, Killed, Pairs, arguments, assert_same_run, fit, pretrain
from tests.pretraining.test_ranks import Pool

STAGES, TEMPERATURE = 3, 0.2


def model(name: str = "simclr_resnet_tiny", *, overlap: int = 0, noise_std: float = 0.0, **options: Any) -> LocalSimCLR:
    torch.manual_seed(0)
    encoder = create_encoder(name, **({"channels": (4, 6, 8)} if name == "simclr_resnet_tiny" else {}))
    options = {"expansion": 10, "temperature": TEMPERATURE, "warmup_epochs": 0, **options}
    module = LocalSimCLR(encoder, overlap=overlap, noise_std=noise_std, **options)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return module


def views(count: int = 6, size: int = 16) -> Tensor:
    return torch.rand(2 * count, 3, size, size, generator=torch.Generator().manual_seed(1))


def loss_by_definition(z: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def plain(module: LocalSimCLR, x: Tensor, number: int, overlap: int) -> Tensor:
    """Loss `number` from 0 of the tiny network, cut by detach() before the stages that it must not reach."""
    net, local = module.encoder, module.local
    x = net.relu(net.bn1(net.conv1(x)))
    for stage, layer in enumerate((net.layer1, net.layer2, net.layer3)):
        x = layer(x.detach() if stage == number - overlap and stage > 0 else x)
        if stage == number:
            break
    if number == STAGES - 1:
        return loss_by_definition(module.head(x.mean((2, 3))))
    expansion = local.expansions[str(number)]
    pooled = F.avg_pool2d(x, 4 if number == 0 else 2)
    mixed = torch.einsum("bchw,oc->bohw", pooled, expansion.linear.weight[:, :, 0, 0])
    h = F.relu(expansion.norm(mixed)).mean((2, 3))
    return loss_by_definition(local.heads[str(number)](h))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_gradients_are_those_of_plain_autograd(overlap: int) -> None:
    ours, peer = model(overlap=overlap).double(), model(overlap=overlap).double()
    x = views().double()
    step = staged_step(ours, x)
    (3 * step.loss).backward()
    losses = {number + 1: plain(peer, x, number, overlap) for number in range(overlap, STAGES)}
    (3 * sum(losses.values())).backward()
    assert step.of_stages.keys() == losses.keys()
    for number, loss in losses.items():
        torch.testing.assert_close(step.of_stages[number], loss.detach(), rtol=0, atol=1e-12)
    expected, found = gradients(peer), gradients(ours)
    assert found.keys() == expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11, msg=name)


def test_all_stages_overlapping_is_end_to_end() -> None:
    ours = model(overlap=STAGES - 1)
    peer = SimCLR(create_encoder("simclr_resnet_tiny", channels=(4, 6, 8)), temperature=TEMPERATURE)
    peer.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("local.")})
    ours, peer, x = ours.double(), peer.double(), views().double()
    step = staged_step(ours, x)
    step.loss.backward()
    loss = peer.loss(peer.head(peer(x)))
    loss.backward()
    torch.testing.assert_close(step.loss.detach(), loss.detach(), rtol=0, atol=1e-12)
    found = gradients(ours)
    for name, value in gradients(peer).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
    for key, value in peer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=1e-12, msg=key)


class Only(nn.Module):
    """Of all losses, one that counts: the others are zero, whatever they are given."""

    def __init__(self, loss: nn.Module, counts: bool) -> None:
        super().__init__()
        self.loss, self.counts = loss, counts

    def forward(self, z: Tensor) -> Tensor:
        return self.loss(z) if self.counts else (z * 0).sum()


def stage_of(module: LocalSimCLR, name: str) -> int:
    """The stage that a parameter belongs to, its heads included."""
    if name.startswith("encoder."):
        return next(
            i for i, names in enumerate(module.local.stages.parameters) if name.removeprefix("encoder.") in names
        )
    return int(name.split(".")[2]) if name.startswith("local.") else STAGES - 1


@pytest.mark.parametrize("noise_std", [0.0, 0.25])
@pytest.mark.parametrize("overlap", [0, 1])
def test_a_loss_reaches_its_own_stage_and_the_shared_one_and_is_exactly_zero_elsewhere(
    overlap: int, noise_std: float
) -> None:
    for number in range(overlap, STAGES):
        module = model(overlap=overlap, noise_std=noise_std)
        for key, loss in module.local.losses.items():
            module.local.losses[key] = Only(loss, int(key) == number)
        module.loss = Only(module.loss, number == STAGES - 1)
        staged_step(module, views()).loss.backward()
        for name, gradient in gradients(module).items():
            stage = stage_of(module, name)
            in_reach = number - overlap <= stage <= number if name.startswith("encoder.") else stage == number
            largest = gradient.abs().max().item()
            # The head's batch norm takes away what shifts all features alike: a gradient of rounding.
            assert (largest > 1e-9) if in_reach else (largest == 0), f"loss {number}, {name}: {largest}"


def test_running_statistics_move_once() -> None:
    for overlap in (0, 1):
        module = model(overlap=overlap)
        staged_step(module, views()).loss.backward()
        counts = {int(b) for name, b in module.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts == {1}


def test_noise_is_in_the_measure_of_the_map_and_not_in_evaluation() -> None:
    module = model(noise_std=0.25)
    seen: dict[str, Tensor] = {}
    module.encoder.layer1.register_forward_hook(lambda m, given, y: seen.update(clean=y.detach().clone()))
    module.encoder.layer2.register_forward_pre_hook(lambda m, given: seen.update(noisy=given[0].detach().clone()))
    torch.manual_seed(3)
    staged_step(module, views(64))
    noise = seen["noisy"] - seen["clean"]
    assert noise.std().item() == pytest.approx(0.25 * seen["clean"].std().item(), rel=0.02)
    assert abs(noise.mean().item()) < 0.01 * seen["clean"].std().item()
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(views()), module.encoder(views()), rtol=0, atol=0)
        module(views())
    assert torch.equal(seen["clean"], seen["noisy"])


def test_a_gradient_scaler_changes_nothing() -> None:
    ours, peer = model().double(), model().double()
    step = staged_step(ours, views().double(), scale=1024.0)
    (step.loss * 1024).backward()
    staged_step(peer, views().double()).loss.backward()
    for name, value in gradients(peer).items():
        torch.testing.assert_close(gradients(ours)[name], value * 1024, rtol=1e-12, atol=0, msg=name)


def test_half_precision() -> None:
    ours, peer = model(overlap=1), model(overlap=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = staged_step(ours, views())
    step.loss.backward()
    exact = staged_step(peer, views())
    exact.loss.backward()
    assert step.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    ours_flat, peer_flat = (torch.cat([g.flatten() for g in gradients(m).values()]) for m in (ours, peer))
    assert ours_flat.dtype == torch.float32
    assert F.cosine_similarity(ours_flat, peer_flat, dim=0) > 0.98


def peak(module: SimCLR, x: Tensor) -> int:
    """Bytes that a step takes beyond weights and views, each storage counted while it lives."""
    with Allocations([x, *module.parameters(), *module.buffers()]) as allocations:
        if module.local is None:
            module.loss(module.head(module(x))).backward()
        else:
            staged_step(module, x).loss.backward()
    module.zero_grad()
    return allocations.peak


@pytest.mark.parametrize("name", ["simclr_resnet_tiny", "test_resnet", "test_efficientnet"])
def test_a_step_takes_less_memory_than_end_to_end(name: str) -> None:
    x = views(16, 64)
    none, one, full = (
        peak(LocalSimCLR(create_encoder(name), overlap=overlap, noise_std=0.0, expansion=128, full_resolution=f), x)
        for overlap, f in ((0, False), (1, False), (0, True))
    )
    whole = peak(SimCLR(create_encoder(name)), x)
    assert none < 0.9 * whole
    assert none < one
    assert none < full


def test_other_encoders_train() -> None:
    for name, partition in (("test_vit", 3), ("test_convnext", "stages"), ("test_efficientnet", "stages")):
        module = model(name, partition=partition, overlap=1, noise_std=0.25)
        size = module.encoder.pretrained_cfg["input_size"][-1]
        staged_step(module, views(3, size)).loss.backward()
        found = gradients(module)
        assert found.keys() == {key for key, p in module.named_parameters() if p.requires_grad}
        assert all(bool(value.isfinite().all()) for value in found.values())


class Kept(LocalSimCLR):
    """Keeps what the optimizer is given."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.kept = gradients(self)


IMAGES = 16


def on_ranks(rank: int, world_size: int, overlap: int) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
    module = Kept(
        encoder, overlap=overlap, noise_std=0.0, expansion=10, temperature=TEMPERATURE, warmup_epochs=0, loss_scale=2.0
    )
    share = IMAGES // world_size
    data = DataLoader(Subset(Pairs(IMAGES), range(rank * share, (rank + 1) * share)), batch_size=share)
    ddp = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo")
    fit(
        module,
        data=data,
        devices=world_size,
        strategy=ddp if world_size > 1 else "auto",
        precision="64-true",
        max_epochs=-1,
        max_steps=1,
        use_distributed_sampler=False,
    )
    torch.set_default_dtype(torch.float32)
    found = {**module.kept, **{f"buffer {k}": b.double() for k, b in module.named_buffers()}}
    return module.trainer.callback_metrics["loss"].item(), found


@QUIET
@pytest.mark.parametrize("overlap", [0, 1])
def test_two_ranks_are_one_process(gloo, overlap: int) -> None:
    [(loss, expected)] = gloo(1, on_ranks, overlap)
    for other, found in gloo(2, on_ranks, overlap):
        assert other == pytest.approx(loss, rel=1e-12)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=key)


LOCAL = ("--model.local_losses.overlap", "1", "--model.local_losses.expansion", "16", "--trainer.max_epochs", "2")


@QUIET
def test_the_command_resumes_and_its_encoder_loads(images: Path, tmp_path: Path) -> None:
    options = (*LOCAL, "--checkpoint.every_n_steps", "2")
    pretrain(arguments(images, tmp_path, "whole", *options))
    with pytest.raises(Killed):
        pretrain(arguments(images, tmp_path, "broken", *options), KillAt(7))
    pretrain(arguments(images, tmp_path, "broken", "--resume", "auto", *options))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    encoder, transform = load_encoder(tmp_path / "whole")
    assert encoder(torch.rand(2, *transform.config["input_size"])).shape == (2, 8)
    assert set(json.loads((tmp_path / "whole" / "summary.json").read_text())["knn_top1"]) >= {"trained"}
    header = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "loss_stage2", "loss_stage3"} <= set(header)
    assert "loss_stage1" not in header


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overlap": -1}, "overlap must be from 0 to 2, one less than there are stages, got -1"),
        ({"overlap": 3}, "overlap must be from 0 to 2, one less than there are stages, got 3"),
        ({"noise_std": -0.1}, "noise_std is out of range, got -0.1"),
        ({"expansion": 0}, "expansion is out of range, got 0"),
        ({"partition": ["layer9"]}, "SimCLRResNet has no module 'layer9'"),
        ({"chunk_size": 4}, "model.chunk_size does not go with model.local_losses; leave out one of them"),
        ({"compile": True}, "model.compile does not go with model.local_losses; leave out one of them"),
    ],
)
def test_impossible_values(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        model(**options)
    assert line in str(error.value)


def test_the_class_is_the_option() -> None:
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
    by_option = SimCLR(encoder, local_losses=LocalLosses(overlap=1, noise_std=0.0, expansion=10))
    assert by_option.state_dict().keys() == model(overlap=1).state_dict().keys()
    assert isinstance(staged_step(by_option, views()), StagedStep)
