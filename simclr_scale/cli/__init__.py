"""The command line: one table of commands, one flat parser for each.

The table imports nothing heavy, so that ``simclr-scale --help`` answers at once.
"""

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

from simclr_scale import __version__
from simclr_scale.errors import InputError, Preempted, RunFailed

PROGRAM = "simclr-scale"


class Command(NamedTuple):
    """The function behind a command, which takes its arguments, and what it does, in a line."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "pretrain": Command("pretrain", "main", "train an encoder without labels, from a recipe"),
    "prepare": Command("prepare", "main", "pack a data set once, so that training reads it fast"),
    "knn": Command("evaluate", "knn", "score an encoder by its nearest neighbours"),
    "linear": Command("evaluate", "linear", "score an encoder by a linear classifier on its features"),
    "scorecard": Command("scorecard", "main", "put all evaluations of one or several encoders on one card"),
    "transfer": Command("transfer", "main", "score encoders on many data sets, each by its own metric"),
    "finetune": Command("finetune", "main", "score an encoder by training all of it on few or all labels"),
    "distil": Command("distil", "main", "teach a network the answers of a fine-tuned one, without labels"),
    "health": Command("health", "main", "judge an encoder without labels: rank, spectrum, alignment, uniformity"),
    "export": Command("export", "main", "write an encoder for timm, torchvision, ONNX or torch.export"),
    "plan": Command("plan", "main", "memory, steps and time of a training, and known mistakes, before it starts"),
    "report": Command("report", "main", "set runs side by side: rates, scaling efficiency, time to N epochs"),
    "noise-scale": Command("noise_scale", "main", "how large a batch still pays: the gradient noise scale of a run"),
    "critical-batch": Command("critical_batch", "main", "branch a checkpoint at several batch sizes and compare"),
    "lr-sweep": Command("lr_sweep", "main", "linear or square-root scaling of the learning rate, over batch sizes"),
    "fit-law": Command("fit_law", "main", "fit a scaling law to runs: error against parameters, images or compute"),
    "search": Command("search", "main", "look for an encoder by many short trainings, scored by kNN or without labels"),
    "verify": Command("verify", "main", "check that several processes compute what one would"),
    "views": Command("views", "main", "show what the augmentation makes of some images"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    0: done; 2: the user's to mend; 1: ended by the machine; 143: ended by a signal, with a checkpoint.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_table())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        return fail(f"unknown command {name!r}; {hint}")
    # Before torch is there: a peer that goes makes its sockets write a stack, beside the one line that names the peer.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        command = COMMANDS[name]
        getattr(import_module(f"simclr_scale.cli.{command.module}"), command.function)(rest)
    except InputError as error:
        return fail(str(error), name)
    except RunFailed as error:
        # What kills a process on one rank need not happen on the first.
        print(f"{PROGRAM} {name}: error: {error}", file=sys.stderr)
        return 1
    except Preempted as error:
        if _is_first_rank():
            print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return 143
    return 0


def fail(message: str, command: str = "") -> int:
    """Prints one line on standard error, on the first rank alone, and returns the exit status for bad input."""
    if _is_first_rank():
        # From a loader's worker, the message comes at the end of that process's traceback.
        one_line = " ".join(message.rpartition(f"{InputError.__module__}.{InputError.__name__}: ")[2].split())
        print(f"{PROGRAM}{f' {command}' if command else ''}: error: {one_line}", file=sys.stderr)
    return 2


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))) == "0"


def _table() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [options]

Self-supervised contrastive pretraining of image encoders.

commands:
{rows}

{PROGRAM} COMMAND --help    the options of a command
{PROGRAM} --version         the version"""
