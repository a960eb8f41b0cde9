"""Progress of long work: one bar, on rank zero, where somebody watches; log lines otherwise."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from curated_data.distributed import rank


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar for the block; yields `advance(n=1, note="")`, which does nothing where no terminal is
    attached.

    Args:
        description: what is being done, as shown at the left.
        total: how many steps make it whole; None where that is not known.
        unit: what is counted; adds a rate (`unit`/s) to the bar.
    """
    if rank() != 0 or not sys.stderr.isatty():
        yield lambda n=1, note="": None
        return
    from rich.console import Console

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            if not note and unit:
                speed = bar.tasks[0].speed
                note = f"{speed:,.0f} {unit}/s" if speed else ""
            bar.update(task, advance=n, note=note)

        yield advance
