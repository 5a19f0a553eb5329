"""``simclr-scale critical-batch``: a checkpoint branched at several batch sizes."""

import math
from functools import partial
from typing import Any

from jsonargparse import Namespace
from rich import box
from rich.console import Console
from rich.table import Table

from simclr_scale.cli.critical_branches import Branching, BranchRunner
from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.cli.pretrain import quieten
from simclr_scale.cli.studies import StudyRecipe, counter, in_folder, whole_numbers
from simclr_scale.errors import InputError
from simclr_scale.evaluation.manifest import library_versions, write_json
from simclr_scale.scaling.hardware import best_device, device_name
from simclr_scale.scaling.studies.cells import StudyFolder, run_cells
from simclr_scale.scaling.studies.critical import Criterion, compare_branches
from simclr_scale.scaling.studies.lr_rules import RULES
from simclr_scale.scaling.studies.plots import draw_branches

EPILOG = """Each branch goes on from the checkpoint, optimizer state included, at a constant rate that follows the
batch by --rule, with negatives from groups of --negatives images whatever the batch.

examples:
  simclr-scale critical-batch --config critical_batch_tiny --checkpoint runs/NAME/checkpoints/step=500.ckpt \\
      --output critical
  simclr-scale critical-batch --checkpoint CKPT --batch_sizes 64,256,1024 --negatives 64,256 --images 20000 \\
      --output critical --workers 2

Start it again after a kill: finished branches are kept in OUTPUT/cells and never run again.
"""


def main(argv: list[str]) -> None:
    """``simclr-scale critical-batch``."""
    quieten()
    arguments = _parser().parse_args(argv)
    _check(arguments)
    branching = Branching(arguments)
    cells = branching.cells()
    study = StudyFolder(in_folder(arguments.output), branching.settings())
    if any(study.result(cell) is None for cell in cells):
        branching.open_data()
    with study.taken():
        one = arguments.workers == 1
        make_runner = partial(BranchRunner, arguments, *([branching] if one else []))
        results = run_cells(
            cells, study, make_runner, workers=arguments.workers, done=counter("critical-batch", len(cells))
        )
        tasks = compare_branches(results, Criterion(arguments.target, arguments.tolerance))
        content = {
            "study": "critical-batch",
            "tasks": tasks,
            "cells": results,
            "settings": study.settings,
            "environment": {"device": device_name(best_device()), "versions": library_versions()},
        }
        write_json(content, study.folder / "results.json")
        draw_branches(tasks, study.folder / "critical_batch.png")
    for task in tasks:
        print_task(task)
    print(f"{study.folder / 'results.json'}, {study.folder / 'critical_batch.png'}")


def _parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="simclr-scale critical-batch",
        usage="%(prog)s --checkpoint FILE --output FOLDER [options]",
        description="Branch a checkpoint at several batch sizes and compare the loss at fixed negatives.",
        epilog=EPILOG,
    )
    parser.add_argument("-c", "--config", action=StudyRecipe, help="name of a study, or a YAML file of these options")
    parser.add_argument("--checkpoint", type=str | None, help="a checkpoint in the folder of its run")
    parser.add_argument("--batch_sizes", type=str | int, default="64,128,256,512,1024", help="images in a step")
    parser.add_argument(
        "--negatives",
        type=str | int | None,
        help="images of a group of negatives, one or several; default: the least batch",
    )
    parser.add_argument("--images", type=int, default=20000, help="that each branch trains on, each time one is seen")
    parser.add_argument("--evaluate_every", type=int, default=1024, help="images from one held-out loss to the next")
    parser.add_argument("--fixed_negatives", type=int, default=64, help="images of a group in the held-out loss")
    parser.add_argument("--held_out", type=int, default=1024, help="held-out images of that loss")
    parser.add_argument(
        "--rule", type=str | None, help="linear or sqrt; default: sqrt for Adam and its kin, else linear"
    )
    parser.add_argument("--rate", type=float | None, help="rate at the run's batch; default: that of the checkpoint")
    parser.add_argument(
        "--target", type=float | None, help="held-out loss to reach; default: the lowest that all reach"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="by which a loss counts as no higher")
    parser.add_argument("--seeds", type=int, default=2, help="branches of each setting, that differ in order and draws")
    parser.add_argument("--train_images", type=int, default=5000, help="labelled images of the linear classifier")
    parser.add_argument("--test_images", type=int, default=5000, help="held-out images it is scored on; 0: none")
    parser.add_argument("--workers", type=int, default=1, help="branches at a time, each in a process of its own")
    parser.add_argument("--source", type=str | None, help="data set, where it is elsewhere now")
    parser.add_argument("--root", type=str | None, help="folder of torch/NAME data sets, where it is elsewhere now")
    parser.add_argument("--output", type=str | None, help="folder of the study; one that is there is continued")
    return parser


def _check(arguments: Namespace) -> None:
    for name in ("checkpoint", "output"):
        if arguments[name] is None:
            raise InputError(f"give --{name}")
    least = {"images": 1, "evaluate_every": 1, "fixed_negatives": 2, "held_out": 2, "seeds": 1, "train_images": 2}
    for name, value in (least | {"test_images": 0, "workers": 1}).items():
        if arguments[name] < value:
            raise InputError(f"--{name} must be at least {value}, got {arguments[name]}")
    if arguments.held_out < arguments.fixed_negatives:
        raise InputError(f"--held_out {arguments.held_out} is less than a group of --fixed_negatives images")
    if arguments.rule is not None and arguments.rule not in RULES:
        raise InputError(f"--rule: there is no rule {arguments.rule!r}; there are {', '.join(RULES)}")
    for name in ("rate", "tolerance"):
        if arguments[name] is not None and not 0 < arguments[name] < math.inf:
            raise InputError(f"--{name} must be above 0, got {arguments[name]}")
    for option in ("batch_sizes", "negatives"):
        for number in whole_numbers(option, arguments[option]) if arguments[option] is not None else []:
            if number < 2:
                raise InputError(f"--{option}: 2 images at least have negatives, got {number}")


def print_task(task: dict[str, Any], console: Console | None = None) -> None:
    """The branches of one number of negatives, a line a batch, and what follows."""
    say = (console or Console()).print
    rows = task["rows"]
    table = Table(title=f"branches with {rows[0]['negatives_per_view']:,} negatives a view", box=box.ROUNDED)
    for name in (
        "optimizer batch",
        "negatives a view",
        "rate",
        "loss, all images",
        "steps to target",
        "images",
        "linear",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        steps, loss, linear = row["steps_to_target"], row["final_loss"], row["linear_top1"]
        table.add_row(
            f"{row['batch']:,}",
            f"{row['negatives_per_view']:,}",
            f"{row['rate']:.3g}",
            f"{loss['mean']:.4f}" if loss else f"{row['diverged']} diverged",
            f"{steps['mean']:,.1f}" if steps else "not reached",
            f"{row['images_to_target']:,.0f}" if steps else "",
            f"{linear['mean']:.1%}" if linear else "",
        )
    say(table)
    fit = task["hyperbola"]
    if fit:
        interval = f" (95%: {fit['interval'][0]:,.0f} to {fit['interval'][1]:,.0f})" if fit["interval"] else ""
        say(
            f"target {task['target']:.4f}: at least {fit['least_steps']:,.1f} steps and "
            f"{fit['least_images']:,.0f} images; critical batch {fit['critical_batch']:,.0f}{interval}",
            highlight=False,
        )
    else:
        say(f"no hyperbola: {task['why_no_hyperbola']}", highlight=False)
    largest = task["largest_without_loss"]
    say(f"largest batch that loses nothing after as many images: {largest:,}" if largest else "no branch ended well")
