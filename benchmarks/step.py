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
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from step_sides import (
    BARE,
    LIGHTLY,
    OURS,
    STABLE,
    TEMPERATURE,
    Experiment,
    create_encoder_of,
    raw_batch,
    sides_of,
)
from turns import Batches, Clock, Turns

from measure import Claim, alternate, arguments, bound, compare, environment, report
from simclr_scale import LARS, param_groups
from simclr_scale.data.augmentation import PRESETS
from simclr_scale.data.views import finish_views
from simclr_scale.losses import nt_xent

PEERS = {LIGHTLY: "lightly", STABLE: "stable_pretraining"}
TARGET_OVER_LIGHTLY = 1.15
TARGET_OVER_LIGHTLY_FP32 = 2.0
TARGET_OVER_BARE = 1 / 1.05


EXPERIMENTS = {
    "resnet18": Experiment("ResNet-18 at 32 px", "resnet18", 32, 32, "small"),
    "resnet50": Experiment("ResNet-50 at 224 px", "resnet50", 224, 8, "natural"),
}
IMAGES_ON_CUDA = {"resnet18": 512, "resnet50": 128}


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
