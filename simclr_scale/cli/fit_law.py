"""``simclr-scale fit-law``: the scaling law of runs."""

from typing import Literal

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.scaling.error_laws import fit_law
from simclr_scale.scaling.error_laws.fitting import RESAMPLES
from simclr_scale.scaling.error_laws.points import Axis, all_points, differing_settings
from simclr_scale.scaling.error_laws.report import LawReport, draw
from simclr_scale.scaling.error_laws.runs import Measure
from simclr_scale.scaling.pictures import require_new_picture

EPILOG = """forms:
  power  y = E + A x^-alpha
  m4     (y - E) / (y0 - y)^a = b x^-c, which saturates at both ends
  bnsl   E + b x^-c0 (1 + (x / d)^(1/f))^(-c1 f), which turns once

examples:
  simclr-scale fit-law runs/width-* --axis params --plot law.png
  simclr-scale fit-law runs/*/linear.json --axis data --measure linear --form m4 --ceiling 0.9 --output law.json
  simclr-scale fit-law published.csv --axis compute --predict 1e20,1e21

A table has the columns params, data (images) or compute (FLOP), and error, accuracy (0 to 1) or loss; a loss also needs
global_batch_size and temperature.
"""


def main(argv: list[str]) -> None:
    """``simclr-scale fit-law``."""
    parser = OneLineErrors(
        prog="simclr-scale fit-law",
        usage="%(prog)s RUN [RUN ...] --axis AXIS [options]",
        description="Fit a scaling law to the errors of runs: parameters with intervals, and how far it foresees.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "runs", nargs="+", type=str, help="folder of a run, manifest of its evaluation, or a .csv table of points"
    )
    parser.add_argument("--axis", type=Axis, required=True, help="params, data or compute: what x is")
    parser.add_argument("--form", type=Literal["power", "m4", "bnsl"], default="power", help="of the law, see below")
    parser.add_argument("--measure", type=Measure, default="knn", help="y: 1 - accuracy of knn or linear; or the loss")
    parser.add_argument("--ceiling", type=float | None, help="error of guessing, such as 0.9, for m4; else fitted")
    parser.add_argument("--hold_out", type=int | None, help="largest sizes to foresee; default: a fifth of them")
    parser.add_argument("--predict", type=str | None, help="sizes to predict y at, such as 1e6,1e7")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--output", type=str | None, help="file of the JSON report; must not exist")
    parser.add_argument("--plot", type=str | None, help="picture to draw (.png, .pdf, .svg, .jpg); must not exist")
    given = parser.parse_args(argv)
    output = require_new_file(given.output) if given.output is not None else None
    plot = require_new_picture(given.plot) if given.plot is not None else None
    wanted = _sizes(given.predict)
    points = all_points(given.runs, given.axis, given.measure)
    fit = fit_law(
        [point.x for point in points],
        [point.y for point in points],
        given.form,
        ceiling=given.ceiling,
        hold_out=given.hold_out,
        resamples=given.resamples,
        level=given.level,
        seed=given.seed,
    )
    differing = differing_settings(points)
    notes = (f"the runs differ in {', '.join(differing)} too",) if differing else ()
    report = LawReport(fit, tuple(points), given.axis, given.measure, wanted, notes)
    report.print_table()
    if output is not None:
        write_json(report.as_json(), output)
    if plot is not None:
        draw(report, plot)


def _sizes(text: str | None) -> tuple[float, ...]:
    try:
        sizes = tuple(float(size) for size in text.split(",")) if text is not None else ()
    except ValueError:
        sizes = (0.0,)
    if not all(0 < size < float("inf") for size in sizes):
        raise InputError(f"--predict {text}: wanted sizes above 0, such as 1e6,1e7")
    return sizes
