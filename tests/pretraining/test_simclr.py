"""The LightningModule by itself: on anyone's loader, and through its hooks."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simclr_scale.bundle import ImageTransform, save_encoder
from simclr_scale.errors import InputError
from simclr_scale.losses import SigmoidLoss, nt_xent
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.optim import LARS
from simclr_scale.pretraining import SimCLR
from tests.pretraining.runs import QUIET, Pairs, arguments, differences, fit, pretrain

pytestmark = QUIET


def module(seed: int = 0, channels: tuple[int, ...] = (4, 6, 8), **options: Any) -> SimCLR:
    torch.manual_seed(seed)
    return SimCLR(create_encoder("simclr_resnet_tiny", channels=channels), **{"warmup_epochs": 0, **options})


class Gradients(pl.Callback):
    """What the optimizer is given at each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


class Rates(pl.Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def configured(model: SimCLR, batch: int = 4096, steps_an_epoch: int = 312, epochs: int = 100) -> Any:
    """What ``configure_optimizers`` gives for a training of that shape."""
    model.trainer = SimpleNamespace(
        estimated_stepping_batches=steps_an_epoch * epochs,
        num_training_batches=steps_an_epoch,
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        train_dataloader=SimpleNamespace(batch_size=batch // 8),
        world_size=8,
    )
    return model.configure_optimizers()


# --- the step ---------------------------------------------------------------------------------------------------------


def test_a_step_on_anyones_loader() -> None:
    model, twin = module(temperature=0.3), module()
    rows = Gradients()
    trainer = fit(model, rows, max_steps=1)
    (v1, v2), _ = next(iter(DataLoader(Pairs(), batch_size=8)))
    loss = nt_xent(twin.head(twin.encoder(torch.cat([v1, v2]))), 0.3)
    loss.backward()
    assert trainer.callback_metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(rows.seen[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_scale_multiplies_gradients_only() -> None:
    plain, double = Gradients(), Gradients()
    losses = [
        fit(module(loss_scale=scale), rows, max_steps=1).callback_metrics["loss"].item()
        for scale, rows in ((1.0, plain), (2.0, double))
    ]
    assert losses[0] == losses[1]
    for name, gradient in plain.seen[0].items():
        torch.testing.assert_close(double.seen[0][name], 2 * gradient)


def test_own_head_and_loss() -> None:
    head = ProjectionHead(8, out_features=5, num_layers=3)
    assert module(head=head).head is head
    assert module(head=lambda width: nn.Linear(width, 3)).head.in_features == 8
    shapes: list[tuple[int, ...]] = []

    class Spread(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            shapes.append(tuple(z.shape))
            return z.square().mean()

    fit(module(head=head, loss=Spread()), max_steps=1)
    assert shapes == [(16, 5)]


def test_what_a_loss_learns_is_trained_without_decay_or_adaptation() -> None:
    loss = SigmoidLoss()
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    trainer = fit(module(loss=loss, weight_decay=0.1), max_epochs=2)
    for name, parameter in loss.named_parameters():
        assert not torch.equal(parameter, before[name])
    excluded = next(group for group in trainer.optimizers[0].param_groups if group["name"] == "excluded")
    assert {id(parameter) for parameter in loss.parameters()} <= {id(parameter) for parameter in excluded["params"]}


def test_logs_without_an_interval_for_rows() -> None:
    metrics = fit(module(), log_every_n_steps=0).callback_metrics
    assert set(metrics) == {"loss"}


def test_logs_accuracy_and_rate_where_a_row_is_written() -> None:
    metrics = fit(module(probe_classes=3), log_every_n_steps=3).callback_metrics
    assert set(metrics) == {"loss", "contrastive_accuracy", "learning_rate", "probe_loss", "probe_accuracy"}
    assert 0 <= metrics["contrastive_accuracy"] <= 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(precision: str) -> None:
    model = module(probe_classes=3)
    metrics = fit(model, precision=precision, log_every_n_steps=1).callback_metrics
    assert all(value.isfinite() for value in metrics.values())
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_channels_last() -> None:
    model, twin = module(channels_last=True), module()
    seen: list[bool] = []
    model.encoder.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    losses = [fit(m).callback_metrics["loss"].item() for m in (model, twin)]
    assert all(seen)
    assert model.encoder.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_chunks_are_for_training_alone() -> None:
    model = module(chunk_size=3)
    rows: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    x = torch.randn(8, 3, 16, 16)
    model.train()(x)
    assert rows == [3, 3, 2]
    model.eval()(x)
    assert rows == [3, 3, 2, 8]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile() -> None:
    # Inductor of torch 2.15 writes beyond its arrays on one thread where channels are no multiples of 8, also with
    # nn.Conv2d in place of our convolutions.
    model, twin = (module(channels=(8, 16, 32), compile=compiled) for compiled in (True, False))
    losses = [fit(m).callback_metrics["loss"].item() for m in (model, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_dropout_depends_on_the_seed_and_the_step_alone() -> None:
    """Not on what else draws random numbers, so that a resumed run repeats it."""

    class Disturbance(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.rand(7)

    def trained(seed: int, *callbacks: pl.Callback) -> dict[str, Tensor]:
        torch.manual_seed(0)
        encoder = create_encoder("test_vit", img_size=16, patch_size=8, drop_path_rate=0.5)
        torch.manual_seed(seed)
        model = SimCLR(encoder, head=ProjectionHead(encoder.num_features, out_features=8), warmup_epochs=0)
        model.head.load_state_dict(HEAD.state_dict())
        torch.manual_seed(seed)
        fit(model, *callbacks)
        return model.state_dict()

    torch.manual_seed(5)
    HEAD = ProjectionHead(64, out_features=8)
    first = trained(1)
    assert differences(first, trained(1, Disturbance())) == []
    assert differences(first, trained(2)) != []


# --- the optimizer and its learning rate ------------------------------------------------------------------------------


def test_lars_by_default() -> None:
    model = module(weight_decay=0.01)
    optimizer = configured(model)["optimizer"]
    assert isinstance(optimizer, LARS)
    assert (optimizer.defaults["momentum"], optimizer.defaults["trust_coefficient"]) == (0.9, 1e-3)
    assert not optimizer.defaults["nesterov"]
    settings = {group["name"]: (group["adapt"], group["weight_decay"]) for group in optimizer.param_groups}
    assert settings == {"adapted": (True, 0.01), "excluded": (False, 0.0)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    excluded = {names[id(parameter)] for parameter in optimizer.param_groups[1]["params"]}
    assert {"encoder.layer2.0.downsample.1.weight", "encoder.bn1.bias", "head.layers.0.1.weight"} <= excluded
    assert not any("conv" in name or name.endswith(".0.weight") for name in excluded)


def test_weight_decay_of_zero_leaves_adaptation_on() -> None:
    groups = configured(module(weight_decay=0.0))["optimizer"].param_groups
    assert [(group["name"], group["adapt"]) for group in groups] == [("adapted", True), ("excluded", False)]


def test_the_probe_is_not_in_the_optimizer() -> None:
    model = module(probe_classes=3)
    optimizer = fit(model, max_steps=1).optimizers[0]
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not any(id(parameter) in optimized for parameter in model.probe.parameters())
    assert optimized == {id(p) for part in (model.encoder, model.head) for p in part.parameters()}


def test_the_probe_influences_nothing() -> None:
    with_probe, without = module(probe_classes=3, learning_rate=3.0), module(learning_rate=3.0)
    for model in (with_probe, without):
        fit(model, max_epochs=2)
    assert with_probe.probe.classifier.weight.abs().max() > 0
    for part in ("encoder", "head"):
        assert differences(getattr(with_probe, part).state_dict(), getattr(without, part).state_dict()) == []


def test_a_resumed_probe_keeps_its_optimizer(tmp_path: Path) -> None:
    trainer = fit(module(probe_classes=3))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = module(probe_classes=3)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    again = pl.Trainer(max_epochs=2, enable_model_summary=False, **options)
    again.fit(model, DataLoader(Pairs(), batch_size=8), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [state["step"].item() for state in model.probe.optimizer.state.values()] == [6, 6]


def test_any_optimizer_is_given_groups_and_the_peak_rate() -> None:
    calls: list[tuple[list[dict[str, Any]], float]] = []

    def make(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        calls.append((groups, lr))
        return torch.optim.AdamW(groups, lr=lr)

    optimizer = configured(module(optimizer=make, learning_rate=0.01, weight_decay=0.1), batch=512)["optimizer"]
    ((groups, rate),) = calls
    assert rate == pytest.approx(0.01 * 512 / 256)
    assert [(group["weight_decay"], group["adapt"]) for group in groups] == [(0.1, True), (0.0, False)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_adamw_trains() -> None:
    model = module(optimizer=torch.optim.AdamW, learning_rate=0.3)
    before = model.encoder.conv1.weight.clone()
    trainer = fit(model, max_epochs=8)
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert not torch.equal(before, model.encoder.conv1.weight)
    assert trainer.callback_metrics["loss"] < 2.0 < math.log(15)


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_4096_images_give_4_8(scaling: Any) -> None:
    config = configured(module(lr_scaling=scaling, warmup_epochs=10))
    optimizer, schedule = config["optimizer"], config["lr_scheduler"]["scheduler"]
    assert config["lr_scheduler"]["interval"] == "step"
    rates = {}
    optimizer.step()
    for step in range(31_200):
        rates[step] = optimizer.param_groups[0]["lr"]
        schedule.step()
    assert rates[0] == 0.0
    assert rates[3120] == pytest.approx(4.8, rel=1e-12)
    assert max(rates.values()) == rates[3120]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12), "one step after the last"
    assert 0 < rates[31_199] < 1e-6


def test_the_rate_of_each_step_of_a_training() -> None:
    rates = Rates()
    fit(module(warmup_epochs=2, learning_rate=0.32), rates, max_epochs=6)
    peak = 0.32 * 8 / 256
    assert len(rates.seen) == 18
    assert rates.seen[:7] == pytest.approx([peak * step / 6 for step in range(7)])
    assert rates.seen[6:] == pytest.approx([peak * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)])


def test_steps_instead_of_epochs() -> None:
    rates = Rates()
    fit(module(warmup_epochs=1, learning_rate=0.32), rates, max_epochs=-1, max_steps=9)
    assert rates.seen[3] == max(rates.seen) == pytest.approx(0.01)
    assert rates.seen[-1] == pytest.approx(0.01 * (1 + math.cos(math.pi * 5 / 6)) / 2)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"warmup_epochs": 3}, {"max_epochs": 2}, "warm-up must have at least 0 steps and at most the 6 of training"),
        ({}, {"max_epochs": -1}, "training has no end"),
        ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches 2 .* model.chunk_size"),
    ],
)
def test_refused_before_training(options: dict[str, Any], trainer: dict[str, Any], message: str) -> None:
    rates = Rates()
    with pytest.raises(InputError, match=message):
        fit(module(**options), rates, **trainer)
    assert rates.seen == []


@pytest.mark.parametrize(
    ("data", "warmup_epochs", "message"),
    [
        (DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8)), batch_sampler=[[0, 1]]), 0, "batch size of this loader"),
        ((batch for batch in ()), 1, "no length"),
    ],
)
def test_loaders_that_tell_too_little(data: Any, warmup_epochs: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(module(warmup_epochs=warmup_epochs), data=data, max_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "model.chunk_size"),
        ({"warmup_epochs": -1}, "model.warmup_epochs"),
        ({"temperature": 0.0}, "model.temperature"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        module(**options)


def test_an_encoder_that_does_not_tell_its_width() -> None:
    with pytest.raises(InputError, match="Flatten does not tell the width of its features"):
        SimCLR(nn.Flatten())


# --- where the encoder starts -----------------------------------------------------------------------------------------


def test_init_from(tmp_path: Path) -> None:
    source = module(seed=3).encoder
    save_encoder(source, ImageTransform((3, 16, 16)), tmp_path / "bundle")
    model = module(seed=4, init_from=str(tmp_path / "bundle"))
    assert differences(model.encoder.state_dict(), source.state_dict()) == []


def test_init_from_is_strict(tmp_path: Path) -> None:
    save_encoder(module().encoder, ImageTransform((3, 16, 16)), tmp_path / "bundle")
    with pytest.raises(InputError, match=r"init_from .*bundle: .*layer3.0.downsample.1") as caught:
        SimCLR(create_encoder("simclr_resnet_tiny", channels=(4, 6, 10)), init_from=str(tmp_path / "bundle"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no encoder"):
        module(init_from=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            ("--model.encoder.name", "vit_tiny_patch16_224", "--model.encoder.img_size", "32"),
            r"3 x 16 x 16 \(data.image_size\)",
        ),
        (("--model.encoder.name", "simclr_resnet18", "--model.encoder.in_chans", "1"), "set .*in_chans to 3"),
    ],
)
def test_an_encoder_for_other_images(images: Path, tmp_path: Path, encoder: tuple[str, ...], message: str) -> None:
    options = (*encoder, "--model.encoder.channels", "null", "--trainer.max_epochs", "1")
    with pytest.raises(InputError, match=message):
        pretrain(arguments(images, tmp_path, "run", *options))
    assert not (tmp_path / "run").exists()


def test_trying_the_image_size_wakes_no_frozen_part(images: Path, tmp_path: Path) -> None:
    modes: list[bool] = []

    class Freeze(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
            pl_module.encoder.bn1.eval()

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            modes.extend((pl_module.encoder.bn1.training, pl_module.encoder.layer1[0].bn1.training))

    with pytest.warns(UserWarning, match=r"1 module\(s\) in eval mode"):
        pretrain(arguments(images, tmp_path, "run", "--trainer.max_epochs", "1"), Freeze())
    assert modes == [False, True] * 5
