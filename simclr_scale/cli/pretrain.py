"""``simclr-scale pretrain``: from a recipe to an encoder."""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from simclr_scale.cli.parsing import OneLineErrors, RecipeFile, shorten_help
from simclr_scale.cli.resume import Start, config_differences, find_start
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.errors import InputError
from simclr_scale.pretraining.checkpointing import RunCheckpoint
from simclr_scale.pretraining.knn_monitor import KNNMonitor
from simclr_scale.pretraining.logger import RunLogger
from simclr_scale.pretraining.progress import RunProgress
from simclr_scale.pretraining.run_folder import CONFIG, RunFolder
from simclr_scale.pretraining.simclr import SimCLR

_RUN_NAME = "SIMCLR_SCALE_RUN_NAME"
_ABOUT_THE_RUN = ("name", "runs_dir", "resume", "override")

_NOISE = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    # It is: the sampler starts where the checkpoint was written.
    ".*your dataloader is not resumable.*",
)

EPILOG = """examples:
  simclr-scale pretrain --config quickstart
  simclr-scale pretrain --config cifar10_small --data.source hfds/PATH --name first --trainer.devices 2
  simclr-scale pretrain --resume auto --name first
"""


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with one-line errors."""


class PretrainCLI(LightningCLI):
    """Parses, checks and instantiates; :func:`main` then trains."""

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            SimCLR,
            SimCLRDataModule,
            save_config_callback=None,  # RunFolder saves it, and never over another
            trainer_defaults={
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                "prog": "simclr-scale pretrain",
                "description": "Train an encoder without labels (SimCLR).",
                "epilog": EPILOG,
            },
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="name of a recipe, or a YAML file")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="name of the run; default: the recipe's and the time")
        parser.add_argument("--runs_dir", type=str, default="runs", help="where runs are kept")
        parser.add_argument("--resume", type=str | None, help="'auto' (the newest good checkpoint) or a .ckpt file")
        parser.add_argument("--override", type=bool, default=False, help="resume although the configuration differs")
        parser.add_argument("--threads", type=int | None, help="CPU threads of one process; default: torch's choice")
        parser.add_lightning_class_args(KNNMonitor, "knn")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")
        shorten_help(
            parser, keep=("max_epochs", "max_steps", "devices", "num_nodes", "accelerator", "strategy", "precision")
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Straight to the parser: Lightning warns where arguments are given beside sys.argv, from which, unchanged,
        # its launcher starts the further processes.
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        if self.config.model is None or self.config.get("data.source") is None:
            raise InputError("give a recipe, such as --config quickstart, or --model.encoder and --data.source")
        accumulated = self.config.trainer.accumulate_grad_batches
        if accumulated > 1:
            raise InputError(
                f"trainer.accumulate_grad_batches {accumulated} would not add negatives: keep it at 1, and set "
                "model.chunk_size to fit a large batch on a small device"
            )
        threads = self.config.threads
        if threads is not None:
            if threads < 1:
                raise InputError(f"--threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self.start = find_start(self.config, _default_name(self.config))
        if self.start.checkpoint is not None:
            _check_same_run(self, self.start)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init.trainer
        folder = self.start.folder
        loggers = config.get("logger")
        extra = [] if loggers in (None, True, False) else loggers if isinstance(loggers, list) else [loggers]
        progress = RunProgress()
        self._get(self.config_init, "checkpoint").folder = folder / "checkpoints"
        run_folder = RunFolder(folder, self.saved_config(), resumed=self.start.resumes, console=progress.console)
        config["callbacks"] = [*(config.get("callbacks") or []), progress, run_folder]
        return super().instantiate_trainer(
            logger=[RunLogger(folder), *extra], default_root_dir=str(folder), enable_checkpointing=True, **kwargs
        )

    def saved_config(self) -> str:
        """What the user gave and every default, without what belongs to this one start."""
        config = self.config.clone()
        for key in ("config", *_ABOUT_THE_RUN):
            config.pop(key, None)
        return self.parser.dump(config, skip_none=False, skip_link_targets=True, skip_validation=True)


def _default_name(config: Namespace) -> str:
    """A name all processes of this start agree on: handed down by the one that launched them, or by the cluster."""
    if "LOCAL_RANK" in os.environ and (name := os.environ.get(_RUN_NAME)):
        return name
    files = config.get("config") or []
    recipe = Path(str(files[-1])).stem if files else "pretrain"
    shared = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
    if shared in (None, "none") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("give --name: the processes of this start have no other way to agree on one")
    name = f"{recipe}-{shared if shared not in (None, 'none') else time.strftime('%Y%m%d-%H%M%S')}"
    os.environ[_RUN_NAME] = name
    return name


def _check_same_run(cli: PretrainCLI, start: Start) -> None:
    differences = config_differences(start.folder / CONFIG, cli.saved_config())
    if differences and not cli.config.override:
        key, before, now = differences[0]
        raise InputError(
            f"run {start.folder} was started with {key} = {before}, not {now}; start a new run, or add --override true"
        )


def _quieten() -> None:
    """Keeps what Lightning says to its developers, hints and advertisements from the user's screen."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def main(argv: list[str]) -> None:
    """Trains; the files are those of ``runs/NAME/`` (see the documentation)."""
    _quieten()
    cli = PretrainCLI(argv)
    progress = cli.trainer.progress_bar_callback
    assert isinstance(progress, RunProgress)
    if cli.trainer.is_global_zero:
        for note in cli.start.notes:
            progress.say(note)
        progress.say(f"run {cli.start.folder}")
    checkpoint = str(cli.start.checkpoint) if cli.start.checkpoint is not None else None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
