"""``simclr-scale lr-sweep``: linear or square-root scaling of the learning rate, over batch sizes."""

from functools import partial
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from simclr_scale.cli.pretrain import quieten
from simclr_scale.cli.studies import StudyCLI, counter, in_folder, quieten_cells
from simclr_scale.errors import InputError
from simclr_scale.evaluation.manifest import library_versions, write_json
from simclr_scale.scaling.hardware import best_device, device_name
from simclr_scale.scaling.studies.cells import Cell, CellRunner, StudyFolder, run_cells
from simclr_scale.scaling.studies.lr_rules import RULES, compare_rules, sweep_cells
from simclr_scale.scaling.studies.plots import draw_rules

METRIC = "linear_top1"

EPILOG = """All other options are those of pretrain, which says them by its --help.

examples:
  simclr-scale lr-sweep --config lr_rules_tiny --data.source torch/CIFAR10 --data.root PATH --output rules
  simclr-scale lr-sweep --config lr_rules_full --data.source PATH --output rules --workers 8

Start it again after a kill: finished trainings are kept in OUTPUT/cells and never run again.
"""


class SweepCLI(StudyCLI):
    """The parser of ``lr-sweep``."""

    program, epilog = "simclr-scale lr-sweep", EPILOG
    description = "Train at several batch sizes under linear and square-root scaling of the learning rate."
    of_the_grid = ("rules", "negatives", "reference_batch", "reference_rate")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rules", type=str, default="linear,sqrt", help="which of linear and sqrt")
        parser.add_argument("--reference_batch", type=int, default=4096, help="batch at which both rules agree")
        parser.add_argument("--reference_rate", type=float, default=4.8, help="peak rate there; the paper's is 4.8")
        parser.add_argument(
            "--negatives", type=int | None, help="images among which negatives are taken; default: the whole batch"
        )

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config
        self.rules = list(dict.fromkeys(str(config.rules).split(",")))
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"--rules: there is no rule {rule!r}; there are {', '.join(RULES)}")
        if config.reference_batch < 1:
            raise InputError(f"--reference_batch must be at least 1, got {config.reference_batch}")
        if not 0 < config.reference_rate < float("inf"):
            raise InputError(f"--reference_rate must be above 0, got {config.reference_rate}")
        if config.negatives is not None:
            require_groups(self.batches, config.negatives)

    def cells(self) -> list[Cell]:
        first = self.config.seed_everything
        seeds = range(first, first + self.config.seeds)
        reference = self.config.reference_batch, self.config.reference_rate
        return sweep_cells(self.batches, self.rules, seeds, reference, self.config.negatives)


def require_groups(batches: list[int], negatives: int) -> None:
    """Every batch is whole groups of so many images."""
    if negatives < 2:
        raise InputError(f"--negatives: a group needs 2 images at least, got {negatives}")
    for batch in batches:
        if batch % negatives:
            raise InputError(f"--batch_sizes: {batch} does not divide into groups of {negatives} images (--negatives)")


class SweepRunner(CellRunner):
    """Trains a cell from its first step and fits a linear classifier to its features."""

    def __init__(self, argv: list[str], cli: SweepCLI | None = None) -> None:
        quieten()
        quieten_cells()
        self.cli = cli or SweepCLI(argv)
        self.cli.open_data()
        self.training = self.cli.training()

    def run(self, cell: Cell) -> dict[str, Any]:
        model, facts = self.training.train(cell)
        return facts | {METRIC: None if facts["diverged"] else self.training.linear_accuracy(model)}


def main(argv: list[str]) -> None:
    """``simclr-scale lr-sweep``."""
    quieten()
    cli = SweepCLI(argv)
    cells = cli.cells()
    study = StudyFolder(in_folder(cli.config.output), cli.settings())
    if any(study.result(cell) is None for cell in cells):
        cli.open_data()
    with study.taken():
        make_runner = partial(SweepRunner, argv, *([cli] if cli.config.workers == 1 else []))
        results = run_cells(cells, study, make_runner, workers=cli.config.workers, done=counter("lr-sweep", len(cells)))
        rows = compare_rules(results, METRIC)
        content = {
            "study": "lr-sweep",
            "metric": METRIC,
            "rows": rows,
            "cells": results,
            "settings": study.settings,
            "environment": {"device": device_name(best_device()), "versions": library_versions()},
        }
        write_json(content, study.folder / "results.json")
        draw_rules(rows, METRIC, "linear top-1", study.folder / "lr_rules.png")
    print_rules(rows)
    print(f"{study.folder / 'results.json'}, {study.folder / 'lr_rules.png'}")


def print_rules(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """A line a batch: the linear accuracy of each rule and their difference, with 95% intervals."""
    table = Table(title="linear top-1 by rule", box=box.ROUNDED)
    for name in ("optimizer batch", "negatives a view", *RULES, "sqrt less linear", "better"):
        table.add_column(name, justify="right")
    for row in rows:
        values = [_accuracy(row.get(rule)) for rule in RULES]
        difference = row.get("sqrt_less_linear")
        table.add_row(
            f"{row['batch']:,}",
            f"{row['negatives_per_view']:,}",
            *values,
            _interval(difference, sign=True) if difference else "",
            row.get("better") or "neither, by these seeds",
        )
    (console or Console()).print(table)


def _accuracy(of_rule: dict[str, Any] | None) -> str:
    if of_rule is None:
        return ""
    if of_rule[METRIC] is None:
        return f"{of_rule['diverged']} diverged"
    diverged = f", {of_rule['diverged']} diverged" if of_rule["diverged"] else ""
    return f"{_interval(of_rule[METRIC])} (rate {of_rule['rate']:.3g}{diverged})"


def _interval(value: dict[str, Any], sign: bool = False) -> str:
    plus = "+" if sign else ""
    text = f"{100 * value['mean']:{plus}.1f}"
    if value["low"] is None:
        return text
    return f"{text} [{100 * value['low']:{plus}.1f}, {100 * value['high']:{plus}.1f}]"
