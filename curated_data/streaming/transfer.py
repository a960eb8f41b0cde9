"""Sending a batch from a worker to the training process.

A tensor is sent as a file descriptor over a socket, which takes about a millisecond. That is fine for images,
but far too slow for sixty-four labels, which go through the pipe instead. Undecoded members go through memory
shared by worker and parent, because a pipe would copy them twice more, 64 KiB at a time.
"""

import itertools
import mmap
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_SMALL = 64 << 10  # bytes, the largest tensor that goes through the pipe
_PLAIN = (torch.int64, torch.bool)  # ids, labels, padding marks
_RING = 64 << 20  # bytes of a ring; only what is used takes memory
_HEADER = mmap.PAGESIZE


class Ring:
    """A ring buffer in shared memory, from one writer to one reader; what does not fit is rejected.

    The process that creates it reads; a worker forked afterwards writes. Neither ever waits.
    """

    def __init__(self, capacity: int = _RING) -> None:
        self.number = next(_NUMBERS)
        _RINGS[self.number] = self
        self._memory = mmap.mmap(-1, _HEADER + capacity)  # shared with processes forked from now on
        self._n_read = memoryview(self._memory)[:8].cast("Q")
        self._capacity = capacity
        self._used = 0  # the part in use: as small as possible, to stay in the CPU's cache
        self._stop = 0  # of the last write
        self._n_written = 0
        self._unread: deque[tuple[int, int]] = deque()  # (start, stop) of what may be unread

    def write(self, pieces: list[bytes]) -> int | None:
        """Write the pieces one after the other; the place of the first, or None if there is no room."""
        size = sum(map(len, pieces))
        while len(self._unread) > self._n_written - self._n_read[0]:
            self._unread.popleft()
        self._used = max(self._used, min(self._capacity, 4 * size))
        start = self._stop if self._stop + size <= self._used else 0
        stop = start + size
        if stop > self._used or any(low < stop and start < high for low, high in self._unread):
            return None
        self._unread.append((start, stop))
        self._stop = stop
        self._n_written += 1
        self._memory.seek(_HEADER + start)
        for piece in pieces:
            self._memory.write(piece)
        return start

    def read(self, start: int, sizes: list[int]) -> list[bytes]:
        """The pieces of the `write` that returned `start`; call it once for each write, in the same order."""
        memory, pieces, place = self._memory, [], _HEADER + start
        for size in sizes:
            pieces.append(memory[place : place + size])
            place += size
        self._n_read[0] += 1
        return pieces


_RINGS: WeakValueDictionary[int, Ring] = WeakValueDictionary()  # of this process
_NUMBERS = itertools.count()


class WorkerCollate:
    """Wraps a collate function for workers; the parent receives what `collate` returned.

    Args:
        collate: maps samples to a batch (a dict) and a report on it.
        n_workers: the number of rings to create; 0 for batches without undecoded members.
    """

    def __init__(self, collate: Callable[[Any], tuple[dict[str, Any], Any]], n_workers: int) -> None:
        self.collate = collate
        self.rings = [Ring() for _ in range(n_workers)]

    def __call__(self, samples: Any) -> Any:
        batch, report = self.collate(samples)
        worker = get_worker_info()
        if worker is None:
            return batch, report
        return _Sent(batch, report, self.rings[worker.id] if self.rings else None)

    def __getstate__(self) -> dict[str, Any]:
        return {"collate": self.collate, "rings": []}  # a spawned worker shares no memory and uses the pipe


class _Sent:
    """A batch in transit: pickled in a worker, it arrives as (batch, report)."""

    def __init__(self, batch: dict[str, Any], report: Any, ring: Ring | None) -> None:
        self.report = report
        self.place: tuple[int, int] | None = None  # number of the ring, and where in it
        self.in_band = [
            name
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.dtype in _PLAIN and value.nbytes <= _SMALL
        ]
        self.batch = batch | {name: batch[name].numpy() for name in self.in_band}
        if ring is not None and "members" in batch:
            pieces = [v for sample in batch["members"] for v in sample.values() if type(v) is bytes]
            start = ring.write(pieces)
            if start is not None:
                self.place = ring.number, start
                self.batch["members"] = [
                    {name: len(v) if type(v) is bytes else v for name, v in sample.items()}
                    for sample in batch["members"]
                ]

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.batch, self.report, self.in_band, self.place)


def _received(
    batch: dict[str, Any], report: Any, in_band: list[str], place: tuple[int, int] | None
) -> tuple[dict[str, Any], Any]:
    if place is not None:
        members = batch["members"]
        sizes = [v for sample in members for v in sample.values() if type(v) is int]
        pieces = iter(_RINGS[place[0]].read(place[1], sizes))
        for sample in members:
            for name, value in sample.items():
                if type(value) is int:
                    sample[name] = next(pieces)
    for name in in_band:
        batch[name] = torch.from_numpy(batch[name])
    return batch, report
