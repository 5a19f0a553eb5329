"""Whole SimCLR training steps in PyTorch Lightning: ours, lightly's, stable-pretraining's, and the bare encoder step.

Every side trains in a Trainer of its own with the same settings, batch and precision. The trainers run in threads that
hand on the turn after every batch, so that the sides alternate step by step; a step is all that its thread does from
the end of one batch to the end of the next: loader, zero_grad, forward, backward, optimizer, schedule, logging.

  ours       SimCLR on simclr_resnet*, channels-last, LARS; the COLOUR AUGMENTATION of both views is in the step
  lightly    its benchmark modules, from lightly's public parts, on views that are augmented already: at 224 px
             torchvision's ResNet-50, one forward, LARS (benchmarks/imagenet); at 32 px its own ResNet-18, a forward a
             view, SGD (its CIFAR-10 benchmark)
  stable-pretraining  its Module with its SimCLR forward and loss (a forward a view) and its LARS, torchvision's
             ResNets, on views that are augmented already
  bare       forward and backward of our encoder, the mean square of its features as loss, plain SGD, no head

No side has an online probe, a logger, a progress bar or a callback but the clock (and the one that
stable-pretraining's Module logs through). The peers augment with PIL in the loader's workers: on a machine whose cores
all train, that time comes on top of theirs, and crops (in our workers too) on top of both.

The defaults take some ten minutes of one thread of an AVX2 processor and 9 GB, which each thread's allocator keeps for
itself; `--quick` takes a minute and is good for a look only. What LARS costs is the same at every batch: its share
falls as 1 / batch.
"""

import argparse
import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchvision
from torch import Tensor, nn

from measure import Claim, alternate, arguments, bound, compare, environment, report
from simclr_scale import LARS, SimCLR, create_encoder, param_groups
from simclr_scale.data.augmentation import PRESETS, Augmentation
from simclr_scale.data.draws import draw_views
from simclr_scale.data.views import finish_views
from simclr_scale.losses import nt_xent

OURS, LIGHTLY, STABLE, BARE = "ours", "lightly", "stable-pretraining", "bare"
PEERS = {LIGHTLY: "lightly", STABLE: "stable_pretraining"}
TARGET_OVER_LIGHTLY = 1.15
TARGET_OVER_LIGHTLY_FP32 = 2.0
TARGET_OVER_BARE = 1 / 1.05
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


EXPERIMENTS = {
    "resnet18": Experiment("ResNet-18 at 32 px", "resnet18", 32, 32, "small"),
    "resnet50": Experiment("ResNet-50 at 224 px", "resnet50", 224, 8, "natural"),
}
IMAGES_ON_CUDA = {"resnet18": 512, "resnet50": 128}


class Turns:
    """Lets threads run one at a time, in turn, each as long as it likes."""

    def __init__(self, names: list[str]) -> None:
        self._waiting = list(names)
        self._changed = threading.Condition()
        self._failed = False

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._waiting[0] == name)
            if self._failed:
                raise RuntimeError("another side has failed")

    def hand_on(self) -> None:
        with self._changed:
            self._waiting.append(self._waiting.pop(0))
            self._changed.notify_all()

    def retire(self, name: str, failed: bool) -> None:
        with self._changed:
            self._waiting.remove(name)
            self._failed = self._failed or failed
            self._changed.notify_all()


class Clock:
    """Seconds of every step of one side: of its thread on the CPU, between events on CUDA."""

    def __init__(self, name: str, turns: Turns, device: str) -> None:
        self.name, self.turns, self.device = name, turns, device
        self.seconds: list[float] = []

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._from = time.thread_time()

    def stop(self) -> None:
        if self.device == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            self.seconds.append(self._event.elapsed_time(end) / 1e3)
        else:
            self.seconds.append(time.thread_time() - self._from)

    def on_train_start(self, *_: Any) -> None:
        self.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.stop()
        self.turns.hand_on()
        self.turns.wait(self.name)
        self.start()


class Batches:
    """A loader that yields one batch again and again."""

    def __init__(self, batch: dict[str, Any] | tuple[Any, ...], images: int, count: int) -> None:
        self.batch, self.batch_size, self.count = batch, images, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield dict(self.batch) if isinstance(self.batch, dict) else self.batch


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


def trainer_for(module: Any, clock: Clock, precision: str) -> Any:
    """A Trainer of the Lightning that the module is of: stable-pretraining's is `lightning`, not pytorch_lightning."""
    if isinstance(module, pl.LightningModule):
        trainer, callback = pl.Trainer, pl.Callback
    else:
        from lightning.pytorch import Callback as callback
        from lightning.pytorch import Trainer as trainer
    # Clock's hooks come first in the order of methods, Lightning's empty ones after.
    timed = type("TimedSteps", (Clock, callback), {})(clock.name, clock.turns, clock.device)
    timed.seconds = clock.seconds
    made = trainer(
        accelerator="gpu" if clock.device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        callbacks=[timed],
    )
    # stable-pretraining hangs fourteen callbacks (hardware monitor, progress, ...) on every Trainer of `lightning`; its
    # Module logs through one of them, the others are no part of the step.
    made.callbacks = [callback for callback in made.callbacks if _belongs_to_step(callback, timed)]
    return made


def _belongs_to_step(callback: Any, timed: Any) -> bool:
    return callback is timed or type(callback).__name__ == "ModuleRegistryCallback"


def train_in_turns(
    experiment: Experiment, precisions: dict[str, str], rounds: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each side after `warmup` steps that do not count."""
    names = list(precisions)
    turns = Turns(names)
    sides = sides_of(experiment, names, device)
    clocks = {name: Clock(name, turns, device) for name in names}
    errors: list[BaseException] = []

    def run(name: str) -> None:
        failed = True
        try:
            torch.set_num_threads(1)  # this setting is the thread's own
            turns.wait(name)
            make, batch = sides[name]
            torch.manual_seed(0)
            module = make()
            trainer = trainer_for(module, clocks[name], precisions[name])
            trainer.fit(module, Batches(batch, experiment.images, warmup + rounds))
            failed = False
        except BaseException as error:
            errors.append(error)
        finally:
            turns.retire(name, failed)

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: clock.seconds[warmup:] for name, clock in clocks.items()}


def parts_of_our_step(experiment: Experiment, device: str, step: float) -> list[Claim]:
    """Seconds of what our step adds to the encoder's, each part called directly, as shares of the step."""
    augmentation = PRESETS[experiment.preset]
    raw = raw_batch(experiment, device)
    encoder = create_encoder_of(experiment.resnet, experiment.small).to(device, memory_format=torch.channels_last)
    optimizer = LARS(param_groups(encoder, 1e-6), lr=0.1)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    z = torch.randn(2 * experiment.images, 128, device=device, requires_grad=True)
    parts = {
        "colour augmentation": lambda: finish_views(raw, augmentation, experiment.size),
        "NT-Xent, forward and backward": lambda: nt_xent(z, TEMPERATURE).backward(),
        "LARS": optimizer.step,
    }
    times = alternate(parts, rounds=7, warmup=2, device=device)
    return [
        bound(f"{experiment.label}: share of our step in {part}", 100 * min(seconds) / step, None, "%")
        for part, seconds in times.items()
    ]


def measure(experiment: Experiment, options: argparse.Namespace, precision: str, bf16: bool) -> list[Claim]:
    precisions = {OURS: precision, **dict.fromkeys(options.peers, precision), BARE: precision}
    if bf16 and precision == "32-true" and options.device == "cpu":
        precisions[f"{OURS} bf16"] = "bf16-mixed"
    recorded = train_in_turns(experiment, precisions, options.rounds * options.runs, options.warmup, options.device)
    runs = [
        {name: seconds[i * options.rounds : (i + 1) * options.rounds] for name, seconds in recorded.items()}
        for i in range(options.runs)
    ]

    def rate(peer: str, target: float | None, ours: str = OURS) -> Claim:
        times = compare("", runs, ours, peer, target=target, per_call=1.0)
        views = 2 * experiment.images
        name = f"{experiment.label}: {ours} {precisions[ours]} against {peer} {precisions[peer]}"
        return replace(times, name=name, ours=views / times.ours, peer=views / times.peer, unit="views/s")

    claims = [rate(BARE, TARGET_OVER_BARE if experiment.resnet == "resnet50" else None)]
    if LIGHTLY in precisions:
        claims.append(rate(LIGHTLY, TARGET_OVER_LIGHTLY))
        if f"{OURS} bf16" in precisions:
            claims.append(rate(LIGHTLY, TARGET_OVER_LIGHTLY_FP32, f"{OURS} bf16"))
    if STABLE in precisions:
        claims.append(rate(STABLE, None))
    return claims + parts_of_our_step(experiment, options.device, min(recorded[OURS]))


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by instructions of its own (AVX512-BF16 or AMX)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def parse() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=list(EXPERIMENTS), help="one of the two experiments (default: both)")
    for name, experiment in EXPERIMENTS.items():
        parser.add_argument(
            f"--{name}-images",
            type=int,
            metavar="N",
            help=f"images in a batch, {experiment.name}; default {experiment.images}, on cuda {IMAGES_ON_CUDA[name]}",
        )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side in a run; the fastest counts (7)")
    parser.add_argument("--warmup", type=int, default=1, help="first steps of each side, not counted (1)")
    parser.add_argument("--precision", help="Lightning's, of all sides; default 32-true, on cuda bf16-mixed")
    parser.add_argument("--quick", action="store_true", help="tiny batches and few steps; no figure to quote")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.runs = 2, 1
        options.resnet18_images, options.resnet50_images = 4, 2
    for name in ("runs", "rounds", "resnet18_images", "resnet50_images"):
        if (value := getattr(options, name)) is not None and value < (2 if "images" in name else 1):
            parser.error(f"--{name.replace('_', '-')} is too small: {value}")
    options.peers = [name for name, package in PEERS.items() if find_spec(package)]
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Lightning's on loaders without workers, on logging nowhere
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in PEERS:
        if name not in options.peers:
            print(f"{name} is not installed and left out; it comes with: pip install 'simclr-scale[bench]'")
    if STABLE in options.peers:
        with contextlib.suppress(ImportError):
            from loguru import logger

            logger.disable("stable_pretraining")
    precision = options.precision or ("bf16-mixed" if options.device == "cuda" else "32-true")
    bf16 = cpu_has_bf16()
    notes = []
    if options.device == "cpu" and not bf16:
        notes.append(
            f"not evaluated: {TARGET_OVER_LIGHTLY_FP32:g} times lightly's fp32 rate in bf16, because this processor "
            "has neither AVX512-BF16 nor AMX"
        )
    packages = ["torchvision", "pytorch-lightning", "timm", *PEERS]
    facts = environment(packages, device=options.device)
    claims: list[Claim] = []
    status = 0
    for key, experiment in EXPERIMENTS.items():
        if options.only not in (None, key):
            continue
        default = IMAGES_ON_CUDA[key] if options.device == "cuda" else experiment.images
        images = getattr(options, f"{key}_images") or default
        claims += measure(replace(experiment, images=images), options, precision, bf16)
        # After each experiment, so that a run that is cut off leaves what it has.
        status = report(claims, facts, options.output, notes=notes, rounds=options.rounds, precision=precision)
    for note in notes:
        print(note)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
