"""Reading members at offsets, a whole batch at a time: neighbours in one read, few files open at once.

Members in the page cache are copied out of a memory map of the shard; all others are read with `os.pread`.
"""

import contextlib
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.shard import ShardFile
from curated_data.pool.storage import check_unchanged, vanished

LOCAL_GAP = 4 << 10  # bytes between members that are read too, since another call would cost about as much
MAPPED_POOL = 8 << 30  # bytes; larger pools are not mapped, see `LocalReader`
_CAN_ADVISE = hasattr(os, "posix_fadvise")
_CAN_PROBE = hasattr(os, "RWF_NOWAIT")
_PROBES = 4  # members of a batch to probe; with half of a pool cached, one batch in 16 looks cached


@dataclass
class ReadCounters:
    """What was asked for and what was read, by this process and, before a fork, by its parent.

    Attributes:
        bytes_needed: of the members asked for, each once per batch.
        bytes_read: of all reads, including gaps between neighbours and whole downloaded shards.
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
        order: (m,) the members, sorted by shard and offset.
        first: (r + 1,); run i covers `order[first[i] : first[i + 1]]`.
        shard, start, stop: (r,) the bytes that each run reads.
    """

    order: np.ndarray
    first: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def plan_runs(
    shard: np.ndarray, offset: np.ndarray, size: np.ndarray, gap: int, longest: int = 64 << 20
) -> Runs:
    """Join members of a shard that are at most `gap` bytes apart to one read, of up to `longest` bytes.

    Args:
        shard, offset, size: (m,) integers; members may repeat, but not overlap otherwise.
        gap: bytes between neighbours that are read too.
        longest: longer runs are cut, so that a batch never reads a shard in one piece.
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


class OpenShard(NamedTuple):
    """A shard's open file: its handle, whether it had a name in a folder then, and its map, if any."""

    handle: int
    was_linked: bool
    mapped: mmap.mmap | None

    def close(self) -> None:
        """Close the file and the map."""
        os.close(self.handle)
        if self.mapped is not None:
            self.mapped.close()


class LocalReader:
    """Reads members of local shards, from a memory map of the file or with `os.pread`.

    A copy out of a map is faster than a system call: a random member of 23 KB in the page cache takes 8.4
    instead of 13.3 µs, or 12 instead of 15 in a first epoch. Maps are used for shards on a block device, in
    pools of at most `MAPPED_POOL` bytes (so that neither page tables nor the resident memory that tools show
    grow with the pool), if a probe finds the batch in the page cache. What must come from the disk is read
    with `pread`, which reports a disk failure as an `OSError`. A shard that is truncated in place within the
    microseconds between check and copy ends the process with a bus error; one truncated earlier raises an
    error that names it.

    At most `max_open` files are open, and the least recently used is closed first. The reader may be used
    from several threads and after a fork (positioned reads share no file position), and pickles without its
    handles.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        *,
        max_open: int | None = None,
        gap: int = LOCAL_GAP,
        maps: bool | None = None,
    ) -> None:
        self.shards = shards
        self.gap = gap
        self.maps = sum(shard.size for shard in shards) <= MAPPED_POOL if maps is None else maps
        self.max_open = max_open or _handles_allowed()
        self.counters = ReadCounters()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        _keep_freed_memory()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """The bytes of each member, in the given order.

        Args:
            shard, offset, size: (m,) int64.

        Raises:
            PoolError: a shard is missing or has changed since it was indexed.
        """
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            found = self._copy(shard, offset, size) if self.maps and len(shard) else None
            if found is None:
                found = self._read(plan_runs(shard, offset, size, self.gap), offset, size)
            self.counters.bytes_needed += int(size.sum())
            self.counters.n_members += len(shard)
        return found

    def close(self) -> None:
        """Close all files; the next read reopens what it needs."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "max_open": self.max_open, "gap": self.gap, "maps": self.maps}

    def __setstate__(self, state: dict) -> None:
        LocalReader.__init__(self, state.pop("shards"), **state)

    def __del__(self) -> None:
        if getattr(self, "_open", None):
            self.close()

    def _copy(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes] | None:
        """The members, copied out of maps; None unless all are mapped and cached."""
        shards, offsets, sizes = shard.tolist(), offset.tolist(), size.tolist()
        numbers = dict.fromkeys(shards)
        if len(numbers) > self._most_shards:
            return None
        maps: dict[int, mmap.mmap] = {}
        for number in numbers:
            mapped = self._shard(number).mapped
            if mapped is None:
                return None
            maps[number] = mapped
        if not self._are_cached(shards, offsets):
            return None
        self.counters.bytes_read += int(size.sum())
        self.counters.n_reads += len(shards)
        found = []
        for number, start, length in zip(shards, offsets, sizes, strict=True):
            found.append(maps[number][start : start + length])
            if len(found[-1]) != length:
                raise PoolError(
                    f"{self.shards[number].url}: its index is of {length} bytes at offset {start}, and the "
                    "shard ends before; remove the cache's folders `index` and `pool` to index it again"
                )
        return found

    def _read(self, runs: Runs, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """The members, with one read per run."""
        found: list[bytes] = [b""] * len(runs.order)
        order, first = runs.order.tolist(), runs.first.tolist()
        begins, sizes = offset[runs.order].tolist(), size[runs.order].tolist()
        shards, starts = runs.shard.tolist(), runs.start.tolist()
        lengths = (runs.stop - runs.start).tolist()
        for block in range(0, len(shards), self._most_shards):  # whose files can all be open at once
            part = slice(block, block + self._most_shards)
            handles = self._announce(shards[part], starts[part], lengths[part])
            for number, handle in enumerate(handles, block):
                start, length = starts[number], lengths[number]
                try:
                    data = os.pread(handle, length, start)
                    if len(data) != length:
                        data = self._rest(shards[number], start, length, handle, data)
                except OSError as error:
                    raise PoolError(
                        f"{self.shards[shards[number]].url}: cannot be read at offset {start} "
                        f"({error.strerror}); check the disk, or copy the shard again"
                    ) from error
                low, high = first[number], first[number + 1]
                if high - low == 1:
                    found[order[low]] = data
                    continue
                for place in range(low, high):
                    begin = begins[place] - start
                    found[order[place]] = data[begin : begin + sizes[place]]
        self.counters.bytes_read += sum(lengths)
        self.counters.n_reads += len(shards)
        return found

    def _announce(self, shards: list[int], starts: list[int], lengths: list[int]) -> list[int]:
        """The handle for each of the next reads, after announcing them to the kernel if they are not cached.

        A disk then works on the whole batch at once, which is 3 to 5 times as fast as read after read.
        """
        opened = {number: self._shard(number).handle for number in dict.fromkeys(shards)}
        handles = [opened[number] for number in shards]
        if _CAN_ADVISE and not self._are_cached(shards, starts):
            for handle, start, length in zip(handles, starts, lengths, strict=True):
                os.posix_fadvise(handle, start, length, os.POSIX_FADV_WILLNEED)
        return handles

    def _are_cached(self, shards: list[int], offsets: list[int]) -> bool:
        """Whether a few of the next reads, evenly spread, would all be answered without the disk."""
        if not _CAN_PROBE:
            return False
        try:
            for place in range(0, len(shards), max(1, len(shards) // _PROBES)):
                if not os.preadv(
                    self._open[shards[place]].handle, [bytearray(1)], offsets[place], os.RWF_NOWAIT
                ):
                    return False  # end of the file: the read itself will raise
        except OSError:  # most often EAGAIN; a failing disk is found out, and named, by the read itself
            return False
        return True

    def _shard(self, number: int) -> OpenShard:
        """A shard's open file, after checking that it is still what was indexed."""
        opened = self._open.get(number)
        if opened is not None:
            if self._is_current(number, os.fstat(opened.handle), opened.was_linked):
                self._open.move_to_end(number)
                return opened
            self._open.pop(number).close()
        handle = self._open_file(number)
        while len(self._open) >= self._most_shards:
            self._open.popitem(last=False)[1].close()
        status = os.fstat(handle)
        mapped = None
        if (
            self.maps and os.major(status.st_dev) and status.st_size
        ):  # without a device it may be on a network
            with contextlib.suppress(OSError):  # as without address space; it is read instead
                mapped = mmap.mmap(handle, status.st_size, prot=mmap.PROT_READ)
        # Some network file systems never report the number of links.
        self._open[number] = OpenShard(handle, status.st_nlink > 0, mapped)
        return self._open[number]

    @property
    def _most_shards(self) -> int:
        """How many may be open; a map holds a second handle."""
        return max(1, self.max_open // (1 + self.maps))

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
        """Whether an open file may still be read; raises if the shard has changed."""
        check_unchanged(self.shards[number], status, was_linked)
        return True

    def _rest(self, shard: int, start: int, length: int, handle: int, data: bytes) -> bytes:
        """Complete a short read, unless the file ends."""
        pieces = [data]
        have = len(data)
        while have < length and data:
            data = os.pread(handle, length - have, start + have)
            pieces.append(data)
            have += len(data)
        if have < length:
            raise PoolError(
                f"{self.shards[shard].url}: truncated since it was indexed: {have} of {length} bytes at "
                f"offset {start}; copy it again"
            )
        return b"".join(pieces)


def _keep_freed_memory() -> None:
    """Make malloc keep the memory that a batch frees for the next batch.

    glibc returns freed blocks above a threshold of 128 KiB to the kernel, which hands them out again page by
    page: three quarters of the time to read a batch from the page cache. The threshold follows the largest
    block ever freed (mallopt(3), M_MMAP_THRESHOLD), so allocating and freeing one block raises it, to at most
    32 MiB, unless the user has set it. With other allocators this has no effect.
    """
    bytearray(16 << 20)


def _handles_allowed() -> int:
    """A quarter of the process's limit on open files, at most 512: enough for the shards of a batch."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 512 if limit == resource.RLIM_INFINITY else max(16, min(512, limit // 4))
