"""``simclr-scale search``: which encoder learns best from these images, by many short trainings."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.cli.pretrain import PretrainCLI, quieten
from simclr_scale.cli.recipes import find_recipe
from simclr_scale.cli.search_trials import SearchWork, run_workers
from simclr_scale.errors import InputError
from simclr_scale.evaluation import LabelBudget, require_new_file
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.scaling.pictures import require_new_picture
from simclr_scale.scaling.search.report import SearchReport, draw
from simclr_scale.scaling.search.score import Score
from simclr_scale.scaling.search.space import SearchSpace, read_space
from simclr_scale.scaling.search.study import PRUNERS, open_folder, require_optuna

_OF_PRETRAIN = re.compile(
    r"--(?:(?:data|model|trainer|knn|checkpoint)\.[\w.]+|seed_everything|threads|max_bad_steps)(=|$)"
)
_OF_THE_SEARCH = ("--model.encoder", "--model.head", "--trainer.devices", "--knn.every_n_epochs", "--trainer.num_nodes")
_SCORES_OF_A_RUN = 4

EPILOG = """\
Options of pretrain (--data.*, --model.*, --trainer.*, --knn.*, --checkpoint.*, --threads, ...) go to every trial; so
does the recipe, but for its encoder and head. A space is a YAML file of lists encoders, widths and heads, where an
encoder may be a mapping of its name and further arguments; or the options of those names.

examples:
  simclr-scale search --folder searches/one --config cifar10_tiny --data.source hfds/PATH \\
      --encoders simclr_resnet_tiny,resnet10t --widths 0.5,1,2 --heads 128x2,128x3 --trials 8
  simclr-scale search --folder searches/two --config cifar10_small --data.source FOLDER --space space.yaml \\
      --score rankme --workers 2
  simclr-scale search --folder searches/one ... --trials 16 --validate linear    # the same search, further
"""


def main(argv: list[str]) -> None:
    """``simclr-scale search``."""
    own, of_trials = _split(argv)
    parser = _parser()
    given = parser.parse_args(own)
    require_optuna()
    _check(given)
    output = require_new_file(given.output) if given.output is not None else None
    plot = require_new_picture(given.plot) if given.plot is not None else None
    quieten()
    work = _work(given, of_trials)
    run_workers(work, given.workers, given.validate is not None)
    report = SearchReport.of(work.study(), given.score)
    report.print_table()
    if output is not None:
        write_json(report.as_json(), output)
    if plot is not None:
        draw(report, plot)


def _parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="simclr-scale search",
        usage="%(prog)s --folder FOLDER --config RECIPE --encoders A,B [options] [options of pretrain]",
        description="Look for an encoder by many short trainings, scored by kNN or, without labels, by RankMe.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--folder", type=str, required=True, help="of the search; one that is there goes on")
    add("--config", type=str, required=True, help="recipe of a trial: a name, or a YAML file")
    add("--encoders", type=str | None, help="names, such as simclr_resnet_tiny,resnet10t")
    add("--widths", type=str | None, help="multipliers of the channels of simclr_resnet*; default: 1")
    add("--heads", type=str | None, help="projection heads, OUTxLAYERS; default: 128x2")
    add("--space", type=str | None, help="YAML file of encoders, widths and heads, in place of those options")
    add("--trials", type=int, default=20, help="candidates to try; all, where there are fewer")
    add("--score", type=Score, default="knn", help="knn (labels of the train part vote) or rankme (no labels)")
    add("--score_every", type=int | None, help="epochs between scores; default: a quarter of all")
    add("--pruner", type=Literal[PRUNERS], default="median", help="ends bad trials early: median, halving, none")
    add("--workers", type=int, default=1, help="processes on this machine, each with a trial of its own")
    add("--seed", type=int, default=0, help="of the choice of candidates")
    add("--validate", type=Literal["linear"] | None, help="linear: evaluate all complete trials so, at the end")
    add("--validate_labels", type=str, default="1.0", help="labels for it: a fraction, or as in 5-shot")
    add("--output", type=str | None, help="file of the JSON report; must not exist")
    add("--plot", type=str | None, help="picture of linear accuracy over scores (.png, ...); must not exist")
    return parser


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options of the search, and those of every trial."""
    own: list[str] = []
    of_trials: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        match = _OF_PRETRAIN.match(argument)
        if match is None:
            own.append(argument)
            continue
        if argument.startswith(_OF_THE_SEARCH):
            raise InputError(
                f"{argument.partition('=')[0]} is the search's own: encoders and heads come from its space"
            )
        of_trials.append(argument)
        if not match[1] and rest and not rest[0].startswith("--"):
            of_trials.append(rest.pop(0))
    return own, of_trials


def _check(given: Any) -> None:
    for name, least in {"trials": 1, "workers": 1, "score_every": 1, "seed": 0}.items():
        if given[name] is not None and given[name] < least:
            raise InputError(f"--{name} must be at least {least}, got {given[name]}")
    LabelBudget.parse(given.validate_labels)
    if given.space is not None and any(given[name] is not None for name in ("encoders", "widths", "heads")):
        raise InputError("--space names encoders, widths and heads: leave out --encoders, --widths and --heads")
    if given.space is None and given.encoders is None:
        raise InputError("give --encoders A,B or --space FILE: what to choose from")


def _work(given: Any, of_trials: list[str]) -> SearchWork:
    """What workers need to know, with everything checked that can be before a trial."""
    space = _space(given)
    recipe = _recipe(given.config)
    space.check(recipe)
    looked = _LookCLI(space, recipe, of_trials)
    epochs = looked.config.trainer.max_epochs
    if not epochs or epochs < 1:
        raise InputError("search: a trial needs an end: give --trainer.max_epochs")
    if given.score == "knn" or given.validate:
        _require_labels(looked, "--validate linear" if given.score != "knn" else "--score knn")
    settings = {
        "space": space.as_json(),
        "recipe": recipe,
        "options": of_trials,
        "score": given.score,
        "score_every": given.score_every or max(1, epochs // _SCORES_OF_A_RUN),
        "pruner": given.pruner,
        "seed": given.seed,
    }
    folder = Path(given.folder)
    found = open_folder(folder, settings)
    print(f"{'going on with' if found else 'new'} search {folder}", flush=True)
    return SearchWork(str(folder), settings, given.trials, given.validate_labels)


def _space(given: Any) -> SearchSpace:
    if given.space is not None:
        content = read_space(Path(given.space))
    else:
        content = {name: given[name].split(",") for name in ("encoders", "widths", "heads") if given[name] is not None}
        content = {name: [value for value in values if value] for name, values in content.items()}
    return SearchSpace.of(content.get("encoders", []), content.get("widths", [1.0]), content.get("heads", ["128x2"]))


def _recipe(name: str) -> dict[str, Any]:
    path = find_recipe("pretrain", name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: it cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: it holds no keys with values")
    return dict(content)


def _require_labels(looked: "_LookCLI", wanted_by: str) -> None:
    if not (looked.datamodule.open_training_images().labels >= 0).any():
        raise InputError(f"{wanted_by} needs labels, and {looked.config.data.source} has none: take --score rankme")


class _LookCLI(PretrainCLI):
    """Parses and builds what the first trial would be, and trains nothing: its mistakes are those of every trial."""

    program = "simclr-scale search"

    def __init__(self, space: SearchSpace, recipe: Mapping[str, Any], of_trials: list[str]) -> None:
        candidate = next(space.candidates())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trial.yaml"
            file.write_text(yaml.safe_dump(space.recipe_of(candidate, recipe)), encoding="utf-8")
            super().__init__(["--config", str(file), *of_trials])

    def before_instantiate_classes(self) -> None:
        self.refuse_accumulation()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None
