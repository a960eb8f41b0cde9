"""Saying that a batch is late, while it still is."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class SlowWatch:
    """Warns, once, while an iterator has not given its next item for too long, and says when it came.

    Args:
        limit: seconds; 0 for no watch.
        place: who waits, for the message.
    """

    def __init__(self, limit: float, place: str) -> None:
        self.limit = limit
        self.place = place
        self._since: float | None = None  # when the wait that is going on began
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
        """The items; the time that each takes to come is watched, the time spent on it is not."""
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
                    "%s: has waited %.1f s for batch %d of this epoch. The shards' storage is slow, a "
                    "worker hangs (py-spy dump --pid tells where), or the views take too long: more "
                    "num_workers or a larger prefetch_factor help with the last",
                    self.place,
                    time.monotonic() - since,
                    self._number,
                )
                return
