"""What commands that train many short runs have in common: the options of ``pretrain``, and a grid."""

import os
import sys
import warnings
from argparse import Action
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser

from simclr_scale.cli.parsing import RecipeFile
from simclr_scale.cli.precision import fastest_precision
from simclr_scale.cli.pretrain import PretrainCLI, PretrainHelp
from simclr_scale.cli.recipes import shipped_recipes
from simclr_scale.cli.resume import settings_of_result
from simclr_scale.errors import InputError
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.scaling.studies.cells import Cell
from simclr_scale.scaling.studies.training import CellTraining

STUDIES = "studies"

# What a cell settles, and what belongs to one start.
_OF_A_CELL = ("seed_everything", "data.seed", "data.global_batch_size", "model.learning_rate", "model.lr_scaling")
_OF_A_START = ("workers", "output", "max_bad_steps", "trainer.strategy")

# Options of ``pretrain`` that mean nothing here, and groups of them that its own help shows.
_OF_A_RUN = ("name", "runs_dir", "resume", "override", "max_bad_steps")
_GROUPS = ("model", "data", "trainer", "knn", "checkpoint")


class StudyRecipe(RecipeFile):
    """``--config``: a file, or the name of a study or of a recipe of ``pretrain``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        self.command = STUDIES if values in shipped_recipes(STUDIES) else "pretrain"
        super().__call__(parser, cfg, values, option_string)


class StudyHelp(PretrainHelp):
    """Leaves out the options that describe a model, data or trainer, which are those of ``pretrain``."""

    shown = ("data.source", "data.root", "data.subset")

    def add_argument(self, action: Action) -> None:
        of_a_run = action.dest in _OF_A_RUN or action.dest.partition(".")[0] in _GROUPS
        if not of_a_run or action.dest in self.shown:
            super().add_argument(action)


class StudyCLI(PretrainCLI):
    """The parser of ``pretrain`` with the options of a grid; builds data and models, and no trainer."""

    of_the_grid: tuple[str, ...] = ()
    """Options that choose cells: a study may be asked for more of them later."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs | {"formatter_class": StudyHelp})
        parser.add_argument("-c", "--config", action=StudyRecipe, help="name of a study or a recipe, or a YAML file")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--batch_sizes", type=str | int, help="images in a step, such as 64,256,1024")
        parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting, that differ in their seed")
        parser.add_argument(
            "--workers", type=int, default=1, help="trainings at a time, each in a process (and on a GPU) of its own"
        )
        parser.add_argument("--output", type=str | None, help="folder of the study; one that is there is continued")
        parser.add_argument("--train_images", type=int, default=5000, help="labelled images of the linear classifier")
        parser.add_argument("--test_images", type=int, default=5000, help="held-out images it is scored on; 0: none")

    def before_instantiate_classes(self) -> None:
        config = self.config
        self.refuse_accumulation()
        if config.output is None:
            raise InputError("give --output: the folder of the study, where each training is kept once it is done")
        for name, least in {"seeds": 1, "workers": 1, "train_images": 2, "test_images": 0}.items():
            if config[name] < least:
                raise InputError(f"--{name} must be at least {least}, got {config[name]}")
        if str(config.trainer.devices) not in ("1", "auto") or config.trainer.num_nodes != 1:
            raise InputError("trainer.devices: each training of a study has one device; --workers N runs N at a time")
        self.batches = self._batch_sizes()
        if config.trainer.precision == "auto":
            config.trainer.precision = fastest_precision(config.trainer.accelerator)
        self.set_threads()

    def _batch_sizes(self) -> list[int]:
        if self.config.batch_sizes is None:
            raise InputError("give --batch_sizes, such as 64,256,1024")
        sizes = whole_numbers("batch_sizes", self.config.batch_sizes)
        for size in sizes:
            if size < 2:
                raise InputError(f"--batch_sizes: a batch needs 2 images at least, got {size}")
        return sizes

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Not here: each cell has its own."""
        return None

    def open_data(self) -> None:
        """Reads the images, once, and checks every batch against them."""
        self.datamodule.setup()
        assert self.datamodule.train_source is not None
        images = len(self.datamodule.train_source)
        for size in self.batches:
            if size > images:
                raise InputError(f"--batch_sizes: {size} is larger than the training set of {images} images")

    def settings(self) -> dict[str, Any]:
        """What all cells of the study share."""
        leave_out = {*_OF_A_CELL, *_OF_A_START, *self.of_the_grid, "batch_sizes", "seeds"}
        settings = settings_of_result(self.saved_config())
        return {key: value for key, value in settings.items() if key not in leave_out and not key.startswith("knn.")}

    def build(self, cell: Cell) -> SimCLR:
        """The model of a cell, with weights of its seed and the rate of its own."""
        pl.seed_everything(cell.seed, verbose=False)
        config = self.config.clone()
        # Of a linear rule, whose peak is this at the batch of the cell.
        config.model.lr_scaling = "linear"
        config.model.learning_rate = cell.rate * 256 / cell.batch
        return self.parser.instantiate_classes(config).model

    def training(self) -> CellTraining:
        return CellTraining(
            self.datamodule,
            self.build,
            trainer_arguments(self),
            train_images=self.config.train_images,
            test_images=self.config.test_images,
        )


def trainer_arguments(cli: PretrainCLI) -> dict[str, Any]:
    """Of the Trainer, but for what a cell has of its own: its device, and nothing written or shown."""
    own = ("logger", "callbacks", "devices", "num_nodes", "strategy", "default_root_dir", "barebones", "profiler")
    return {
        key: value for key, value in cli.config_init.trainer.items() if key not in own and not key.startswith("enable_")
    }


def whole_numbers(option: str, given: int | str) -> list[int]:
    """Of "64,256": each once, in rising order."""
    try:
        numbers = sorted({int(part) for part in str(given).split(",")})
    except ValueError as error:
        raise InputError(f"--{option} {given}: wanted whole numbers, such as 64 or 64,256,1024") from error
    return numbers


def quieten_cells() -> None:
    """What Lightning says at each start would be said for each cell."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def counter(what: str, total: int) -> Callable[[int], None]:
    """A line whenever another cell is done."""

    def done(count: int) -> None:
        say(f"{what}: {count} of {total} trainings done")

    return done


def in_folder(folder: str) -> Path:
    return Path(os.path.expanduser(folder))
