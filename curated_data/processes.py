"""Worker processes that end with the process they work for."""

import os
import signal
import threading
import time


def n_cores() -> int:
    """CPU cores that this process may use; where the system does not say (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(parent: int) -> None:
    """As the initializer of a pool's workers: leave Ctrl-C to the parent, and end when it is gone.

    A killed parent cannot tell its workers, and those of `concurrent.futures` would wait for work for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's own handling is not theirs

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
