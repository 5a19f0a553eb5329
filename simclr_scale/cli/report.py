"""``simclr-scale report``: runs side by side."""

from typing import get_args

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.scaling.pictures import require_new_picture
from simclr_scale.scaling.plots import draw
from simclr_scale.scaling.report import Mode, ScalingReport, find_series
from simclr_scale.scaling.runs import all_runs

EPILOG = """examples:
  simclr-scale report runs/one runs/two runs/four --plot scaling.png
  simclr-scale report imagenet_large_batch --epochs 90
  simclr-scale report runs/one stated.csv --output report.json

A table of stated runs has the columns name, devices, batch and seconds_per_step (or device_months alone), and may have
steps, train_images, hardware, software, stated_minutes, accuracy.
"""


def main(argv: list[str]) -> None:
    """``simclr-scale report``."""
    parser = OneLineErrors(
        prog="simclr-scale report",
        usage="%(prog)s RUN [RUN ...] [options]",
        description="Set runs side by side: rates, strong and weak efficiency, serial fraction, time to N epochs.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "runs", nargs="+", type=str, help="folder of a run, or a .csv, .json or .yaml table of stated runs"
    )
    parser.add_argument("--epochs", type=float, default=100, help="N of the time to N epochs")
    parser.add_argument("--mode", type=Mode, default="auto", help=f"{', '.join(get_args(Mode))}: what to compare by")
    parser.add_argument("--output", type=str | None, help="file of the JSON report; must not exist")
    parser.add_argument("--plot", type=str | None, help="picture to draw (.png, .pdf, .svg, .jpg); must not exist")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.epochs < float("inf"):
        raise InputError(f"--epochs must be above 0, got {arguments.epochs}")
    output = require_new_file(arguments.output) if arguments.output is not None else None
    plot = require_new_picture(arguments.plot) if arguments.plot is not None else None
    runs = all_runs(arguments.runs)
    report = ScalingReport(tuple(runs), tuple(find_series(runs, arguments.mode)), arguments.epochs)
    report.print_table()
    if output is not None:
        write_json(report.as_json(), output)
    if plot is not None:
        draw(report, plot)
