"""``simclr-scale scorecard``: every evaluation of one or several encoders, in one table and one JSON."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from simclr_scale.cli.evaluated import EvaluationData, chosen_device, open_evaluated
from simclr_scale.cli.health import augmentation_for
from simclr_scale.cli.parsing import parser_of
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation.health_report import HealthReport, evaluate_health
from simclr_scale.evaluation.scorecard import DEFAULT_TASKS, Evaluated, Scorecard, Task
from simclr_scale.evaluation.scorecard_plots import plot_labels, plot_sizes
from simclr_scale.evaluation.scorecard_run import Entrant, Protocol, Work, doable, evaluate
from simclr_scale.evaluation.scorecard_text import markdown, print_tables
from simclr_scale.evaluation.scorecard_transfer import Transfers

CARD, TEXT = "scorecard.json", "scorecard.md"
_EVALUATIONS, _FEATURES = "evaluations", "features"


def main(argv: list[str]) -> None:
    """``simclr-scale scorecard``."""
    usage = "--encoder ENCODER [--encoder ENCODER ...] --data.source SOURCE --output FOLDER [options]"
    parser = parser_of("scorecard", run_scorecard, usage, skip={"encoders"})
    parser.add_argument(
        "--encoder",
        action="append",
        required=True,
        help="a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS; "
        "of several, the others are compared with the first",
    )
    arguments = vars(parser.parse_args(argv))
    data = EvaluationData(**vars(arguments.pop("data")))
    run_scorecard(arguments.pop("encoder"), data, **arguments)


def run_scorecard(
    encoders: list[str],
    data: EvaluationData,
    output: str,
    tasks: str | None = None,
    suite: str | None = None,
    root: str | None = None,
    suite_labels: str = "1.0",
    health: bool = True,
    k: int = 200,
    temperature: float = 0.07,
    seeds: int | None = None,
    seed: int = 0,
    finetune_epochs: int | None = None,
    finetune_learning_rate: float | None = None,
    finetune_batch_size: int | None = None,
    resamples: int = 2000,
    permutations: int = 100_000,
    batch_size: int = 256,
    device: str = "auto",
    cache: str | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """Put everything about one or several encoders on one card: kNN, linear, few labels, health, and how sure it is.

    Args:
        encoders: as `load_encoder` takes them.
        data: the labelled images.
        output: folder of scorecard.json, scorecard.md and the plots; one that an interrupted call has left is gone on
            with, and one that holds a scorecard is refused.
        tasks: knn, linear or finetune, each for all labels or, after an @, for few, as in knn,linear@0.1,linear@5-shot;
            where not given, knn,linear,linear@0.1,linear@0.01,linear@5-shot as far as the labels reach.
        suite: data sets to transfer to as well, as for the command transfer; none where not given.
        root: folder in which the data sets of the suite lie.
        suite_labels: the labels used of them, as in 5-shot,1.0.
        health: measure RankMe, alpha-ReQ, alignment and uniformity too, which needs no labels.
        k: neighbours that vote, with few labels as many as there are at most.
        temperature: of their weights, exp(similarity / temperature).
        seeds: draws of few labels; 5 of k-shot, else 1, where not given.
        seed: of the first draw, and of the parts that choices are made on.
        finetune_epochs: of the task finetune; SimCLR's where not given, 60 with less than 5% of the labels and else 30.
        finetune_learning_rate: times batch / 256; SimCLR's .05 where not given.
        finetune_batch_size: images a step, at most the labelled ones; 256 where not given.
        resamples: of the bootstrap that gives the intervals.
        permutations: of the test between two encoders.
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        cache: folder in which features are kept; where not given, one below the output that goes with the end.
        allow_missing_classes: goes on where a class has no training or no test image; see the notes on the card.
    """
    folder = Path(output)
    _require_no_card(folder)
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    for name, count in {"resamples": resamples, "permutations": permutations}.items():
        if count < 1:
            raise InputError(f"--{name} must be at least 1, got {count}")
    wanted = [Task.parse(text) for text in (tasks or ",".join(DEFAULT_TASKS)).split(",")]
    for task in wanted:
        task.budget.seeds(seeds if task.budget.is_drawn else None, seed)
    repeated = [spec for spec in encoders if encoders.count(spec) > 1]
    if repeated:
        raise InputError(f"--encoder {repeated[0]} is given twice")
    with launched_ranks() as ranks, killed_workers_explained():
        there = chosen_device(device)
        entrants = [Entrant(spec, *open_evaluated(spec, data)) for spec in encoders]
        _require_same_images(entrants)
        protocol = Protocol(
            k,
            temperature,
            seeds,
            seed,
            finetune_epochs,
            finetune_learning_rate,
            finetune_batch_size,
            allow_missing_classes,
        )
        possible, skipped = doable(entrants, wanted, protocol, skip=tasks is None)
        transfers = None if suite is None else Transfers.plan(entrants, suite, root, suite_labels.split(","), protocol)
        work = Work(batch_size, data.workers(entrants[0].train), there, cache or folder / _FEATURES)
        if ranks.rank == 0:
            (folder / _EVALUATIONS).mkdir(parents=True, exist_ok=True)
        results: dict[Task, Sequence[Evaluated]] = {
            task: [evaluate(entrant, task, protocol, work, folder / _EVALUATIONS) for entrant in entrants]
            for task in possible
        }
        if transfers is not None:
            found, left_out = transfers.run(entrants, work)
            results, skipped = results | found, skipped | left_out
        if ranks.rank:
            return
        card = Scorecard.of(
            [entrant.contestant() for entrant in entrants],
            results,
            published_transfer={} if transfers is None else transfers.published(),
            health=[_health(entrant, data, work).as_dict() for entrant in entrants] if health else (),
            skipped=skipped,
            settings={
                "tasks": [str(task) for task in possible],
                **vars(protocol),
                "batch_size": batch_size,
                "device": str(there),
                "suite": suite,
                "suite_labels": suite_labels if suite else None,
            },
            resamples=resamples,
            permutations=permutations,
            seed=seed,
        )
    _write(card, folder)
    if cache is None:
        shutil.rmtree(folder / _FEATURES, ignore_errors=True)
    print_tables(card)
    print(f"In {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _require_no_card(folder: Path) -> None:
    if (folder / CARD).exists():
        raise InputError(f"{folder} holds a scorecard already; results are never overwritten, so name another folder")
    if folder.is_file():
        raise InputError(f"--output {folder} is a file; wanted a folder")
    ours = {_EVALUATIONS, _FEATURES, TEXT, "labels.png", "sizes.png"}
    if folder.is_dir() and (others := {path.name for path in folder.iterdir()} - ours):
        raise InputError(f"--output {folder} holds other things ({min(others)}); name a new folder")
    if not folder.parent.is_dir():
        raise InputError(f"--output {folder}: there is no folder {folder.parent}")


def _require_same_images(entrants: list[Entrant]) -> None:
    first, *others = entrants
    for other in others:
        if other.images[1] != first.images[1]:
            raise InputError(
                f"--encoder {other.spec} takes other test images than {first.spec}, "
                "so there is nothing to compare: give each a scorecard of its own"
            )


def _health(entrant: Entrant, data: EvaluationData, work: Work) -> HealthReport:
    return evaluate_health(
        entrant.encoder,
        entrant.transform,
        entrant.test,
        augmentation_for(entrant.transform, None),
        seed=data.seed,
        batch_size=work.batch_size,
        num_workers=work.num_workers,
        device=work.device,
        spec=entrant.spec,
    )


def _write(card: Scorecard, folder: Path) -> None:
    """The card last: with it the folder is whole."""
    for name in (TEXT, "labels.png", "sizes.png"):
        (folder / name).unlink(missing_ok=True)  # of a call that was interrupted here
    (folder / TEXT).write_text(markdown(card), encoding="utf-8")
    if card.rows:
        plot_labels(card, folder / "labels.png")
        plot_sizes(card, folder / "sizes.png")
    card.write(folder / CARD)
