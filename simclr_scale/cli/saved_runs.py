"""Commands that take a run's checkpoints up again: its configuration, its images, its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from simclr_scale.bundle.loading import misfit, read_checkpoint
from simclr_scale.cli.precision import fastest_precision
from simclr_scale.cli.pretrain import PretrainCLI
from simclr_scale.errors import InputError
from simclr_scale.pretraining.checkpointing import checkpoints
from simclr_scale.pretraining.run_folder import CONFIG


class SavedRunCLI(PretrainCLI):
    """The parser of ``pretrain`` on the configuration of a run; builds model and data, and no trainer."""

    def before_instantiate_classes(self) -> None:
        if self.config.trainer.precision == "auto":
            self.config.trainer.precision = fastest_precision(self.config.trainer.accelerator)
        self.set_threads()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def run_of(run: str | None, files: list[str] | None) -> tuple[Path, list[Path]]:
    """The folder of a run and the checkpoints that are meant, oldest first.

    Raises:
        InputError: neither is given, or no run or checkpoint is there, or they are of several runs.
    """
    if files:
        paths = [Path(file).expanduser() for file in files]
        for path in paths:
            if not path.is_file():
                raise InputError(f"--checkpoint {path}: there is no such checkpoint")
        folders = {path.resolve().parent.parent for path in paths}
        if len(folders) > 1:
            raise InputError("--checkpoint: these are checkpoints of several runs; name those of one")
        folder = folders.pop()
        if run is not None and Path(run).resolve() != folder:
            raise InputError(f"--checkpoint: {paths[0]} is no checkpoint of the run {run}; leave one of the two out")
    elif run is not None:
        folder = Path(run).expanduser()
        if not folder.is_dir():
            raise InputError(f"--run {run}: there is no such run")
        paths = checkpoints(folder / "checkpoints")[::-1]
    else:
        raise InputError("give --run FOLDER (all of its checkpoints), or --checkpoint FILE [FILE ...]")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a run: it has no {CONFIG}")
    if not paths:
        raise InputError(f"run {folder} has no checkpoint yet")
    return folder, paths


def open_run(folder: Path, options: list[str]) -> SavedRunCLI:
    """Model and data of a run, as its configuration has them but for some options."""
    return SavedRunCLI(["--config", str(folder / CONFIG), *options])


def load_weights(model: nn.Module, path: Path) -> dict[str, Any]:
    """Copies a checkpoint's weights, but for those of its online probe; returns the checkpoint."""
    checkpoint = dict(read_checkpoint(path))
    weights = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("probe.")}
    own = {key for key in model.state_dict() if not key.startswith("probe.")}
    if own != weights.keys():
        raise InputError(f"{path}: its weights do not fit the run's configuration: {misfit(model, weights)}")
    with torch.no_grad():
        try:
            model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise InputError(
                f"{path}: its weights do not fit the run's configuration: {misfit(model, weights)}"
            ) from error
    return checkpoint
