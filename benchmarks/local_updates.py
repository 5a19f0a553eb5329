"""Local updates: what local SGD saves in traffic and costs in accuracy, and the same of local losses and memory.

    python benchmarks/local_updates.py periods --source hfds/PATH --folder runs/local_updates \
        --output benchmarks/results/local_sgd_cpu.json
    python benchmarks/local_updates.py stages --source hfds/PATH --folder runs/local_updates \
        --output benchmarks/results/local_losses_cpu.json

Both train the recipe cifar10_tiny for a few epochs, once a setting and seed, and write a plot beside the JSON. A run
that is in --folder is not trained again, so a study that was broken off goes on; --runs 1 trains one more and stops.
The committed results are of --seeds 3, some two minutes a run on two cores. The full size, of the recipe's own length:

    python benchmarks/local_updates.py periods --source hfds/PATH --folder runs/full --output FILE \
        --epochs 8 --subset 10000 --batch 128 --seeds 3 --ranks 4

periods: bytes that leave one rank a step, seen by watching every collective of steps 2 to 65 on real processes, and
told apart into gradients or averages and the rest. stages: the peak of a step's allocations beyond weights and images,
from fake tensors, for the trained network and for a ResNet-50 at 224 px; accuracy by kNN on the held-out images, which
no training saw.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from measure import Claim, environment
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.local_losses import LocalLosses, staged_step
from simclr_scale.scaling.plan.footprint import Allocations

PERIODS = (1, 4, 16, 64)
HERE = Path(__file__).parent


def settings_of(study: str, ranks: int) -> dict[str, list[str]]:
    """Options of pretrain by the name of the setting; the first one is what the others are held against."""
    if study == "stages":
        local = ["--model.local_losses.expansion=256"]
        return {
            "end_to_end": [],
            "local": local,
            "local_overlap_1": [*local, "--model.local_losses.overlap=1"],
            "local_noise_0": [*local, "--model.local_losses.noise_std=0"],
        }
    ddp = [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    watch = "--trainer.callbacks+=collective_bytes.CollectiveBytes"

    def sync(period: int, *more: str) -> list[str]:
        return [*ddp, "--trainer.callbacks+=LocalSGD", f"--trainer.callbacks.period={period}", *more, watch]

    return {
        "ddp": [*ddp, watch],
        **{f"period_{period}": sync(period) for period in PERIODS},
        "period_16_local_negatives": sync(16, "--trainer.callbacks.negatives=local"),
        "period_16_nesterov": sync(16, "--trainer.callbacks.outer=nesterov"),
    }


def pretrain(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """The summary of a run, which is trained unless it is there; one that was broken off goes on."""
    summary = folder / name / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "simclr_scale", "pretrain", f"--runs_dir={folder}", f"--name={name}"]
        begun = (folder / name / "config.yaml").is_file()
        if begun and not (folder / name / "checkpoints" / "last.ckpt").is_file():
            raise SystemExit(f"{folder / name} has no checkpoint to go on from: remove it")
        rest = ["--resume=auto"] if begun else ["--config=cifar10_tiny", *options]
        print(f"training {name}", flush=True)
        subprocess.run([*command, *rest], check=True, stdout=subprocess.DEVNULL, env=_environment())
    return json.loads(summary.read_text())


def _environment() -> dict[str, str]:
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def peak(encoder_name: str, kwargs: dict[str, Any], local: LocalLosses | None, rows: int, side: int) -> int:
    """Bytes of a step's allocations at their most, beyond weights and images."""
    model = SimCLR(create_encoder(encoder_name, **kwargs), local_losses=local)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    store[key] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    with mode:
        x = torch.empty(rows, 3, side, side)
    with mode, Allocations([x, *model.parameters(), *model.buffers()]) as allocations:
        if local is None:
            model.loss(model.head(model(x))).backward()
        else:
            staged_step(model, x).loss.backward()
    return allocations.peak


def memory() -> dict[str, dict[str, int]]:
    """Peaks of a step by network and setting."""
    tiny = {"channels": [24, 48, 96]}
    networks = {"simclr_resnet_tiny, 128 images of 32 px": ("simclr_resnet_tiny", tiny, 256, 32, 256)}
    networks["simclr_resnet50, 32 images of 224 px"] = ("simclr_resnet50", {}, 64, 224, 2048)
    return {
        name: {
            "end_to_end": peak(encoder, kwargs, None, rows, side),
            "local": peak(encoder, kwargs, LocalLosses(expansion=wide), rows, side),
            "local_noise_0": peak(encoder, kwargs, LocalLosses(expansion=wide, noise_std=0), rows, side),
            "local_overlap_1": peak(encoder, kwargs, LocalLosses(expansion=wide, overlap=1), rows, side),
            "local_full_resolution": peak(
                encoder, kwargs, LocalLosses(expansion=wide, full_resolution=True), rows, side
            ),
        }
        for name, (encoder, kwargs, rows, side, wide) in networks.items()
    }


def _kept_peaks(folder: Path) -> dict[str, dict[str, int]]:
    file = folder / "peaks.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(memory(), indent=2))
    return json.loads(file.read_text())


def plot(path: Path, study: str, rows: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    key = "bytes_a_step" if study == "periods" else "peak_bytes"
    figure, axes = plt.subplots(figsize=(6, 4))
    for index, (name, row) in enumerate(rows.items()):
        top1 = [100 * value for value in row["knn_top1"]]
        x = row[key] / 1e6
        axes.errorbar(x, statistics.mean(top1), yerr=statistics.stdev(top1) if len(top1) > 1 else None, fmt="o")
        beside = (4, -10 if index % 2 else 4)
        axes.annotate(name, (x, statistics.mean(top1)), xytext=beside, textcoords="offset points", fontsize=7)
    if study == "periods":
        axes.set_xscale("log")
    axes.margins(x=0.3)  # for the names
    axes.set_xlabel("MB sent by a rank a step" if study == "periods" else "peak MB of a step beyond weights and images")
    axes.set_ylabel("kNN top-1, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["periods", "stages", "memory"], help="memory: of stages, without training")
    parser.add_argument("--source", help="CIFAR-10, as data.source")
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--subset", type=int, default=5_000, help="training images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the study of periods")
    parser.add_argument("--runs", type=int, help="train so many that are not there yet, and stop")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output} exists already")

    rows: dict[str, dict[str, Any]] = {}
    trained = 0
    if arguments.study != "memory" and arguments.source is None:
        raise SystemExit("--source is needed to train: CIFAR-10, as data.source")
    settings = settings_of(arguments.study, arguments.ranks) if arguments.study != "memory" else {}
    peaks = _kept_peaks(arguments.folder) if arguments.study != "periods" else {}
    for name, options in settings.items():
        rows[name] = {"knn_top1": [], "untrained": []}
        if arguments.study == "stages":
            rows[name]["peak_bytes"] = next(iter(peaks.values()))[name]
        for seed in range(arguments.seeds):
            sizes = (arguments.epochs, arguments.subset, arguments.batch, arguments.ranks, seed)
            run = "-".join(map(str, (arguments.study, name, *sizes)))
            if not (arguments.folder / run / "summary.json").is_file():
                if arguments.runs is not None and trained == arguments.runs:
                    raise SystemExit(f"trained {trained}; the same command goes on")
                trained += 1
            summary = pretrain(
                arguments.folder,
                run,
                *options,
                f"--data.source={arguments.source}",
                f"--data.subset={arguments.subset}",
                f"--data.global_batch_size={arguments.batch}",
                f"--trainer.max_epochs={arguments.epochs}",
                "--checkpoint.every_n_epochs=1",
                f"--seed_everything={seed}",
            )
            rows[name]["knn_top1"].append(summary["knn_top1"]["trained"])
            rows[name]["untrained"].append(summary["knn_top1"]["untrained"])
            rows[name]["counted_bytes_a_step"] = summary["scaling"]["sent_bytes_per_step"]
            if arguments.study == "periods":
                watched = summary["collective_bytes"]
                rows[name] |= {"bytes_a_step": watched["all"], "weight_bytes_a_step": watched["weights"]}
            rows[name]["steps"] = summary["steps"]
            print(name, rows[name], flush=True)
    finish(arguments, rows, peaks)


def finish(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]], peaks: dict[str, dict[str, int]]) -> None:
    (first, base), *others = rows.items() or [("", {})]
    claims = []
    if arguments.study == "periods":
        for name, row in others:
            ratio = base["weight_bytes_a_step"] / row["weight_bytes_a_step"]
            period = int(name.split("_")[1])
            # A period's average takes the place of its gradients, but running statistics travel with the weights.
            claims.append(
                Claim(
                    f"gradients (ddp) or averages ({name}) sent a step",
                    row["weight_bytes_a_step"],
                    base["weight_bytes_a_step"],
                    ratio,
                    0.9 * period,
                    (ratio, ratio),
                    "bytes",
                )
            )
    for network, peaks_of in peaks.items():
        ours, peer = peaks_of["local"], peaks_of["end_to_end"]
        ratio = peer / ours
        claims.append(Claim(f"peak of a step, {network}", ours, peer, ratio, 1.0, (ratio, ratio), "bytes"))
    for name, row in others:
        mean, base_mean = statistics.mean(row["knn_top1"]), statistics.mean(base["knn_top1"])
        ratio = mean / base_mean
        claims.append(Claim(f"kNN top-1, {name} beside {first}", mean, base_mean, ratio, None, (ratio, ratio), "top-1"))
    sizes = {key: getattr(arguments, key) for key in ("study", "epochs", "subset", "batch", "seeds", "ranks")}
    result = {
        "claims": [asdict(claim) for claim in claims],
        "sizes": sizes,
        "settings": rows,
        "peaks": peaks,
        "environment": environment(),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if rows:
        plot(arguments.output.with_suffix(".png"), arguments.study, rows)
    missed = [claim.name for claim in claims if not claim.holds]
    for claim in claims:
        print(f"{claim.name}: {claim.ours:.4g} beside {claim.peer:.4g} {claim.unit}, x{claim.ratio:.3g}")
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
