"""Two 224-px views of photographs: what one core makes of them, against torchvision's PIL recipe and lightly.

    python benchmarks/views.py --data FOLDER --output benchmarks/results/views_cpu.json
    python benchmarks/views.py --data FOLDER --device cuda --output benchmarks/results/views_cuda.json

FOLDER holds JPEG photographs, at best of 400 px and more; without --data they are those of clothing/train in the folder
that SIMCLR_SCALE_TEST_DATA names. Times are of one thread, from the file on.

On the CPU:
- "worker side": what one of our loader's processes does, which decodes once and cuts both crops; the rest is the
  device's. The peers do everything in the worker.
- "whole augmentation": the same, with our colours and blur on the same core.
- "packed": the worker side on images that `simclr-scale prepare` has packed at 256 px, against the recipe on the files.

On CUDA a ResNet-50 trains in bfloat16 from a packed copy, with workers: the share of the step in which the device has
no batch, the share that flip, jitter, grey and blur take of it, and the views a second from end to end.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torchvision import transforms

from measure import Claim, alternate, arguments, bound, compare, environment, report
from simclr_scale import SimCLR, SimCLRDataModule, create_encoder
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import Source
from simclr_scale.data.sources.base import SubsetSource
from simclr_scale.data.views import ViewsDataset, finish_views
from simclr_scale.errors import InputError
from simclr_scale.pretraining.data_wait import DataWait

SIZE = 224
PACKED_SIZE = 256
IMAGES = 32
ROUNDS = 5


def recipe() -> Callable[[Image.Image], torch.Tensor]:
    """The augmentation of SimCLR as it is written with torchvision on PIL images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            transforms.ToTensor(),
        ]
    )


def load(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def pil_recipe(paths: list[str]) -> list[torch.Tensor]:
    """A loader's item is one view, so that an image is read once for each."""
    transform = recipe()
    return [transform(load(path)) for path in paths for _ in range(2)]


def lightly_recipe(paths: list[str]) -> list[list[torch.Tensor]]:
    """As lightly's data sets do it: decoded once, then both views."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=SIZE)
    return [transform(load(path)) for path in paths]


def lightly_transform(images: list[Image.Image]) -> list[list[torch.Tensor]]:
    """Not even decoding."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=SIZE)
    return [transform(image) for image in images]


def worker_side(dataset: ViewsDataset, indices: list[int]) -> dict[str, Any]:
    return dataset.__getitems__([Key(0, index) for index in indices])


def whole(dataset: ViewsDataset, indices: list[int]) -> dict[str, Any]:
    return finish_views(worker_side(dataset, indices), dataset.augmentation, SIZE)


def views_of(folder: Path) -> ViewsDataset:
    data = SimCLRDataModule(str(folder), image_size=SIZE)
    source = data.open_part("train")
    data.settle(source)
    return data.views_of(source)


def pack(folder: Path, output: Path) -> bool:
    """`simclr-scale prepare`, where this version has it."""
    try:
        from simclr_scale.cli.prepare import main as prepare
    except ImportError:
        return False
    prepare(["--data.source", str(folder), "--output", str(output), "--size", str(PACKED_SIZE)])
    return True


def on_cpu(folder: Path, runs: int) -> tuple[list[Claim], dict[str, Any]]:
    torch.set_num_threads(1)
    dataset = views_of(folder)
    indices = np.random.default_rng(0).choice(len(dataset), IMAGES, replace=False).tolist()
    paths = [dataset.source.describe(index) for index in indices]
    images = [load(path) for path in paths]
    sides: dict[str, Callable[[], Any]] = {
        "worker": partial(worker_side, dataset, indices),
        "whole": partial(whole, dataset, indices),
        "recipe": partial(pil_recipe, paths),
        "lightly": partial(lightly_recipe, paths),
        "lightly, decoded": partial(lightly_transform, images),
    }
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        if pack(folder, packed):
            from_pack = views_of(packed)
            sides["packed"] = partial(worker_side, from_pack, indices)
        else:
            print("this version has no `simclr-scale prepare`: the claim about packed images is left out")
        measured = []
        for run in range(runs):
            random.seed(run)
            torch.manual_seed(run)
            measured.append(alternate(sides, rounds=ROUNDS))
    claim = partial(compare, runs=measured, unit="ms an image", per_call=1e3 / IMAGES)
    claims = [
        claim("worker side, against torchvision's PIL recipe", ours="worker", peer="recipe", target=10.0),
        claim("worker side, against lightly's SimCLRTransform", ours="worker", peer="lightly", target=6.0),
        claim(
            "worker side with decoding, against lightly's SimCLRTransform without",
            ours="worker",
            peer="lightly, decoded",
        ),
        claim("whole augmentation, against torchvision's PIL recipe", ours="whole", peer="recipe", target=3.5),
        claim("whole augmentation, against lightly's SimCLRTransform", ours="whole", peer="lightly", target=1.8),
    ]
    if "packed" in sides:
        name = "worker side from packed images, against torchvision's PIL recipe on the files"
        claims.append(claim(name, ours="packed", peer="recipe", target=15.0))
    widths, heights = zip(*(image.size for image in images), strict=True)
    facts = {"images": IMAGES, "mean_width": float(np.mean(widths)), "mean_height": float(np.mean(heights))}
    return claims, facts


class Repeated(SimCLRDataModule):
    """Few images for a long epoch, and a clock on the device's part of the augmentation."""

    def __init__(self, *args: Any, repeats: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.repeats = repeats
        self.augmentation_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def open_part(self, split: Any) -> Source:
        source = super().open_part(split)
        return SubsetSource(source, np.tile(np.arange(len(source)), self.repeats)) if split == "train" else source

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        after.record()
        self.augmentation_events.append((before, after))
        return batch


class StepClock(pl.Callback):
    """Events at the end of every step."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)


class LastWait(pl.Callback):
    """The wait clock at the end of the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds = warmup, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.warmup:
            torch.cuda.synchronize()
            self.seconds = trainer.datamodule.wait_clock.seconds  # type: ignore[attr-defined]


def on_cuda(folder: Path, runs: int, batch: int, steps: int, workers: int | None) -> tuple[list[Claim], dict[str, Any]]:
    warmup = 20
    waits, augmentations, rates = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed"
        source = packed if pack(folder, packed) else folder
        for _ in range(runs):
            images = len(SimCLRDataModule(str(source)).open_part("train"))
            repeats = -(-(warmup + steps + 1) * batch // images)
            data = Repeated(str(source), global_batch_size=batch, image_size=SIZE, num_workers=workers, repeats=repeats)
            module = SimCLR(create_encoder("simclr_resnet50"), warmup_epochs=0, probe_classes=0, channels_last=True)
            clock, last = StepClock(), LastWait(warmup)
            trainer = pl.Trainer(
                accelerator="gpu",
                devices=1,
                precision="bf16-mixed",
                max_steps=warmup + steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=warmup,
                use_distributed_sampler=False,
                callbacks=[clock, last, DataWait()],
            )
            trainer.fit(module, datamodule=data)
            torch.cuda.synchronize()
            seconds = clock.events[warmup - 1].elapsed_time(clock.events[-1]) / 1e3
            augmenting = sum(a.elapsed_time(b) for a, b in data.augmentation_events[warmup:]) / 1e3
            waits.append((data.wait_clock.seconds - last.seconds) / seconds)
            augmentations.append(augmenting / seconds)
            rates.append(2 * batch * steps / seconds)
    least = 1e-6  # of a share, so that there is a ratio
    claims = [
        bound("share of the step without a batch", max(waits), 0.02, "of it", [0.02 / max(w, least) for w in waits]),
        bound(
            "share of the augmentation in the step",
            max(augmentations),
            0.03,
            "of it",
            [0.03 / a for a in augmentations],
        ),
        Claim(
            "views a second, ResNet-50 at 224 px in bfloat16, end to end",
            ours=min(rates),
            peer=5000.0,
            ratio=min(rates) / 5000,
            target=1.0,
            spread=(min(rates) / 5000, max(rates) / 5000),
            unit="views/s",
        ),
    ]
    return claims, {"global_batch_size": batch, "steps": steps, "workers": data.worker_count()}


def find_photographs(given: Path | None, parser: argparse.ArgumentParser) -> Path:
    if given is not None:
        return given
    test_data = os.environ.get("SIMCLR_SCALE_TEST_DATA")
    if test_data is None:
        parser.error("give --data FOLDER, or set SIMCLR_SCALE_TEST_DATA to a folder with clothing/")
    return Path(test_data) / "clothing"


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="photographs, as a source of `simclr-scale`")
    parser.add_argument("--batch", type=int, default=512, help="images in a step, on CUDA")
    parser.add_argument("--steps", type=int, default=100, help="measured steps, on CUDA")
    parser.add_argument("--workers", type=int, help="processes that decode, on CUDA; default: one a core, up to 8")
    options = parser.parse_args()
    folder = find_photographs(options.data, parser)
    try:
        if options.device == "cuda":
            claims, facts = on_cuda(folder, options.runs, options.batch, options.steps, options.workers)
        else:
            claims, facts = on_cpu(folder, options.runs)
    except InputError as error:
        parser.error(str(error))
    packages = ("torchvision", "pillow", "simplejpeg", "lightly", "numpy")
    return report(claims, environment(packages, device=options.device), options.output, **facts)


if __name__ == "__main__":
    sys.exit(main())
