"""Progress bars for long work, on rank zero and in a terminal only; and logging to the terminal."""

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


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar for the block; yields `advance(n=1, note="")`, which does nothing without a terminal.

    Args:
        description: of the work, shown on the left.
        total: number of steps; None if unknown.
        unit: what is counted; adds a rate in `unit`/s to the bar.
    """
    from curated_data.parallel import rank  # here, because it imports torch, which takes seconds

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
    """Print plain log lines. For programs, which own the process's logging; a library must not call it."""
    logging.basicConfig(level=level, format="%(message)s")
    # On import, faiss logs every instruction set that its wheel was not built for.
    logging.getLogger("faiss.loader").setLevel(max(level, logging.WARNING))
