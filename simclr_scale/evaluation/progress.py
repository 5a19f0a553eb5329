"""How far a long evaluation is: a bar on a terminal, one plain line at the end of each stage elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from simclr_scale.distributed import world


@contextmanager
def show_progress(stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields a function to be told how much of `total` is done. Writes to standard error: results go to the other.

    Only the first of several ranks writes.
    """
    if world().rank:
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    started = time.perf_counter()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
            bar = bars.add_task(stage, total=total)
            yield lambda done: bars.update(bar, completed=done)
    else:
        yield lambda _done: None
        console.print(f"{stage}: {total:,} {unit} in {time.perf_counter() - started:.1f} s", highlight=False)
