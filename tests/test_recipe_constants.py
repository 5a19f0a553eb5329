"""The recipes for ImageNet and CIFAR-10 as the command line builds them, against the constants of SimCLR.

The numbers are those of google-research/simclr (commit 383d414: run.py, resnet.py, model.py, data_util.py,
lars_optimizer.py) and of Chen et al. 2020, sections 2 and 4, appendices A and B. Instances are looked at, not the YAML:
a default that changes is seen too.
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from simclr_scale.cli.pretrain import PretrainCLI
from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.color import blur_kernel_size
from simclr_scale.data.draws import Draw, draw_views
from simclr_scale.losses import NTXentLoss
from simclr_scale.models import ProjectionHead
from simclr_scale.models.resnet import BasicBlock, Bottleneck, SimCLRResNet
from simclr_scale.optim import LARS

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

IMAGENET_TRAIN = 1_281_167
TRUNCATED_STD = 0.87962566103423978  # of a unit normal cut at 2: Keras' VarianceScaling divides by it


def instantiate(recipe: str, folder: Path, **trainer: str) -> Any:
    arguments = ["--config", recipe, "--data.source", str(folder), "--runs_dir", str(folder), "--name", "run"]
    for key, value in {"accelerator": "cpu", "devices": "1", **trainer}.items():
        arguments += [f"--trainer.{key}", value]
    with mock.patch.dict(os.environ):
        return PretrainCLI(arguments)


def with_a_trainer(cli: Any, num_images: int) -> Any:
    """What ``setup`` and ``configure_optimizers`` ask of Lightning, for a data set of that size."""
    steps = num_images // cli.datamodule.global_batch_size
    cli.datamodule.image_size = cli.datamodule.requested_image_size
    cli.datamodule.channels = 3
    cli.model.trainer = SimpleNamespace(
        datamodule=cli.datamodule,
        accumulate_grad_batches=1,
        world_size=1,
        max_epochs=cli.trainer.max_epochs,
        max_steps=-1,
        limit_train_batches=1.0,
        num_training_batches=steps,
        estimated_stepping_batches=steps * cli.trainer.max_epochs,
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    cli.model.setup("fit")
    return cli


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("imagenet")
    return with_a_trainer(instantiate("imagenet_resnet50", folder, strategy="auto"), IMAGENET_TRAIN)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return with_a_trainer(instantiate("cifar10", tmp_path_factory.mktemp("cifar10")), 50_000)


def rates(cli: Any) -> tuple[Any, list[float]]:
    """The optimizer, and the learning rate of each step of the whole training and the one after."""
    config = cli.model.configure_optimizers()
    assert config["lr_scheduler"]["interval"] == "step"
    optimizer, schedule = config["optimizer"], config["lr_scheduler"]["scheduler"]
    peak, factor = schedule.base_lrs[0], schedule.lr_lambdas[0]
    return optimizer, [peak * factor(step) for step in range(cli.model.trainer.estimated_stepping_batches + 1)]


def draws(augmentation: Augmentation, size: int) -> Any:
    """Columns of 4,000 draws for square images."""
    return draw_views(augmentation, 0, 0, range(2000), torch.tensor([size, size]).numpy()).reshape(4000, -1).T


# --- ImageNet: the augmentation ---------------------------------------------------------------------------------------


def test_imagenet_augmentation(imagenet: Any) -> None:
    assert imagenet.datamodule.augmentation == Augmentation(
        crop_scale=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=0.8,
        strength=1.0,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        brightness_mode="multiplicative",
        grey=0.2,
        blur=0.5,
        blur_sigma=(0.1, 2.0),
        color_ops="google",
        crop_sampling="google",
        evaluation_crop=0.875,
    )


def test_imagenet_draws(imagenet: Any) -> None:
    """What those settings come to, in 4,000 views."""
    columns = draws(imagenet.datamodule.augmentation, 300)
    for flag, probability in {Draw.FLIP: 0.5, Draw.JITTER: 0.8, Draw.GREY: 0.2, Draw.BLUR: 0.5}.items():
        assert columns[flag].mean() == pytest.approx(probability, abs=0.03)
    ranges = {
        Draw.BRIGHTNESS: (0.2, 1.8),
        Draw.CONTRAST: (0.2, 1.8),
        Draw.SATURATION: (0.2, 1.8),
        Draw.HUE: (-0.2, 0.2),
    }
    for column, (low, high) in {**ranges, Draw.SIGMA: (0.1, 2.0)}.items():
        assert low <= columns[column].min() < low + 0.01
        assert high - 0.01 < columns[column].max() <= high + 1e-6
    assert set(columns[Draw.ORDER]) == set(range(24))
    share = columns[Draw.HEIGHT] * columns[Draw.WIDTH] / 300**2
    assert share.min() > 0.08
    assert share.max() <= 1


def test_imagenet_images(imagenet: Any) -> None:
    data = imagenet.datamodule
    assert (data.global_batch_size, data.image_size) == (4096, 224)
    assert blur_kernel_size(data.image_size) == 23
    assert imagenet.model.transform.config == {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }


# --- ImageNet: the network --------------------------------------------------------------------------------------------


def test_imagenet_encoder(imagenet: Any) -> None:
    encoder = imagenet.model.encoder
    assert isinstance(encoder, SimCLRResNet)
    assert [len(getattr(encoder, stage)) for stage in encoder.stages] == [3, 4, 6, 3]
    assert all(isinstance(block, Bottleneck) for stage in encoder.stages for block in getattr(encoder, stage))
    assert (encoder.num_features, encoder.conv1.kernel_size, encoder.conv1.stride) == (2048, (7, 7), (2, 2))
    assert not isinstance(encoder.maxpool, nn.Identity)
    # Post-activation: a block ends with ReLU, after the sum.
    assert encoder(torch.randn(2, 3, 64, 64)).min() >= 0


def test_imagenet_batch_norm(imagenet: Any) -> None:
    norms = {name: m for name, m in imagenet.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert len(norms) == 53 + 2
    for name, norm in norms.items():
        assert (norm.momentum, norm.eps) == (0.1, 1e-5)
        assert norm.track_running_stats
        assert torch.all(norm.weight == (0 if name.endswith("bn3") else 1)), name
        assert norm.bias is None or torch.all(norm.bias == 0)


def test_imagenet_initialisation(imagenet: Any) -> None:
    convolutions = [m for m in imagenet.model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 53
    for convolution in convolutions:
        assert convolution.bias is None
        weight = convolution.weight.detach().double()
        scale = math.sqrt(1 / weight[0].numel()) / TRUNCATED_STD
        assert 1.9 * scale < weight.abs().max() <= 2 * scale * (1 + 1e-6)
        deviation, count = scale * TRUNCATED_STD, weight.numel()
        assert weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))
        assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(count)


def test_imagenet_head(imagenet: Any) -> None:
    head = imagenet.model.head
    assert isinstance(head, ProjectionHead)
    hidden, last = head.layers
    assert [type(module) for module in hidden] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(module) for module in last] == [nn.Linear, nn.BatchNorm1d]
    assert (hidden[0].weight.shape, last[0].weight.shape) == ((2048, 2048), (128, 2048))
    assert hidden[0].bias is None
    assert last[0].bias is None
    assert hidden[1].bias is not None
    assert last[1].bias is None, "the last batch norm has no beta"
    for linear in (hidden[0], last[0]):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)


# --- ImageNet: the loss and the optimizer -----------------------------------------------------------------------------


def test_imagenet_loss(imagenet: Any) -> None:
    assert isinstance(imagenet.model.loss, NTXentLoss)
    assert (imagenet.model.loss.temperature, imagenet.model.loss.gather) == (0.1, True)
    assert imagenet.model.loss_scale == 2.0
    assert imagenet.model.chunk_size is None


def test_imagenet_schedule(imagenet: Any) -> None:
    assert imagenet.trainer.max_epochs == 100
    _, seen = rates(imagenet)
    steps_an_epoch = 312
    assert len(seen) == 100 * steps_an_epoch + 1
    assert seen[0] == 0.0
    warmup = 10 * steps_an_epoch
    assert max(seen) == seen[warmup] == pytest.approx(0.3 * 4096 / 256) == pytest.approx(4.8)
    assert seen[warmup // 2] == pytest.approx(2.4)
    assert seen[warmup + (len(seen) - 1 - warmup) // 2] == pytest.approx(2.4)
    assert seen[-2] < 1e-6
    assert seen[-1] == pytest.approx(0.0, abs=1e-12)


def test_imagenet_lars(imagenet: Any) -> None:
    optimizer, _ = rates(imagenet)
    assert type(optimizer) is LARS
    adapted, excluded = optimizer.param_groups
    for group in (adapted, excluded):
        assert (group["momentum"], group["trust_coefficient"], group["nesterov"]) == (0.9, 1e-3, False)
    assert (adapted["adapt"], adapted["weight_decay"]) == (True, 1e-6)
    assert (excluded["adapt"], excluded["weight_decay"]) == (False, 0.0)
    # Convolutions and the head's matrices on the one side; gamma and beta, and nothing else, on the other.
    assert {p.dim() for p in adapted["params"]} == {2, 4}
    assert {p.dim() for p in excluded["params"]} == {1}
    assert len(adapted["params"]) == 53 + 2
    assert len(excluded["params"]) == 2 * (53 + 2) - 1
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for part in (imagenet.model.encoder, imagenet.model.head) for p in part.parameters()
    )


def test_lars_has_the_learning_rate_inside_its_buffer(imagenet: Any) -> None:
    """Two steps of the recipe's optimizer by hand: v = .9 v + lr * trust * (g + wd * p), p = p - v."""
    template, _ = rates(imagenet)
    settings = {key: template.param_groups[0][key] for key in ("momentum", "weight_decay", "trust_coefficient")}
    p = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = LARS([p], lr=0.0, **settings)
    value, velocity = p.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for rate, gradient in ((4.8, [0.6, 0.8]), (0.1, [1.0, -2.0])):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decayed = p.grad + 1e-6 * value
        velocity = 0.9 * velocity + rate * 1e-3 * value.norm() / decayed.norm() * decayed
        value = value - velocity
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=0)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def test_cifar10_augmentation(cifar10: Any) -> None:
    assert cifar10.datamodule.augmentation == Augmentation(
        strength=0.5, blur=0.0, color_ops="google", crop_sampling="google", evaluation_crop=1.0
    )
    columns = draws(cifar10.datamodule.augmentation, 32)
    assert columns[Draw.BLUR].max() == 0
    for column in (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION):
        assert 0.6 <= columns[column].min() < 0.61
        assert 1.39 < columns[column].max() <= 1.4 + 1e-6
    assert abs(columns[Draw.HUE]).max() == pytest.approx(0.1, abs=1e-3)
    assert cifar10.model.transform.config["input_size"] == (3, 32, 32)
    assert cifar10.model.transform.config["crop_pct"] == 1.0


def test_cifar10_encoder(cifar10: Any) -> None:
    encoder = cifar10.model.encoder
    assert [len(getattr(encoder, stage)) for stage in encoder.stages] == [2, 2, 2, 2]
    assert all(isinstance(block, BasicBlock) for stage in encoder.stages for block in getattr(encoder, stage))
    stem = encoder.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert isinstance(encoder.maxpool, nn.Identity)
    assert (encoder.num_features, cifar10.model.head.out_features) == (512, 128)


def test_cifar10_training(cifar10: Any) -> None:
    assert (cifar10.model.loss.temperature, cifar10.model.loss_scale) == (0.5, 2.0)
    assert (cifar10.datamodule.global_batch_size, cifar10.trainer.max_epochs) == (512, 1000)
    optimizer, seen = rates(cifar10)
    assert type(optimizer) is LARS
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert max(seen) == seen[10 * 97] == pytest.approx(2.0)
