"""Memory of a benchmark's process, without mapped files, whose pages the system reclaims at will (Linux)."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def anonymous_bytes() -> int:
    """This process's memory now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def memory_added(run: Callable[[], Result], every: float = 0.01) -> tuple[Result, int]:
    """What `run` returns, and the bytes that it added at its peak, looked at every so many seconds."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return result, peak - before
