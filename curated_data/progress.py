"""Progress of long work: one bar, on rank zero, where somebody watches; log lines otherwise."""

import contextlib
import logging
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


def log_to_terminal(level: int = logging.INFO) -> None:
    """Print log lines as they are: for programs, which own the process's logging; never for a library."""
    logging.basicConfig(level=level, format="%(message)s")
    # As it is imported, faiss tells of each instruction set that its wheel was not built for.
    logging.getLogger("faiss.loader").setLevel(max(level, logging.WARNING))
