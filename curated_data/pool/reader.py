"""Positioned reads of members: whole batches, neighbours in one read, a bounded number of open files."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.storage import ShardFile, check_unchanged, vanished

LOCAL_GAP = 4 << 10  # bytes worth reading over rather than asking again: about what one more call costs
_CAN_ADVISE = hasattr(os, "posix_fadvise")


@dataclass
class ReadCounters:
    """What was asked for and what it took, in this process and, before a fork, in its parent.

    Attributes:
        bytes_needed: of the members asked for, each once a batch.
        bytes_read: of all reads, gaps between neighbours and whole downloaded shards included.
        n_reads: read calls or requests.
        n_members: members asked for.
    """

    bytes_needed: int = 0
    bytes_read: int = 0
    n_reads: int = 0
    n_members: int = 0


@dataclass(frozen=True)
class Runs:
    """Reads that cover a batch of members.

    Attributes:
        order: (m,) the members sorted by shard and offset.
        first: (r + 1,) run i covers `order[first[i] : first[i + 1]]`.
        shard, start, stop: (r,) what each run reads.
    """

    order: np.ndarray
    first: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def plan_runs(
    shard: np.ndarray, offset: np.ndarray, size: np.ndarray, gap: int, longest: int = 64 << 20
) -> Runs:
    """Join members of one shard that lie at most `gap` bytes apart to one read, up to `longest` bytes.

    Args:
        shard, offset, size: (m,) integers; members may repeat, but not overlap otherwise.
        gap: bytes between neighbours that are read over.
        longest: a run is cut where it would grow beyond this, so that a batch never asks for a shard in one
            piece.
    """
    order = np.lexsort((offset, shard))
    sorted_shard, start = shard[order], offset[order]
    stop = start + size[order]
    breaks = np.ones(len(order), bool)
    if len(order) > 1:
        far = start[1:] - stop[:-1] > gap
        breaks[1:] = far | (sorted_shard[1:] != sorted_shard[:-1])
        piece = start // longest
        breaks[1:] |= piece[1:] != piece[:-1]
    first = np.flatnonzero(breaks)
    last = np.append(first[1:], len(order))
    stops = np.maximum.reduceat(stop, first) if len(first) else stop
    return Runs(order, np.append(first, len(order)), sorted_shard[first], start[first], stops[: len(last)])


class LocalReader:
    """Reads members of local shards with `os.pread`.

    Keeps at most `max_open` files open, the least recently used closed first. May be used from several
    threads, and after a fork (a positioned read shares no file position); it pickles without its handles.
    """

    def __init__(self, shards: Sequence[ShardFile], *, max_open: int | None = None, gap: int = LOCAL_GAP):
        self.shards = shards
        self.gap = gap
        self.max_open = max_open or _handles_allowed()
        self.counters = ReadCounters()
        self._open: OrderedDict[int, tuple[int, bool]] = OrderedDict()
        _keep_freed_memory()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """The bytes of each member, in the order asked.

        Args:
            shard, offset, size: (m,) int64.

        Raises:
            PoolError: a shard vanished or changed since it was indexed.
        """
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        runs = plan_runs(shard, offset, size, self.gap)
        found: list[bytes] = [b""] * len(shard)
        order, first = runs.order.tolist(), runs.first.tolist()
        begins, sizes = offset[runs.order].tolist(), size[runs.order].tolist()
        spans = list(zip(runs.shard.tolist(), runs.start.tolist(), (runs.stop - runs.start).tolist()))
        with self._lock:
            for block in range(0, len(spans), self.max_open):  # so that all its files can be open at once
                handles = self._announce(spans[block : block + self.max_open])
                for number, handle in enumerate(handles, block):
                    _, start, length = spans[number]
                    data = os.pread(handle, length, start)
                    if len(data) != length:
                        data = self._rest(spans[number], handle, data)
                    low, high = first[number], first[number + 1]
                    if high - low == 1:
                        found[order[low]] = data
                        continue
                    for place in range(low, high):
                        begin = begins[place] - start
                        found[order[place]] = data[begin : begin + sizes[place]]
            counters = self.counters
            counters.bytes_needed += int(size.sum())
            counters.bytes_read += int((runs.stop - runs.start).sum())
            counters.n_reads += len(spans)
            counters.n_members += len(shard)
        return found

    def close(self) -> None:
        """Close all files; the next read opens what it needs."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "gap": self.gap, "max_open": self.max_open}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["shards"], max_open=state["max_open"], gap=state["gap"])

    def __del__(self) -> None:
        if getattr(self, "_open", None):
            self.close()

    def _announce(self, spans: list[tuple[int, int, int]]) -> list[int]:
        """The open file of each read to come, after telling the kernel of it.

        A disk then works on all of a batch at once, which is 3 to 5 times as fast as one read after the other
        when nothing is cached, and costs 1 µs a read when everything is.
        """
        handles, current, handle = [], -1, -1
        for number, start, length in spans:
            if number != current:
                handle, current = self._handle(number), number
            handles.append(handle)
            if _CAN_ADVISE:
                os.posix_fadvise(handle, start, length, os.POSIX_FADV_WILLNEED)
        return handles

    def _handle(self, number: int) -> int:
        """An open file of the shard, in the state that was indexed."""
        entry = self._open.get(number)
        if entry is not None:
            handle, linked = entry
            if self._is_current(number, os.fstat(handle), linked):
                self._open.move_to_end(number)
                return handle
            del self._open[number]
            os.close(handle)
        handle = self._open_file(number)
        while len(self._open) >= self.max_open:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[number] = handle, os.fstat(handle).st_nlink > 0  # some network file systems never say
        return handle

    def _open_file(self, number: int) -> int:
        shard = self.shards[number]
        try:
            handle = os.open(shard.url, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise vanished(shard, error) from error
        try:
            check_unchanged(shard, os.fstat(handle))
        except PoolError:
            os.close(handle)
            raise
        return handle

    def _is_current(self, number: int, status: os.stat_result, was_linked: bool) -> bool:
        """Whether an open file may go on being read; raises where the shard itself has changed."""
        check_unchanged(self.shards[number], status, was_linked)
        return True

    def _rest(self, span: tuple[int, int, int], handle: int, data: bytes) -> bytes:
        """A read that came short: go on until it is whole, or the file ends."""
        number, start, length = span
        pieces = [data]
        have = len(data)
        while have < length and data:
            data = os.pread(handle, length - have, start + have)
            pieces.append(data)
            have += len(data)
        if have < length:
            raise PoolError(
                f"{self.shards[number].url}: truncated since it was indexed: {have} of {length} bytes at "
                "offset "
                f"{start}; copy it again"
            )
        return b"".join(pieces)


def _keep_freed_memory() -> None:
    """Let malloc keep what a batch frees for the next batch.

    glibc gives free memory above a threshold of 128 KiB back to the kernel, which hands it out again page by
    page: three quarters of the time of reading a batch from the page cache. The threshold follows the largest
    block that was ever freed (mallopt(3), M_MMAP_THRESHOLD), so one block, never touched and freed at once,
    raises it to 32 MiB unless the user has set it. Elsewhere this does nothing.
    """
    bytearray(16 << 20)


def _handles_allowed() -> int:
    """A quarter of what the process may open, 512 at most: shards of a batch, not of a pool."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 512 if limit == resource.RLIM_INFINITY else max(16, min(512, limit // 4))
