"""Warn about a slow batch while the loop is still waiting for it."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class SlowWatch:
    """Warns once if an iterator takes too long to give its next item, and again when the item has come.

    Args:
        limit: in seconds; 0 never warns.
        place: who is waiting, for the message.
    """

    def __init__(self, limit: float, place: str) -> None:
        self.limit = limit
        self.place = place
        self._since: float | None = None  # when the current wait began
        self._number = 0
        self._warned = False
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.limit > 0:
            threading.Thread(target=self._watch, name="slow batches", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. Only the time that each takes to arrive counts, not the time spent on it."""
        iterator = iter(items)
        while True:
            started = self._since = time.monotonic()
            warned = self._warned
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._since = None
            if self._warned and not warned:
                log.warning(
                    "%s: batch %d came after %.1f s", self.place, self._number, time.monotonic() - started
                )
            self._number += 1
            yield item

    def _watch(self) -> None:
        while not self._done.wait(self.limit / 4):
            since = self._since
            if since is not None and time.monotonic() - since > self.limit:
                self._warned = True
                log.warning(
                    "%s: has waited %.1f s for batch %d of this epoch. Either the storage is slow, a worker "
                    "hangs (py-spy dump --pid PID shows where), or the views take too long, in which case "
                    "raise num_workers or prefetch_factor",
                    self.place,
                    time.monotonic() - since,
                    self._number,
                )
                return
