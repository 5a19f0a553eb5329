"""What encoding in chunks saves in memory and costs in time, and a step on 4,096 images within 8 GB.

    PYTHONPATH=. python benchmarks/chunked.py --output benchmarks/results/chunked_cpu.json
    PYTHONPATH=. python benchmarks/chunked.py --step --output benchmarks/results/chunked_step_cpu.json
    PYTHONPATH=. python benchmarks/chunked.py --device cuda --output benchmarks/results/chunked_cuda.json
    PYTHONPATH=. python benchmarks/chunked.py --step --device cuda --output benchmarks/results/chunked_step_cuda.json

Memory: ResNet-18 on 96-px images, two views each, features -> sum of squares -> backward, so that nothing but the
encoder counts. The peak is that of torch's own allocations beyond those alive before; the images are not in it, the
gradients of the parameters are. A line without them takes their bytes from both sides. On the CPU the same is said of
the resident set of fresh processes.

Time: fewer images, since a second forward costs the same share of any number; but the last chunk is not encoded twice,
so that k chunks cost (4k - 1) / 3k of one forward and backward of the whole, near 4/3 for many.

`--step`, minutes on a CPU: instead of these, one training step of SimCLR, ResNet-18 with the stem for small images on
4,096 generated images of 32 px, from uint8 images by way of views, loss and backward to LARS, under Lightning, in a
fresh process whose peak is that of everything, Python and torch included. What single chunks cost there is in the file
too.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from measure import Claim, alternate, arguments, bound, compare, environment, peak_memory, report
from simclr_scale.models import create_encoder
from simclr_scale.models.chunked import encode_in_chunks

MB = 1e6
IMAGE_SIZE = 96
MEMORY_VIEWS, TIME_VIEWS = 512, 128
CHUNK = 32
MOST_OF_UNCHUNKED = 12.0  # per cent

STEP_IMAGES, STEP_SIZE = 4096, 32
STEP_CHUNK = 256
STEP_CHUNKS_TRIED = (64, 128, 256)
STEP_LIMIT_MB = 8000.0


def features_and_backward(encoder: nn.Module, encode: Callable[[], Tensor]) -> Callable[[], None]:
    def work() -> None:
        encoder.zero_grad(set_to_none=True)
        encode().square().sum().backward()

    return work


def sides(encoder: nn.Module, images: Tensor, chunk_size: int) -> dict[str, Callable[[], None]]:
    return {
        "chunked": features_and_backward(encoder, lambda: encode_in_chunks(encoder, images, chunk_size)),
        "unchunked": features_and_backward(encoder, lambda: encoder(images)),
    }


def resnet18(device: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet18", **kwargs)
    return encoder.to(device, memory_format=torch.channels_last).train()


def random_images(views: int, size: int, device: str) -> Tensor:
    return torch.randn(views, 3, size, size, device=device).to(memory_format=torch.channels_last)


def peaks(encoder: nn.Module, images: Tensor, chunk_size: int, device: str) -> tuple[float, float]:
    """MB of chunked and unchunked; no gradients are there beforehand."""
    found = []
    for work in sides(encoder, images, chunk_size).values():
        encoder.zero_grad(set_to_none=True)
        found.append(peak_memory(work, device) / MB)
    return found[0], found[1]


def memory_claims(device: str) -> list[Claim]:
    encoder = resnet18(device)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters()) / MB
    claims = []
    for views in (MEMORY_VIEWS, MEMORY_VIEWS // 2):
        ours, whole = peaks(encoder, random_images(views, IMAGE_SIZE, device), CHUNK, device)
        limit = MOST_OF_UNCHUNKED if views == MEMORY_VIEWS else None
        name = f"peak of {views} views at {IMAGE_SIZE} px, chunk {CHUNK}"
        claims += [
            bound(f"{name}: share of unchunked", 100 * ours / whole, limit, "%"),
            bound(
                f"{name}: the same without gradients of parameters",
                100 * (ours - gradients) / (whole - gradients),
                limit,
                "%",
            ),
            Claim(f"{name}: against unchunked", ours, whole, whole / ours, None, (whole / ours,) * 2, "MB"),
        ]
    return claims


def resident_claim() -> Claim:
    ours, whole = (child("resident", side=side)["beyond_mb"] for side in ("chunked", "unchunked"))
    name = f"growth of the resident set, {MEMORY_VIEWS} views, chunk {CHUNK}, against unchunked"
    return Claim(name, ours, whole, whole / ours, None, (whole / ours,) * 2, "MB")


def resident(side: str) -> dict[str, float]:
    """To be called in a fresh process."""
    encoder, images = resnet18("cpu"), random_images(MEMORY_VIEWS, IMAGE_SIZE, "cpu")
    before = peak_resident_mb()
    sides(encoder, images, CHUNK)[side]()
    return {"before_mb": before, "beyond_mb": peak_resident_mb() - before}


def peak_resident_mb() -> float:
    """Not getrusage's, which a process inherits from the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / MB


def time_claim(device: str, runs: int) -> Claim:
    encoder, images = resnet18(device), random_images(TIME_VIEWS, IMAGE_SIZE, device)
    work = sides(encoder, images, CHUNK)
    results = [alternate(work, rounds=3, device=device) for _ in range(runs)]
    return compare(f"{TIME_VIEWS} views in {TIME_VIEWS // CHUNK} chunks", results, "chunked", "unchunked")


def chunks_tried(device: str) -> list[dict[str, float]]:
    """Peak and rate of forward and backward by the size of a chunk, for the step's encoder."""
    encoder = resnet18(device, small_images=True)
    images = random_images(2 * max(STEP_CHUNKS_TRIED), STEP_SIZE, device)
    tried = []
    for chunk_size in STEP_CHUNKS_TRIED:
        # The first chunk of these views is encoded twice, the second is the last and is not: both are alive in turn.
        work = features_and_backward(
            encoder, lambda size=chunk_size: encode_in_chunks(encoder, images[: 2 * size], size)
        )
        (seconds,) = alternate({"": work}, rounds=1, warmup=0 if device == "cpu" else 3, device=device)[""]
        encoder.zero_grad(set_to_none=True)
        tried.append(
            {
                "chunk_size": chunk_size,
                "views_per_second": 2 * chunk_size / seconds,
                "peak_mb": peak_memory(work, device) / MB,
            }
        )
    return tried


def step(device: str, chunk_size: int) -> dict[str, float]:
    """To be called in a fresh process."""
    import pytorch_lightning as pl

    from simclr_scale import SimCLR, SimCLRDataModule

    warnings.filterwarnings("ignore", module="pytorch_lightning")
    data = SimCLRDataModule("textures", global_batch_size=STEP_IMAGES, image_size=STEP_SIZE, num_workers=0)
    encoder = create_encoder("simclr_resnet18", small_images=True)
    model = SimCLR(encoder, chunk_size=chunk_size, channels_last=True, warmup_epochs=0)
    before = [parameter.detach().clone() for parameter in model.encoder.parameters()]
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    moved = sum(not torch.equal(old, new.cpu()) for old, new in zip(before, model.encoder.parameters(), strict=True))
    facts = {
        "loss": float(trainer.callback_metrics["loss"]),
        "steps": trainer.global_step,
        "parameters_moved": moved / len(before),
        "peak_resident_mb": peak_resident_mb(),
    }
    if device == "cuda":
        facts["peak_device_mb"] = torch.cuda.max_memory_allocated() / MB
    return facts


def child(what: str, **options: Any) -> dict[str, float]:
    """Runs a function of this file in a fresh process."""
    command = [sys.executable, __file__, "--child", what, "--options", json.dumps(options)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return facts


def main(options: argparse.Namespace) -> int:
    facts: dict[str, Any] = {}
    if not options.step:
        claims = memory_claims(options.device)
        if options.device == "cpu":
            claims.append(resident_claim())
        claims.append(time_claim(options.device, options.runs))
    else:
        facts["chunks_tried"] = chunks_tried(options.device)
        facts["step"] = child("step", device=options.device, chunk_size=STEP_CHUNK)
        assert facts["step"]["steps"] == 1
        peak = facts["step"]["peak_device_mb" if options.device == "cuda" else "peak_resident_mb"]
        name = f"a step on {STEP_IMAGES} images at {STEP_SIZE} px, chunk {STEP_CHUNK}: peak of the process"
        claims = [bound(name, peak, STEP_LIMIT_MB, "MB")]
    return report(claims, environment(["timm", "pytorch-lightning"], device=options.device), options.output, **facts)


if __name__ == "__main__":
    parser = arguments(str(__doc__))
    parser.add_argument("--step", action="store_true", help="only the training step on 4,096 images; minutes on a CPU")
    parser.add_argument("--child", choices=("resident", "step"), help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.device == "cpu":
        torch.set_num_threads(1)
    if parsed.child is not None:
        print(json.dumps({"resident": resident, "step": step}[parsed.child](**parsed.options)))
        sys.exit()
    sys.exit(main(parsed))
