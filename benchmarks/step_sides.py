"""The modules whose training steps `step.py` compares, and the batches that they take."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor, nn

from simclr_scale import SimCLR, create_encoder
from simclr_scale.data.augmentation import PRESETS, Augmentation
from simclr_scale.data.draws import draw_views
from simclr_scale.data.views import finish_views

OURS, LIGHTLY, STABLE, BARE = "ours", "lightly", "stable-pretraining", "bare"
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Experiment:
    """An architecture at an image size; `images` in a batch make twice as many views."""

    name: str
    resnet: str
    size: int
    images: int
    preset: str

    @property
    def small(self) -> bool:
        return self.size <= 64

    @property
    def width(self) -> int:
        return 2048 if self.resnet == "resnet50" else 512

    @property
    def label(self) -> str:
        return f"{self.name}, {2 * self.images} views"


class AugmentedSimCLR(SimCLR):
    """Ours with the device's part of the augmentation, which SimCLRDataModule does at this very place."""

    def __init__(self, augmentation: Augmentation, size: int, **kwargs: Any) -> None:
        super().__init__(create_encoder_of(**kwargs), temperature=TEMPERATURE, warmup_epochs=0, channels_last=True)
        self.augmentation, self.size = augmentation, size

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return finish_views(batch, self.augmentation, self.size)


def create_encoder_of(resnet: str, small: bool) -> nn.Module:
    return create_encoder(f"simclr_{resnet}", **({"small_images": True} if small else {}))


class BareEncoder(pl.LightningModule):
    """What no method of training this encoder can do without."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.channels_last)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encoder(batch.contiguous(memory_format=torch.channels_last)).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), lr=1e-3)


def lightly_module(experiment: Experiment) -> pl.LightningModule:
    from lightly.loss import NTXentLoss
    from lightly.models import ResNetGenerator
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.utils.lars import LARS as LightlyLARS
    from lightly.utils.scheduler import CosineWarmupScheduler

    class Lightly(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            if experiment.small:
                layers = list(ResNetGenerator(experiment.resnet.replace("resnet", "resnet-")).children())[:-1]
                self.backbone, width = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), experiment.width
            else:
                self.backbone = torchvision.models.get_model(experiment.resnet, weights=None)
                width = self.backbone.fc.in_features
                self.backbone.fc = nn.Identity()
            self.head = SimCLRProjectionHead(width, width, 128)
            self.criterion = NTXentLoss(temperature=TEMPERATURE)

        def embed(self, images: Tensor) -> Tensor:
            return self.head(self.backbone(images).flatten(1))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views, _ = batch
            pair = [self.embed(view) for view in views] if experiment.small else self.embed(torch.cat(views)).chunk(2)
            loss = self.criterion(*pair)
            self.log("loss", loss, prog_bar=True, batch_size=experiment.images)
            return loss

        def configure_optimizers(self) -> Any:
            steps = self.trainer.estimated_stepping_batches
            if experiment.small:
                sgd = torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
                return [sgd], [
                    {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps), "interval": "step"}
                ]
            decayed, others = get_weight_decay_parameters([self.backbone, self.head])
            lars = LightlyLARS(
                [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
                lr=0.075 * experiment.images**0.5,
                momentum=0.9,
                weight_decay=1e-6,
            )
            return [lars], [{"scheduler": CosineWarmupScheduler(lars, 0, steps), "interval": "step"}]

    return Lightly()


def stable_module(experiment: Experiment) -> Any:
    import stable_pretraining as spt
    from stable_pretraining.forward import simclr

    backbone = spt.backbone.from_torchvision(experiment.resnet, low_resolution=experiment.small)
    backbone.fc = nn.Identity()
    width = experiment.width
    head = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, 128, bias=False),
        nn.BatchNorm1d(128),
    )
    optimizer = partial(spt.optim.LARS, lr=0.075 * experiment.images**0.5, momentum=0.9, weight_decay=1e-6)
    return spt.Module(
        forward=simclr,
        backbone=backbone,
        projector=head,
        simclr_loss=spt.losses.NTXEntLoss(temperature=TEMPERATURE),
        optim={"optimizer": optimizer, "interval": "step"},
    )


def raw_batch(experiment: Experiment, device: str) -> dict[str, Tensor]:
    """Cropped views as our workers leave them, generated."""
    generator = torch.Generator().manual_seed(0)
    shape = (experiment.images, 2, 3, experiment.size, experiment.size)
    sizes = np.array([experiment.size, experiment.size])
    draws = draw_views(PRESETS[experiment.preset], 0, 0, range(experiment.images), sizes)
    batch = {
        "views": torch.randint(256, shape, generator=generator, dtype=torch.uint8),
        "draws": torch.from_numpy(draws),
        "label": torch.randint(10, (experiment.images,), generator=generator),
        "index": torch.arange(experiment.images),
    }
    return {name: value.to(device) for name, value in batch.items()}


def sides_of(experiment: Experiment, names: list[str], device: str) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Of each side what makes its module, and its batch, on the device already."""
    augmentation = PRESETS[experiment.preset]
    raw = raw_batch(experiment, device)
    views = finish_views(raw, augmentation, experiment.size)["inputs"]
    first, second = views.chunk(2)
    kwargs = {"resnet": experiment.resnet, "small": experiment.small}
    ours = partial(AugmentedSimCLR, augmentation, experiment.size, **kwargs)
    labelled = [{"image": view, "label": raw["label"]} for view in (first, second)]
    sides: dict[str, tuple[Callable[[], Any], Any]] = {
        f"{OURS} bf16": (ours, raw),
        OURS: (ours, raw),
        LIGHTLY: (partial(lightly_module, experiment), ([first, second], raw["label"])),
        STABLE: (partial(stable_module, experiment), {"views": labelled}),
        BARE: (lambda: BareEncoder(create_encoder_of(**kwargs)), views),
    }
    return {name: sides[name] for name in names}
