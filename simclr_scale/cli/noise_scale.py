"""``simclr-scale noise-scale``: the gradient noise scale at the checkpoints of a run."""

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.cli.pretrain import quieten
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.cli.saved_runs import SavedRunCLI, load_weights, open_run, run_of
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file
from simclr_scale.evaluation.manifest import library_versions, write_json
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.losses import GroupedNegatives
from simclr_scale.scaling.hardware import best_device, device_name
from simclr_scale.scaling.noise_scale.checkpoints import Measurement, measure
from simclr_scale.scaling.noise_scale.measuring import MODES, check_mode
from simclr_scale.scaling.noise_scale.plots import draw_noise_scale
from simclr_scale.scaling.pictures import require_new_picture

EPILOG = """modes:
  probe      gradients of independent global batches at the checkpoint's weights; right for every loss
  jackknife  one batch after the other, whole and without each of --parts parts
  per_rank   gradients of the ranks of torchrun and their mean; wrong for NT-Xent with negatives from all ranks

examples:
  simclr-scale noise-scale --run runs/NAME --output noise.json --plot noise.png
  simclr-scale noise-scale --checkpoint runs/NAME/checkpoints/step=100.ckpt --batches 32 --batch_size 256
  simclr-scale noise-scale --run runs/NAME --batch_size 512 --negatives 64

Under torchrun name checkpoints: it takes --run for an option of its own.
Keep more than two checkpoints of a run to see it along training: pretrain --checkpoint.keep 20.
"""


def main(argv: list[str]) -> None:
    """``simclr-scale noise-scale``."""
    quieten()
    arguments = _parser().parse_args(argv)
    for name, least in {"batches": 2, "parts": 2, "draw": 0}.items():
        if arguments[name] < least:
            raise InputError(f"--{name} must be at least {least}, got {arguments[name]}")
    output = require_new_file(arguments.output) if arguments.output is not None else None
    plot = require_new_picture(arguments.plot) if arguments.plot is not None else None
    if arguments.mode not in MODES:
        raise InputError(f"--mode: there is no {arguments.mode!r}; there are {', '.join(MODES)}")
    folder, paths = run_of(arguments.run, arguments.checkpoint)
    options = [f"--data.{key}={arguments[key]}" for key in ("source", "root") if arguments[key] is not None]
    with launched_ranks() as ranks:
        cli = open_run(folder, options)
        model, data = cli.model, cli.datamodule
        batch = arguments.batch_size or data.global_batch_size
        negatives = arguments.negatives or batch
        if negatives != batch:
            model.loss = GroupedNegatives(model.loss, negatives)
            require_whole_groups(batch // ranks.size, negatives)
        check_mode(arguments.mode, model.loss, force=arguments.force, ranks=ranks.size)
        how = Measurement(
            mode=arguments.mode,
            batch=batch,
            batches=arguments.batches,
            parts=arguments.parts,
            draw=arguments.draw,
            bfloat16="bf16" in str(cli.config.trainer.precision),
        )
        rows = _measure_all(cli, paths, how, negatives)
        if ranks.rank:
            return
        content = {
            "run": folder.name,
            "mode": how.mode,
            "batches": how.batches,
            "source": data.source,
            "rows": rows,
            "environment": {"device": device_name(best_device()), "versions": library_versions()},
        }
        print_noise_scale(rows)
        if output is not None:
            write_json(content, output)
        if plot is not None:
            draw_noise_scale(rows, plot)


def _parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="simclr-scale noise-scale",
        usage="%(prog)s --run RUN | --checkpoint FILE [FILE ...] [options]",
        description="Measure the gradient noise scale at checkpoints of a run, on the run's own images.",
        epilog=EPILOG,
    )
    parser.add_argument("--run", type=str | None, help="folder of a run: all of its checkpoints")
    parser.add_argument("--checkpoint", type=str, nargs="+", help="checkpoints of one run")
    parser.add_argument("--mode", type=str, default="probe", help="probe, jackknife or per_rank, see below")
    parser.add_argument("--batch_size", type=int | None, help="images of a global batch; default: the run's")
    parser.add_argument(
        "--negatives", type=int | None, help="images among which negatives are taken; default: the batch"
    )
    parser.add_argument("--batches", type=int, default=16, help="independent batches")
    parser.add_argument("--parts", type=int, default=8, help="parts of a batch, of the jackknife")
    parser.add_argument("--draw", type=int, default=0, help="another number measures on other batches")
    parser.add_argument("--force", type=bool, default=False, help="measure per rank although the loss forbids it")
    parser.add_argument("--source", type=str | None, help="data set, where it is elsewhere now")
    parser.add_argument("--root", type=str | None, help="folder of torch/NAME data sets, where it is elsewhere now")
    parser.add_argument("--output", type=str | None, help="file of the JSON result; must not exist")
    parser.add_argument("--plot", type=str | None, help="picture to draw (.png, .pdf, .svg, .jpg); must not exist")
    return parser


def _measure_all(cli: SavedRunCLI, paths: list[Path], how: Measurement, negatives: int) -> list[dict[str, Any]]:
    device = torch.device("cpu") if cli.config.trainer.accelerator == "cpu" else best_device()
    cli.datamodule.setup()
    rows = []
    with show_progress("noise scale", len(paths), "checkpoints") as advance:
        for count, path in enumerate(paths, 1):
            checkpoint = load_weights_within(cli.model, path)
            estimate = measure(cli.model, cli.datamodule, how, device)
            shape = {"batch": how.batch, "negatives": negatives, "negatives_per_view": 2 * (negatives - 1)}
            at = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
            rows.append(at | shape | estimate.as_json())
            advance(count)
    return sorted(rows, key=lambda row: row["step"])


def load_weights_within(model: Any, path: Path) -> dict[str, Any]:
    """As :func:`load_weights`; a loss in groups has nothing that a checkpoint does not."""
    loss, model.loss = model.loss, model.loss.whole if isinstance(model.loss, GroupedNegatives) else model.loss
    try:
        return load_weights(model, path)
    finally:
        model.loss = loss


def require_whole_groups(images: int, negatives: int) -> None:
    if negatives < 2:
        raise InputError(f"--negatives: a group needs 2 images at least, got {negatives}")
    if images % negatives:
        raise InputError(
            f"--batch_size: {images} images (of a rank) do not divide into groups of {negatives} (--negatives)"
        )


def print_noise_scale(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """A line a checkpoint."""
    table = Table(title="gradient noise scale", box=box.ROUNDED)
    for name in ("step", "optimizer batch", "negatives a view", "noise scale", "95% interval", "|G|²", "S"):
        table.add_column(name, justify="right")
    for row in rows:
        scale, interval = row["noise_scale"], row["interval"]
        table.add_row(
            f"{row['step']:,}",
            f"{row['batch']:,}",
            f"{row['negatives_per_view']:,}",
            f"{scale:,.0f}" if scale is not None else "no signal: more --batches",
            f"{interval[0]:,.0f} to {interval[1]:,.0f}" if interval else "",
            f"{row['gradient_squared']:.3g}",
            f"{row['noise_of_one_image']:.3g}",
        )
    (console or Console()).print(table)
