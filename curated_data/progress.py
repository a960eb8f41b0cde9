"""What long work says while it runs, on rank zero: a bar in a terminal or a notebook, elsewhere a line of log
now and then; and where these lines go if the program has not configured logging.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

PERIOD = 60.0
"""Seconds between two lines about the same work."""

_package = logging.getLogger("curated_data")


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Callable[..., None]]:
    """Tell how far the block is; yields `advance(n=1, note="")`.

    Args:
        description: of the work, shown on the left.
        total: number of steps; None if unknown.
        unit: what is counted; adds a rate in `unit`/s to the bar.
    """
    from curated_data.parallel import rank  # here, because it imports torch, which takes seconds

    show_log()
    if rank() != 0 or not log.isEnabledFor(logging.INFO):
        yield lambda n=1, note="": None
    elif (console := _console()) is None:
        with _lines(description, total, unit) as advance:
            yield advance
    else:
        with _bar(console, description, total, unit) as advance:
            yield advance


def _console() -> "Console | None":
    """Where a bar can be drawn: a terminal, or a notebook that has widgets; None if nowhere."""
    from rich.console import Console

    if is_notebook():
        # Without widgets rich could only print a bar when it is full.
        return Console() if importlib.util.find_spec("ipywidgets") else None
    return Console(stderr=True) if sys.stderr.isatty() else None


def is_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextlib.contextmanager
def _bar(console: "Console", description: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    # A notebook shows the bar apart from what is printed; a terminal, only if it passes through the bar.
    apart = is_notebook()
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=not apart, redirect_stderr=not apart
    ) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            if not note and unit:
                speed = bar.tasks[0].speed
                note = f"{speed:,.0f} {unit}/s" if speed else ""
            bar.update(task, advance=n, note=note)

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """One line per minute, even while no step ends."""
    started, done, ended = time.monotonic(), 0, threading.Event()

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done
        done += n

    def watch() -> None:
        while not ended.wait(PERIOD):
            log.info("%s", line(description, done, total, unit, time.monotonic() - started))

    watching = threading.Thread(target=watch, name="curated_data progress", daemon=True)
    watching.start()
    try:
        yield advance
    finally:
        ended.set()
        watching.join()


def line(description: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    """How far some work is, with the time left at its mean speed so far.

    Examples:
        >>> line("embedding", 250, 1000, "images", 60)
        'embedding: 250 of 1,000 images (25 %), 3 min left'
    """
    what = f" {unit}" if unit else ""
    if not total:
        return f"{description}: {done:,}{what} in {_duration(seconds)}"
    text = f"{description}: {done:,} of {total:,}{what} ({100 * done / total:.0f} %)"
    if not done:
        return f"{text}, {_duration(seconds)} so far"
    return f"{text}, {_duration(seconds * max(total - done, 0) / done)} left"


def _duration(seconds: float) -> str:
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_log() -> None:
    """Let the package's log lines be seen on standard error, or in a notebook's cell, if nobody has
    configured logging.

    Does nothing if the root logger or the package's has a handler or the package's has a level. With
    `CURATED_DATA_QUIET` set, only warnings are shown, and no progress.
    """
    if os.environ.get("CURATED_DATA_QUIET", "0") not in ("", "0"):
        if _package.level == logging.NOTSET:
            _package.setLevel(logging.WARNING)
    elif _package.level == logging.NOTSET and not _package.hasHandlers():
        _package.setLevel(logging.INFO)
        _package.addHandler(_Unconfigured())


class _Unconfigured(logging.Handler):
    """Prints lines of rank zero, and warnings of every rank, until logging is configured after all."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        from curated_data.parallel import rank

        if logging.getLogger().handlers or (record.levelno < logging.WARNING and rank() != 0):
            return
        try:
            # Notebooks show standard error as if something had gone wrong.
            is_plain = record.levelno < logging.WARNING and is_notebook()
            print(self.format(record), file=sys.stdout if is_plain else sys.stderr, flush=True)
        except Exception:  # a closed stream, say, must not end the work
            self.handleError(record)


def log_to_terminal(level: int = logging.INFO) -> None:
    """Print plain log lines. For programs, which own the process's logging; a library must not call it."""
    logging.basicConfig(level=level, format="%(message)s")
    # On import, faiss logs every instruction set that its wheel was not built for.
    logging.getLogger("faiss.loader").setLevel(max(level, logging.WARNING))
