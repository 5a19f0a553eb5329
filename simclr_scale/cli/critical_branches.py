"""The branches of ``simclr-scale critical-batch``: what each starts from, and how it is trained and measured."""

import math
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace

from simclr_scale.cli.pretrain import quieten
from simclr_scale.cli.saved_runs import load_weights, open_run, run_of
from simclr_scale.cli.studies import quieten_cells, trainer_arguments, whole_numbers
from simclr_scale.errors import InputError
from simclr_scale.pretraining.checkpointing import sha256
from simclr_scale.pretraining.simclr import SimCLR
from simclr_scale.scaling.plan.optimizers import make_on_a_small_layer
from simclr_scale.scaling.studies.branches import BranchFrom, LossCurve, branch_cells, default_rule, rate_and_state
from simclr_scale.scaling.studies.cells import Cell, CellRunner
from simclr_scale.scaling.studies.training import CellTraining


class Branching:
    """A checkpoint with its run's configuration and images, and the branches that were asked for."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        folder, (self.path,) = run_of(None, [arguments.checkpoint])
        options = [f"--data.{key}={arguments[key]}" for key in ("source", "root") if arguments[key] is not None]
        self.cli = open_run(folder, options)
        self.checkpoint = load_weights(self.cli.model, self.path)
        rate, self.optimizer_state = rate_and_state(self.checkpoint)
        self.rate = arguments.rate or rate
        if not self.rate > 0:
            raise InputError(
                f"{self.path}: the learning rate had come down to 0 there; take an earlier checkpoint, or give --rate"
            )
        self.rule = arguments.rule or default_rule(make_on_a_small_layer(self.cli.model._optimizer, self.rate))
        self.batches = whole_numbers("batch_sizes", arguments.batch_sizes)

    def cells(self) -> list[Cell]:
        given = self.arguments.negatives
        negatives = [min(self.batches)] if given is None else whole_numbers("negatives", given)
        # Of the run's own seed the order would begin as the run's did.
        first = self.cli.config.seed_everything + 1
        seeds = range(first, first + self.arguments.seeds)
        own_batch = self.cli.datamodule.global_batch_size
        return branch_cells(self.batches, negatives, seeds, self.rate, own_batch, self.rule)

    def settings(self) -> dict[str, Any]:
        names = ("images", "evaluate_every", "fixed_negatives", "held_out", "train_images", "test_images")
        return {"checkpoint": sha256(self.path), "step": self.checkpoint["global_step"]} | {
            name: self.arguments[name] for name in names
        }

    def open_data(self) -> None:
        data = self.cli.datamodule
        data.setup()
        assert data.train_source is not None
        for batch in self.batches:
            if batch > len(data.train_source):
                raise InputError(
                    f"--batch_sizes: {batch} is larger than the training set of {len(data.train_source)} images"
                )

    def build(self, cell: Cell) -> SimCLR:
        """The model of the checkpoint, once more for each branch."""
        pl.seed_everything(cell.seed, verbose=False)
        model: SimCLR = self.cli.parser.instantiate_classes(self.cli.config).model
        load_weights(model, self.path)
        model.warmup_epochs = 0
        return model


class BranchRunner(CellRunner):
    """Trains a branch, follows its loss at fixed negatives, and fits a linear classifier at its end."""

    def __init__(self, arguments: Namespace, branching: Branching | None = None) -> None:
        quieten()
        quieten_cells()
        self.branching = branching or Branching(arguments)
        self.branching.open_data()
        cli = self.branching.cli
        self.training = CellTraining(
            cli.datamodule,
            self.branching.build,
            trainer_arguments(cli),
            train_images=arguments.train_images,
            test_images=arguments.test_images,
            held_out=arguments.held_out,
            fixed_negatives=arguments.fixed_negatives,
        )
        self.images, self.every = arguments.images, arguments.evaluate_every
        self.views = self.training.held_out_views()

    def run(self, cell: Cell) -> dict[str, Any]:
        curve = LossCurve(self.views, self.every, cell.batch)
        branch = BranchFrom(self.branching.optimizer_state, cell.rate)
        steps = math.ceil(self.images / cell.batch)
        model, facts = self.training.train(cell, branch, curve, max_steps=steps, max_epochs=-1)
        linear = None if facts["diverged"] else self.training.linear_accuracy(model)
        return facts | {"linear_top1": linear, "curve": curve.points}
