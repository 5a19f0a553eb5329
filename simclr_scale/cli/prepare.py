"""``simclr-scale prepare``: packs a data set once, so that training reads it fast."""

import os
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.data.packing import Packing, Report, pack
from simclr_scale.data.sources.opening import open_parts
from simclr_scale.data.sources.packed import BAD_FILES, damaged_shards, read_index
from simclr_scale.data.workers import default_workers
from simclr_scale.errors import InputError

_LINE_EVERY_SECONDS = 15.0


@dataclass
class PackingData:
    """The images to pack.

    Attributes:
        source: a folder, torch/NAME, hfds/PATH_OR_ID or wds/PATTERN.
        root: where relative folders and torch/NAME are looked for.
        train_split: name of the split to train on; found where not given.
        test_split: name of the held-out split; found where not given.
        image_key: column of images, or their extension in shards; found by type where not given.
        label_key: column of labels, or their extension or field in shards; found by type where not given.
    """

    source: str | None = None
    root: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_key: str | None = None
    label_key: str | None = None


def main(argv: list[str]) -> None:
    """``simclr-scale prepare``."""
    parser = OneLineErrors(
        prog="simclr-scale prepare",
        usage="%(prog)s --data.source SOURCE --output DIR [options]",
        description="Pack a data set once into shards of small images. The same command goes on after a stop.",
    )
    parser.add_function_arguments(run_prepare, as_group=False)
    arguments = vars(parser.parse_args(argv))
    data = PackingData(**vars(arguments.pop("data")))
    run_prepare(data=data, **arguments)


def run_prepare(
    data: PackingData,
    output: str | None = None,
    size: int = 256,
    quality: int = 90,
    lossless: bool = False,
    images_per_shard: int = 1000,
    num_workers: int | None = None,
    verify: bool = False,
) -> None:
    """Pack a data set once into shards of small images.

    Args:
        data: the images.
        output: the folder to write; new, empty, or of the same command.
        size: the shorter side of a packed image, in pixels; smaller images keep their size.
        quality: of the JPEGs, 1 to 95.
        lossless: write PNGs instead, several times as large.
        images_per_shard: images in one shard.
        num_workers: processes that decode and encode; one a core, up to 8, where not given.
        verify: read the folder given by --output and compare the checksum of every shard, nothing else.
    """
    if output is None:
        raise InputError("give --output DIR, the folder to write" + (" or to verify" if verify else ""))
    if verify:
        if data.source is not None:
            raise InputError("--verify true reads --output alone: leave out --data.source")
        _verify(output)
        return
    if data.source is None:
        raise InputError("give --data.source, the images to pack")
    if num_workers is not None and num_workers < 0:
        raise InputError(f"--num_workers must be 0 or above, got {num_workers}")
    packing = Packing(size, quality, lossless, images_per_shard)
    parts = open_parts(
        data.source,
        root=data.root,
        train_split=data.train_split,
        test_split=data.test_split,
        image_key=data.image_key,
        label_key=data.label_key,
    )
    print(f"packing {data.source} into {output}: " + ", ".join(f"{name} {len(part):,}" for name, part in parts.items()))
    workers = default_workers() if num_workers is None else num_workers
    try:
        with _Bar() as bar:
            report = pack(parts, output, packing, spec=data.source, num_workers=workers, progress=bar.show)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        raise SystemExit(130) from None
    _print(report, output)


def _verify(folder: str) -> None:
    index = read_index(folder)
    damaged = damaged_shards(index)
    if damaged:
        raise InputError(
            f"{damaged[0]}: damaged{f', and {len(damaged) - 1} more' if len(damaged) > 1 else ''}; "
            "the command that wrote it makes it again"
        )
    images = sum(entry["images"] for entry in index.shards)
    print(f"{folder}: {len(index.shards)} shards with {images:,} images are as they were written")


def _print(report: Report, output: str) -> None:
    if report.found:
        print(f"{report.found} of {report.shards} shards were there already, and are as they were written")
    print(f"packed {report.images:,} images in {report.shards} shards, {report.bytes / 1e6:,.1f} MB")
    if report.unreadable:
        print(f"unreadable: {report.unreadable:,}; {os.path.join(output, BAD_FILES)} says which and why")
    print(f"use them by --data.source {output}")


class _Bar:
    """Progress: a bar on a terminal, a line now and then in a file."""

    def __init__(self) -> None:
        self._console = Console()
        self._bar: Progress | None = None
        self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "_Bar":
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("")
            self._bar.start()
        return self

    def show(self, done: int, total: int, unreadable: int) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        elapsed = now - self._first[0]
        rate = f"{(done - self._first[1]) / elapsed:,.0f} images/s" if elapsed > 1 else ""
        text = "  ".join(filter(None, [rate, f"{unreadable} unreadable" if unreadable else ""]))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif now - self._shown > _LINE_EVERY_SECONDS:
            self._shown = now
            print("  ".join(filter(None, [f"{done:,} of {total:,} images", text])), flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
