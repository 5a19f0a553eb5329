"""Where a run starts: anew, or from a checkpoint of a run that must be the same one."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from simclr_scale.bundle.loading import is_checkpoint, require_checkpoint
from simclr_scale.errors import InputError
from simclr_scale.pretraining.checkpointing import newest_intact
from simclr_scale.pretraining.run_folder import CONFIG
from simclr_scale.pretraining.strategies import CompressedDDPStrategy

RUNS_DIR = "runs"

# What cannot change the result of a run: where and on how many devices it runs, and what it writes.
_HARMLESS = (
    "threads",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.default_root_dir",
    "trainer.profiler",
    "data.num_workers",
    "data.in_memory",
    "data.max_bad_fraction",
    "max_bad_steps",
    "timeout",
    "trainer.max_time",
    "checkpoint",
    "knn.every_n_epochs",
    "knn.batch_size",
)


class Start(NamedTuple):
    """The folder of a run, the checkpoint to start from if any, and what to tell the user about the choice."""

    folder: Path
    checkpoint: Path | None
    resumes: bool
    notes: list[str]


def config_of_resumed_run(argv: list[str]) -> list[str]:
    """``--config`` with the configuration of the run to continue, where that is asked for without any ``--config``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in (("-c", "--config"), ("--name",), ("--runs_dir",), ("--resume",)):
        parser.add_argument(*option, nargs="?")
    given, _ = parser.parse_known_args(argv)
    if given.config is not None or given.resume is None:
        return []
    if given.name is not None:
        config = Path(given.runs_dir or RUNS_DIR) / given.name / CONFIG
    else:
        config = Path(given.resume).resolve().parent.parent / CONFIG
    return ["--config", str(config)] if config.is_file() else []


def find_start(config: Namespace, default_name: Callable[[], str]) -> Start:
    """Chooses the run's folder and checkpoint from ``--name``, ``--runs_dir`` and ``--resume``.

    Args:
        config: of this start.
        default_name: names a new run that the user gave no name.

    Raises:
        InputError: the run exists and is not to be resumed, or there is nothing to resume from.
    """
    runs, name, resume = Path(config.runs_dir), config.name, config.resume
    if name is not None and (name in ("", "..") or Path(name).name != name):
        raise InputError(f"--name is the name of a folder in {runs}, without slashes, got {name!r}")
    if resume is None:
        folder = runs / (name or default_name())
        if folder.exists():
            raise InputError(f"run {folder} exists already; give another --name, or continue it with --resume auto")
        _require_writable(folder)
        return Start(folder, None, False, [])
    if resume != "auto":
        checkpoint = Path(resume)
        if not is_checkpoint(checkpoint):
            raise InputError(f"--resume {resume}: there is no such checkpoint; give 'auto' or a .ckpt file of a run")
        require_checkpoint(checkpoint)
        folder = runs / name if name else checkpoint.resolve().parent.parent
        if not (folder / CONFIG).is_file():
            raise InputError(f"--resume {resume}: {folder} is not a run, it has no {CONFIG}")
        _require_writable(folder)
        return Start(folder, checkpoint, True, [])
    if name is None:
        raise InputError("--resume auto needs --name: which run to continue")
    folder = runs / name
    _require_writable(folder)
    if not folder.exists():
        return Start(folder, None, False, [f"there is no run {folder} yet: starting it"])
    checkpoint_or_none, damaged = newest_intact(folder / "checkpoints")
    notes = [f"{path} is damaged (its checksum differs) and is passed over" for path in damaged]
    if checkpoint_or_none is None:
        if damaged:
            raise InputError(f"no checkpoint of run {folder} is intact; {damaged[0]} is damaged")
        return Start(folder, None, True, [f"run {folder} has no checkpoint yet: starting from its beginning"])
    return Start(folder, checkpoint_or_none, True, [*notes, f"continuing from {checkpoint_or_none}"])


def _require_writable(folder: Path) -> None:
    """Whether a run could write there, before it is set up."""
    for place in (folder / "checkpoints", folder, *folder.absolute().parents):
        if not os.path.lexists(place):
            continue
        if not place.is_dir():
            raise InputError(f"{place} is not a folder, so no run can be kept there: give another --runs_dir")
        effective = os.access in os.supports_effective_ids
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
            raise InputError(f"{place} cannot be written to (its permissions, or a read-only file system)")
        if place != folder / "checkpoints":
            return


def config_differences(saved: Path, now: str) -> list[tuple[str, Any, Any]]:
    """Keys that could change the result and differ between a run's config.yaml and a new configuration."""
    before, after = settings_of_result(saved.read_text()), settings_of_result(now)
    return [
        (key, before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)
    ]


def settings_of_result(config: str) -> dict[str, Any]:
    """The settings of a configuration in YAML that could change the result of a run, by their full keys."""
    content = yaml.safe_load(config)
    flat = _flatten(content)
    kept = {key: flat[key] for key in flat if not any(key == h or key.startswith(f"{h}.") for h in _HARMLESS)}
    strategy = (content.get("trainer") or {}).get("strategy")
    name = str(strategy.get("class_path") if isinstance(strategy, dict) else strategy)
    # All others give the same gradients, but for the last digits of float32.
    rounds = name == "ddp_bf16" or name.endswith(CompressedDDPStrategy.__name__)
    return kept | {"trainer.strategy": "ddp_bf16" if rounds else "float32 gradients"}


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
