"""Worker processes: the cores available to them, how they start, and ending them with their parent."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from curated_data.checks import check_choice
from curated_data.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


_UNPICKLABLE = (AttributeError, TypeError, pickle.PicklingError)


def n_cores() -> int:
    """The number of CPU cores that this process may use; all cores if the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_context(method: str | None, name: str) -> None:
    """Check a start method of worker processes, given as the setting `name`; None is the default one.

    Raises:
        ConfigError: this system does not have it.
    """
    if method is not None:
        check_choice(name, method, multiprocessing.get_all_start_methods())


def start_method(loader: "DataLoader") -> str:
    """How the workers of a loader start."""
    if loader.multiprocessing_context is not None:
        return loader.multiprocessing_context.get_start_method()
    # To ask without `allow_none` would settle the default, and a later set_start_method would fail.
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def check_picklable(loader: "DataLoader", **parts: Any) -> None:
    """Check that what workers get can be sent to them, before they are started.

    A Trainer starts them where another error would hide this one.

    Args:
        loader: whose workers get the parts.
        parts: what users gave that goes to workers, by the name of the argument.

    Raises:
        ConfigError: workers are not forked, and one of the parts cannot be pickled.
    """
    if not loader.num_workers or start_method(loader) == "fork":
        return
    for name, part in parts.items():
        try:
            pickle.dumps(part)
        except _UNPICKLABLE as reason:  # others, as of locks, come of pickling outside the start of a process
            raise ConfigError(
                f"{name}: cannot be pickled ({reason}), and workers started by {start_method(loader)!r} get "
                "a pickled copy; give a function or class of a module, not one inside another, or no workers"
            ) from reason


@contextlib.contextmanager
def starting_workers(loader: "DataLoader", **parts: Any) -> Iterator[None]:
    """Explain the error of starting a loader's workers if something that they get cannot be pickled.

    Args:
        loader: whose workers the block starts.
        parts: what users gave that goes to workers, by the name of the argument.

    Raises:
        ConfigError: workers are not forked, and one of the parts cannot be pickled.
    """
    try:
        yield
    except _UNPICKLABLE:
        check_picklable(loader, **parts)
        raise


def end_with_parent(parent: int) -> None:
    """Initializer for a pool's workers: leave Ctrl-C to the parent, and exit when it is gone.

    Without it, the workers of `concurrent.futures` would wait for work forever after their parent is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler inherited from the parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
