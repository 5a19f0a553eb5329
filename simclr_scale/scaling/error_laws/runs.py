"""What a finished run, and a manifest of its evaluation, say for a scaling law."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from simclr_scale.bundle import load_encoder
from simclr_scale.errors import InputError
from simclr_scale.pretraining.run_folder import CONFIG

Measure = Literal["knn", "linear", "loss"]

_SUMMARY = "summary.json"
# Of what was logged, the end that a training loss is averaged over: one batch's alone is noise.
_LAST_SHARE = 0.1
_PASSES = 3  # forward, and backward twice its arithmetic
_VIEWS = 2
# Settings of a run that its results do not depend on, or that stand under other names.
_NOT_TOLD = ("trainer", "checkpoint", "knn", "threads", "max_bad_steps", "data.num_workers", "data.in_memory")
_TOLD_OF_TRAINER = ("trainer.precision", "trainer.limit_train_batches")


class RunPoint(NamedTuple):
    """The fields of a `Point`."""

    name: str
    x: float
    y: float
    conditions: dict[str, Any]
    settings: dict[str, Any]


def read_run(folder: Path, axis: str, measure: Measure, *, manifest: Path | None = None) -> RunPoint:
    """The point of one run.

    On the axis ``params`` x is the encoder's parameters, on ``data`` the training images, on ``compute`` the arithmetic
    of the encoder in the whole training: 3 forward passes of 2 views of all images seen, two FLOP for each product and
    sum.

    Args:
        manifest: the evaluation that gives y; else, for ``linear``, the one that lies in the folder.

    Raises:
        InputError: it is no finished run, or was not measured so.
    """
    summary = _json(folder / _SUMMARY, "it is no run, or one that has not ended")
    config = _config(folder)
    seen = summary["steps"] * summary["global_batch_size"]
    y, conditions = _measured(folder, summary, config, measure, manifest)
    encoder, transform = load_encoder(str(folder))
    params = sum(parameter.numel() for parameter in encoder.parameters())
    if axis == "params":
        x: float = params
        conditions |= {"data": summary["train_images"], "images seen": seen}
    elif axis == "data":
        x = summary["train_images"]
        conditions |= {"encoder": config.get("model", {}).get("encoder")}
    else:
        x = float(_PASSES * _VIEWS * seen) * _forward_flop(encoder, transform.config["input_size"])
    kept = "model.encoder" if axis in ("params", "compute") else "data.subset"
    settings = {key: value for key, value in _flat(config) if _is_told(key) and not key.startswith(kept)}
    if axis == "compute":
        settings.pop("data.subset", None)
    return RunPoint(folder.absolute().name, x, y, conditions, settings)


def run_of_manifest(path: Path) -> Path:
    """The run whose encoder a manifest is about."""
    spec = _encoder_spec(_json(path, "it is no manifest"), path)
    folder = Path(spec)
    if not (folder / _SUMMARY).is_file():
        raise InputError(
            f"{path}: its encoder {spec!r} is no finished run that lies here; run fit-law where linear was"
        )
    return folder


def _encoder_spec(content: Mapping[str, Any], path: Path) -> str:
    encoder = content.get("encoder")
    if not isinstance(encoder, Mapping) or "task" not in content:
        raise InputError(f"{path}: it is no manifest of an evaluation: it has no entry 'encoder' or 'task'")
    return str(encoder.get("spec", ""))


def _measured(
    folder: Path, summary: Mapping[str, Any], config: Mapping[str, Any], measure: Measure, manifest: Path | None
) -> tuple[float, dict[str, Any]]:
    if measure == "loss":
        return _loss(folder, summary, config)
    if manifest is None and measure == "linear":
        manifest = _lying_there(folder)
    if manifest is not None:
        return _of_manifest(manifest, measure)
    if "knn_top1" not in summary:
        raise InputError(f"{folder} has no kNN score: its images have no labels")
    error = 1 - summary["knn_top1"]["trained"]
    return error, {"source": summary["source"], **{f"knn.{key}": value for key, value in summary["knn"].items()}}


def _of_manifest(path: Path, measure: Measure) -> tuple[float, dict[str, Any]]:
    content = _json(path, "it is no manifest")
    if content["task"] != measure:
        raise InputError(f"{path}: its task is {content['task']}, but --measure is {measure}")
    alike = {
        "test images": content["test"]["fingerprint"],
        "metric": content["metric"],
        "label selection": content["label_selection"],
        "settings of the evaluation": content["settings"],
    }
    return 1 - content["value"]["mean"], alike


def _lying_there(folder: Path) -> Path:
    found = [
        path
        for path in sorted(folder.glob("*.json"))
        if path.name != _SUMMARY and _json(path, "it is no manifest").get("task") == "linear"
    ]
    if len(found) != 1:
        what = f"{len(found)} of them: name one" if found else "none"
        raise InputError(
            f"{folder}: --measure linear takes the manifest that lies in the run, and there is {what}; "
            f"simclr-scale linear --encoder {folder} --output {folder / 'linear.json'}"
        )
    return found[0]


def _loss(folder: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    file = folder / "metrics.csv"
    try:
        with file.open(encoding="utf-8") as lines:
            logged = [float(row["loss"]) for row in csv.DictReader(lines) if row.get("loss")]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: it cannot be read: {error}") from error
    if not logged:
        raise InputError(f"{file}: no loss was logged")
    model = config.get("model", {})
    conditions = {
        "source": summary["source"],
        "global_batch_size": summary["global_batch_size"],
        "temperature": model.get("temperature"),
        "loss": [model.get("loss"), model.get("loss_scale")],
    }
    return float(np.mean(logged[-max(1, round(_LAST_SHARE * len(logged))) :])), conditions


def _forward_flop(encoder: torch.nn.Module, size: tuple[int, int, int]) -> float:
    """Of one image; matrix products and convolutions count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.eval()(torch.zeros(1, *size))
    return float(counter.get_total_flops())


def _is_told(key: str) -> bool:
    return key in _TOLD_OF_TRAINER or not any(key == part or key.startswith(f"{part}.") for part in _NOT_TOLD)


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}: {otherwise}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {otherwise}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: {otherwise}")
    return content


def _config(folder: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{folder / CONFIG}: it cannot be read: {error}") from error


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix, node)]
    return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
