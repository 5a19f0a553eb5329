"""``simclr-scale transfer``: encoders on the data sets of a suite."""

from simclr_scale.bundle import load_encoder
from simclr_scale.cli.evaluated import check_before_work, chosen_device
from simclr_scale.cli.parsing import parser_of
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.workers import default_workers, killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import LabelBudget
from simclr_scale.evaluation.suites import load_suite
from simclr_scale.evaluation.transfer import TransferResult, plan_transfer
from simclr_scale.evaluation.transfer_report import TransferReport


def main(argv: list[str]) -> None:
    """``simclr-scale transfer``."""
    parser = parser_of("transfer", run_transfer, "--encoder ENCODER --suite SUITE [options]", skip={"encoder"})
    parser.add_argument(
        "--encoder",
        action="append",
        required=True,
        help="a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS; "
        "given several times, a column for each",
    )
    arguments = vars(parser.parse_args(argv))
    run_transfer(**arguments)


def run_transfer(
    encoder: list[str],
    suite: str,
    root: str | None = None,
    labels: str = "1.0",
    seeds: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = None,
    device: str = "auto",
    output: str | None = None,
    cache: str | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """Score encoders by linear classifiers on the data sets of a suite, each by its own metric.

    Args:
        encoder: one or several.
        suite: a file that names data sets, or a suite that is shipped, twelve.
        root: folder in which the data sets lie; the working directory where not given.
        labels: those used of the training images: fractions and k of every class, as in 1-shot,10-shot,1.0.
        seeds: draws of the labels; 5 of k-shot, else 1, where not given.
        seed: of the first draw, of the part that choices are made on, and of splits that a set lacks.
        batch_size: images a forward.
        num_workers: processes that decode images; one a core, up to 8, where not given.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON with all manifests; must not exist.
        cache: folder in which features and fits are kept, so that a call that was killed goes on.
        allow_missing_classes: goes on where a class has no training or no test image; see the note in the manifest.
    """
    check_before_work(output, batch_size)
    if num_workers is not None and num_workers < 0:
        raise InputError(f"--num_workers must be 0 or above, got {num_workers}")
    twice = next((spec for spec in encoder if encoder.count(spec) > 1), None)
    if twice is not None:
        raise InputError(f"--encoder {twice}: is given twice")
    budgets = [part.strip() for part in labels.split(",")]
    parsed = [str(LabelBudget.parse(budget)) for budget in budgets]
    if len(set(parsed)) < len(parsed):
        raise InputError(f"--labels {labels}: names one budget twice")
    chosen = load_suite(suite)
    loaded = {spec: load_encoder(spec) for spec in encoder}
    plans = {
        spec: plan_transfer(
            transform,
            chosen,
            root=root,
            labels=budgets,
            seeds=seeds,
            seed=seed,
            allow_missing_classes=allow_missing_classes,
        )
        for spec, (_, transform) in loaded.items()
    }
    results: list[TransferResult] = []
    with launched_ranks() as ranks, killed_workers_explained():
        for spec, plan in plans.items():
            results += plan.run(
                loaded[spec][0],
                batch_size=batch_size,
                num_workers=default_workers() if num_workers is None else num_workers,
                device=chosen_device(device),
                spec=spec,
                cache=cache,
            )
    if ranks.rank:
        return
    report = TransferReport(chosen, results)
    report.print_table()
    if output is not None:
        report.write(output)
