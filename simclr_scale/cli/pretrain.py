"""``simclr-scale pretrain``: from a recipe to an encoder."""

import logging
import os
import tempfile
import time
import warnings
from argparse import Action
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from simclr_scale.cli.auto import replace_auto
from simclr_scale.cli.lost_files import lost_files_explained
from simclr_scale.cli.parsing import OneLineErrors, RecipeFile, ShortHelp
from simclr_scale.cli.precision import Trainer, fastest_precision
from simclr_scale.cli.resume import RUNS_DIR, Start, config_differences, config_of_resumed_run, find_start
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.errors import InputError, Preempted
from simclr_scale.pretraining.agreement import Agreement
from simclr_scale.pretraining.bad_files import BadFiles
from simclr_scale.pretraining.bad_steps import BadSteps
from simclr_scale.pretraining.checkpointing import RunCheckpoint
from simclr_scale.pretraining.data_wait import DataWait
from simclr_scale.pretraining.knn_monitor import KNNMonitor
from simclr_scale.pretraining.logger import RunLogger
from simclr_scale.pretraining.lost_ranks import DEFAULT_TIMEOUT, Limits, WatchedRanks
from simclr_scale.pretraining.preemption import Preemption
from simclr_scale.pretraining.progress import RunProgress
from simclr_scale.pretraining.run_folder import CONFIG, RunFolder
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.pretraining.strategies import check_strategy
from simclr_scale.pretraining.strategies import register as register_strategies
from simclr_scale.scaling.record import ScalingRecord

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

_HELP = {
    "print_config": "print the configuration that results, and stop",
    "trainer.max_epochs": "epochs to train",
    "trainer.max_steps": "steps to train, where they end first; -1: as many as the epochs have",
    "trainer.accelerator": "cpu, gpu or mps; auto takes the best there is",
    "trainer.devices": "processes on this machine, one a device: their number, or a list of devices",
    "trainer.num_nodes": "machines",
    "trainer.strategy": "how processes work together: ddp, ddp_bf16 (gradients in bfloat16), model_parallel (FSDP2)",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed, ...; null: 32-true; auto: bf16-mixed where the device has it",
}

EPILOG = """The arguments of a class or function that an option names are options too: --model.encoder.NAME,
--model.optimizer.betas; --model.optimizer.help CLASS lists them.

examples:
  simclr-scale pretrain --config quickstart
  simclr-scale pretrain --config auto --data.source FOLDER
  simclr-scale pretrain --config cifar10_small --data.source hfds/PATH --name first --trainer.devices 2
  simclr-scale pretrain --resume auto --name first
"""


class PretrainHelp(ShortHelp):
    """Leaves out the rarer arguments of the trainer."""

    def add_argument(self, action: Action) -> None:
        if not action.dest.startswith("trainer.") or action.dest in _HELP:
            super().add_argument(action)


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, with one-line errors."""

    synonyms = {  # noqa: RUF012  of the base class, a ClassVar
        "lr": "model.learning_rate",
        "weight_decay": "model.weight_decay",
        "batch_size": "data.global_batch_size",
        "epochs": "trainer.max_epochs",
    }

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "required: model.encoder" in message:
            message += "; a recipe has them: --config quickstart"
        super().error(message, ex)


class PretrainCLI(LightningCLI):
    """Parses, checks and instantiates; :func:`main` then trains."""

    program, description, epilog = "simclr-scale pretrain", "Train an encoder without labels (SimCLR).", EPILOG

    def __init__(self, argv: list[str]) -> None:
        register_strategies()
        super().__init__(
            SimCLR,
            SimCLRDataModule,
            trainer_class=Trainer,
            save_config_callback=None,  # RunFolder saves it, and never over another
            parser_class=Parser,
            parser_kwargs={
                "prog": self.program,
                "usage": "%(prog)s --config RECIPE [options]",
                "description": self.description,
                "epilog": self.epilog,
                "formatter_class": PretrainHelp,
            },
            args=argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=RecipeFile, help="name of a recipe, a YAML file, or auto")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Learning rate and weight decay have one owner, the model: the optimizer has no second pair of them.
        owned = {"optimizer.init_args.lr", "optimizer.init_args.weight_decay"}
        parser.add_class_arguments(SimCLR, "model", fail_untyped=False, sub_configs=True, skip=owned)
        parser.add_lightning_class_args(SimCLRDataModule, "data")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults(
            {
                "trainer.use_distributed_sampler": False,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )
        assert parser.groups is not None
        parser.groups["trainer"].title = "Lightning's Trainer, the rest of whose arguments are options too"
        for action in parser._actions:
            if action.dest in _HELP:
                action.help = _HELP[action.dest]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="name of the run; default: the recipe's and the time")
        parser.add_argument("--runs_dir", type=str, default=RUNS_DIR, help="where runs are kept")
        parser.add_argument("--resume", type=str | None, help="'auto' (the newest good checkpoint) or a .ckpt file")
        parser.add_argument("--override", type=bool, default=False, help="resume although the configuration differs")
        parser.add_argument("--threads", type=int | None, help="CPU threads a process; default: torch's choice")
        parser.add_argument("--max_bad_steps", type=int, default=10, help="bad steps in a row to end at")
        parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, help="seconds a rank may be silent")
        parser.add_lightning_class_args(KNNMonitor, "knn")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="seed of weights, order and every draw")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Straight to the parser: Lightning warns where arguments are given beside sys.argv, from which, unchanged,
        # its launcher starts the further processes.
        with tempfile.TemporaryDirectory() as folder:
            replaced, self.auto_notes = replace_auto(args, Path(folder))
            self.config = parser.parse_args([*config_of_resumed_run(replaced), *replaced])
        if not 0 <= self.config.seed_everything < 2**32:
            raise InputError(f"seed_everything must be from 0 to 2^32 - 1, got {self.config.seed_everything}")

    def refuse_accumulation(self) -> None:
        accumulated = self.config.trainer.accumulate_grad_batches
        if accumulated > 1:
            raise InputError(
                f"trainer.accumulate_grad_batches {accumulated} would not add negatives: keep it at 1, and set "
                "model.chunk_size to fit a large batch on a small device"
            )

    def before_instantiate_classes(self) -> None:
        self.refuse_accumulation()
        if self.config.trainer.precision == "auto":
            # Before the configuration is saved: a run goes on with the precision that it began with.
            self.config.trainer.precision = fastest_precision(self.config.trainer.accelerator)
        if self.config.max_bad_steps < 1:
            raise InputError(f"--max_bad_steps must be at least 1, got {self.config.max_bad_steps}")
        self.limits = Limits.of(self.config.timeout)
        self.set_threads()
        self.start = find_start(self.config, lambda: _default_name(self.config))
        if self.start.checkpoint is not None:
            _check_same_run(self, self.start)

    def set_threads(self) -> None:
        threads = self.config.threads
        if threads is not None:
            if threads < 1:
                raise InputError(f"--threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # Of a value in a list of callbacks the parser makes one of its trees, with what we said as its cause.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        if self.trainer is not None:
            # Before any further process is started, and again with every one.
            check_strategy(self.trainer, self.model, self.start.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init.trainer
        folder = self.start.folder
        further = config.get("logger")
        extra = [] if further in (None, True, False) else further if isinstance(further, list) else [further]
        progress = RunProgress()
        self._get(self.config_init, "checkpoint").folder = folder / "checkpoints"
        run_folder = RunFolder(folder, self.saved_config(), resumed=self.start.resumes, console=progress.console)
        further_callbacks = config.get("callbacks") or []
        config["callbacks"] = [*further_callbacks, progress, run_folder, BadFiles(folder), DataWait(), ScalingRecord()]
        config["callbacks"] += [Agreement(), BadSteps(self.config.max_bad_steps, folder), Preemption(folder.name)]
        loggers = [RunLogger(folder), *extra]
        try:
            return super().instantiate_trainer(
                logger=loggers, default_root_dir=str(folder), enable_checkpointing=True, **kwargs
            )
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise InputError(f"trainer: {str(error).splitlines()[0]}") from error

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


def _launched_by_lightning(trainer: Any) -> bool:
    """Whether this process was started by that of the first local rank, which the user's shell waits for."""
    return trainer.local_rank > 0 and isinstance(trainer.strategy.cluster_environment, LightningEnvironment)


def quieten() -> None:
    """Keeps what Lightning says to its developers, hints and advertisements from the user's screen."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # That gathering a tensor sharded twice takes two steps, from every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def main(argv: list[str]) -> None:
    """Trains; the files are those of ``runs/NAME/`` (see the documentation)."""
    quieten()
    train(PretrainCLI(argv))


def train(cli: PretrainCLI) -> None:
    """Runs what the command line asked for to its end."""
    progress = cli.trainer.progress_bar_callback
    assert isinstance(progress, RunProgress)
    if cli.trainer.is_global_zero:
        for note in (*cli.auto_notes, *cli.start.notes):
            progress.say(note)
    checkpoint = str(cli.start.checkpoint) if cli.start.checkpoint is not None else None
    name = cli.start.folder.name
    continues = f"--resume auto --name {name} continues from the last checkpoint"

    def say(reason: str) -> None:
        line = reason if continues in reason else f"{reason}; {continues}"
        # Past Python's own stream, which the main thread may hold.
        os.write(2, f"{cli.program}: error: {line}\n".encode())

    ranks = WatchedRanks(cli.trainer, cli.limits, say=say, tidy=progress.close)
    with (
        ranks.while_fitting(),
        killed_workers_explained(f"; then {continues}"),
        lost_files_explained(cli.config.data.source, continues),
    ):
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        except Preempted:
            # Lightning kills the process that launched the others as soon as one of them has another status than 0.
            if not _launched_by_lightning(cli.trainer):
                raise
