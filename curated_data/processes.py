"""Worker processes: the cores that there are for them, and ending them with their parent."""

import os
import signal
import threading
import time


def n_cores() -> int:
    """The number of CPU cores that this process may use; all cores if the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
