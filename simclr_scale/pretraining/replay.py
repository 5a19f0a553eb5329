"""One batch of a run again: the same images in the same views."""

import json
from pathlib import Path
from typing import Any

import yaml

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.views import Batch
from simclr_scale.errors import InputError
from simclr_scale.pretraining.bad_steps import BAD_STEPS

_CONFIG = "config.yaml"


def replay_batch(run: str | Path, step: int) -> Batch:
    """The global batch of a step that ``bad_steps.jsonl`` of a run records.

    Order and draws are functions of (seed, epoch, image), so nothing but the record and the run's configuration is
    needed, nor as many processes as the run had.

    Args:
        run: the folder of a run.
        step: as in the record.

    Returns:
        ``inputs`` (2B, C, H, W) float32 in [0, 1], all first views and then all second views; ``label`` and ``index``
        (B,) int64. On several ranks each had a slice of each view.

    Raises:
        InputError: no such run, or no such step in its record.
    """
    run = Path(run)
    config, record = _config(run), _record(run, step)
    data = SimCLRDataModule(**config["data"] | {"seed": config["seed_everything"]})
    return data.batch_of(record["epoch"], record["batch"], record["indices"])


def _config(run: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((run / _CONFIG).read_text())
    except OSError as error:
        raise InputError(f"{run} is not a run: its {_CONFIG} cannot be read ({error.strerror})") from error


def _record(run: Path, step: int) -> dict[str, Any]:
    path = run / BAD_STEPS
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for record in records:
        if record["step"] == step:
            if record["indices"] is None:
                raise InputError(f"{path} has no images of step {step}: the run's loader did not tell them")
            return record
    known = ", ".join(str(record["step"]) for record in records[:10]) or "none"
    raise InputError(f"{path} has no step {step}; it has {known}")
