"""The callback in real trainings."""

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.errors import InputError
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.logger import RunLogger
from simclr_scale.scaling.noise_scale import GradientNoiseScale
from simclr_scale.scaling.noise_scale.estimates import gram_of, probe_estimate
from tests.gloo_pool import GlooPool
from tests.pretraining.runs import QUIET, fit
from tests.pretraining.test_ranks import Pool

pytestmark = QUIET


def simclr() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(create_encoder("simclr_resnet_tiny", channels=(4, 6, 8)), warmup_epochs=0, probe_classes=0)


def trained(*callbacks: pl.Callback, **options: Any) -> tuple[SimCLR, Any]:
    model = simclr()
    data = SimCLRDataModule("textures", global_batch_size=16, image_size=16, preset="small", subset=64)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )
    trainer.fit(model, datamodule=data)
    return model, trainer


def test_training_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    plain, _ = trained()
    for mode in ("probe", "jackknife"):
        callback = GradientNoiseScale(mode, every_n_steps=1, batches=2)
        measured, _ = trained(callback, logger=RunLogger(tmp_path / mode))
        for key, value in plain.state_dict().items():
            assert torch.equal(value, measured.state_dict()[key]), (mode, key)
        assert [row["step"] for row in callback.history] == [0, 1, 2]
        with open(tmp_path / mode / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["0", "1", "2"]
        assert all(float(row["noise_scale_noise"]) > 0 for row in rows)
        assert callback.facts()["noise_scale"]["mode"] == mode


def test_a_measurement_is_that_of_its_definition() -> None:
    callback = GradientNoiseScale(every_n_steps=10, batches=3, smoothing=0.0)
    trained(callback, max_steps=1)
    (found,) = callback.history
    model = simclr().train()
    data = SimCLRDataModule("textures", global_batch_size=16, image_size=16, preset="small", subset=64)
    data.setup()
    from simclr_scale.scaling.noise_scale.measuring import independent_batches

    gradients, seen = [], []
    for views in independent_batches(data, 16, 3, torch.device("cpu")):
        model.zero_grad()
        model.loss(model.head(model(views))).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        seen.append(views)
    expected = probe_estimate(gram_of(gradients), 16)
    assert found["gradient_squared"] == pytest.approx(expected.signal, rel=1e-4)
    assert found["noise_of_one_image"] == pytest.approx(expected.noise, rel=1e-4)
    assert not torch.equal(seen[0], seen[1])


class Regression(pl.LightningModule):
    """A loss that is a mean over images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return squared_error(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def squared_error(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(module.layer(x)[:, 0], y)


def regression_loader(rank: int = 0, ranks: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    y = x.sum(1) + 0.1 * torch.randn(256, generator=generator)
    return DataLoader(TensorDataset(x[rank::ranks], y[rank::ranks]), batch_size=8)


def test_another_module_by_its_own_loss() -> None:
    torch.manual_seed(0)
    with pytest.raises(InputError, match="how Regression makes its loss is not known; give loss_of"):
        fit(Regression(), GradientNoiseScale(), data=regression_loader())
    callback = GradientNoiseScale(every_n_steps=100, batches=16, loss_of=squared_error)
    fit(Regression(), callback, data=regression_loader())
    assert callback.history[0]["noise_scale"] > 0


def per_rank_on(rank: int, world_size: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    callback = GradientNoiseScale("per_rank", every_n_steps=1, smoothing=0.9)
    strategy = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo")
    ranks = {"strategy": strategy, "devices": world_size, "use_distributed_sampler": False}
    fit(Regression(), callback, data=regression_loader(rank, world_size), **ranks)
    return callback.history


def test_per_rank_under_ddp(gloo: GlooPool) -> None:
    first, second = gloo(2, per_rank_on)
    assert [row["step"] for row in first] == list(range(16))
    assert first == second
    # the same from the batches themselves, at the same, unchanging weights
    torch.manual_seed(0)
    module = Regression()
    loader = regression_loader()
    x, y = loader.dataset.tensors
    assert first[0]["noise_of_one_image"] > 0

    def squares(rows: Tensor) -> tuple[float, Tensor]:
        gradient = torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(squared_error(module, (x[rows], y[rows])), list(module.parameters()))
            ]
        )
        return float(gradient.square().sum()), gradient

    local, gradients = zip(*(squares(torch.arange(256)[rank::2][:8]) for rank in range(2)), strict=True)
    whole = float(torch.stack(gradients).mean(0).square().sum())
    assert first[0]["gradient_squared"] == pytest.approx((16 * whole - 8 * sum(local) / 2) / 8, rel=1e-4)


def test_refusals() -> None:
    with pytest.raises(InputError, match="per_rank compares the gradients of ranks, and there is one"):
        trained(GradientNoiseScale("per_rank"))
    with pytest.raises(InputError, match="batches must be at least 2, got 1"):
        GradientNoiseScale(batches=1)
    with pytest.raises(InputError, match="there is no 'rank'"):
        GradientNoiseScale("rank")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="smoothing must be from 0 to below 1"):
        GradientNoiseScale(smoothing=1.0)


def test_the_average_goes_on_after_a_restart() -> None:
    one, two = GradientNoiseScale(every_n_steps=1, batches=2), GradientNoiseScale(every_n_steps=1, batches=2)
    trained(one)
    two.load_state_dict(one.state_dict())
    assert two.history == one.history
    assert two._smooth.state() == one._smooth.state()
