"""The plan as a person reads it."""

from typing import TYPE_CHECKING

from simclr_scale.scaling.plan.planning import HEADLINE_DEVICES, SPARE, Plan

if TYPE_CHECKING:
    from rich.console import Console


def print_plan(plan: Plan, console: "Console | None" = None) -> None:
    """Three tables: memory, training, time."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    if not console.is_terminal:
        console = Console(width=120)
    sections = {"memory of a rank": memory_lines(plan), "training": training_lines(plan), "time": time_lines(plan)}
    for title, lines in sections.items():
        table = Table(title, "", box=box.ROUNDED)
        for name, value in lines:
            table.add_row(name, value)
        console.print(table)


def memory_lines(plan: Plan) -> list[tuple[str, str]]:
    """Parts, their sum at the worst moment, and what fits."""
    lines = [(name, size(nbytes)) for name, nbytes in plan.memory.items()]
    lines.append(("peak of a step", f"{size(plan.peak_bytes)} (gradients replace activations as backward goes on)"))
    verdict = "fits" if plan.fits else "does NOT fit"
    lines.append(("device", f"{size(plan.device_bytes)}, of which {SPARE:.0%} is left alone: it {verdict}"))
    if plan.largest_chunk is None:
        lines.append(("largest chunk", "not even 2 views fit; take fewer images a rank, or a smaller encoder"))
    else:
        rows = 2 * plan.images_of_a_rank
        how = "all views at once" if plan.largest_chunk == rows else f"--model.chunk_size {plan.largest_chunk}"
        lines.append(("largest chunk", f"{plan.largest_chunk:,} of {rows:,} views: {how}"))
    return lines


def training_lines(plan: Plan) -> list[tuple[str, str]]:
    """What is trained, how often and at which rate."""
    sent = plan.sent_bytes_per_step
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("images of a rank", f"{plan.images_of_a_rank:,} on each of {plan.ranks:,}"),
        ("negatives of a row", f"{plan.negatives:,}"),
        ("steps", f"{plan.steps:,}, {plan.steps_an_epoch:,} an epoch, {plan.warmup_steps:,} of warm-up"),
        ("learning rate", f"{plan.learning_rate:g} at its peak"),
        ("arithmetic", f"{plan.flops_of_a_step / 1e12:,.4g} TFLOP a step of a rank"),
        ("sent by a rank", "not known for this loss" if sent is None else f"{sent / 1e6:,.1f} MB a step"),
    ]


def time_lines(plan: Plan) -> list[tuple[str, str]]:
    """Measured times, where there are any, beside the published run."""
    lines = []
    if plan.seconds_per_step and plan.seconds_per_epoch and plan.seconds and plan.images_per_second:
        measured = f"{plan.measured_images:,} images on {plan.device}"
        lines = [
            ("step", f"{plan.seconds_per_step:.4g} s, from {measured}; reading and talk between ranks come on top"),
            ("epoch", duration(plan.seconds_per_epoch)),
            ("all", duration(plan.seconds)),
            (
                "images/s",
                f"{plan.images_per_second:,.1f}, {plan.images_per_second_per_device:,.1f} a device: "
                f"{plan.images_per_second_per_device / plan.headline_per_device:.3g} of SimCLR's on a TPU v3 core"
                if plan.images_per_second_per_device
                else "",
            ),
        ]
    lines.append(
        (
            "SimCLR's 1.5 h",
            f"{plan.headline_images_per_second:,.0f} images/s on {HEADLINE_DEVICES} TPU v3 cores, "
            f"{plan.headline_per_device:.1f} a core; at that rate this would take {duration(plan.headline_seconds)}",
        )
    )
    needed = f"{plan.headline_flops_per_device / 1e12:,.3g} TFLOP/s on every device"
    lines.append(("to keep up a device", f"{needed}, sustained, with this encoder and image size"))
    return lines


def size(nbytes: float) -> str:
    """Bytes as a person says them."""
    for unit, of in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= of:
            return f"{nbytes / of:,.2f} {unit}"
    return f"{nbytes / 1024:,.1f} KiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, of in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * of:
            return f"{seconds / of:,.3g} {unit}" if seconds < 1000 * of else f"{seconds / of:,.0f} {unit}"
    return f"{seconds:.3g} s"
