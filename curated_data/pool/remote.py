"""Reading remote shards: parallel ranged reads, or whole shards in a bounded cache."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.access import DOWNLOAD, LOCAL, RANGES, RemoteOptions
from curated_data.pool.reader import LocalReader, ReadCounters, plan_runs
from curated_data.pool.shard import ShardFile
from curated_data.pool.shard_cache import ShardCache
from curated_data.pool.store import Store
from curated_data.pool.tar import Source, local_source
from curated_data.pool.urls import is_remote


class RemoteReader:
    """Reads members of a pool with remote shards: of each shard by ranges, from the shard cache, or locally.

    Args:
        shards: the pool's shards.
        storage_options: for fsspec.
        options: how to read remote shards.
        cache_folder: for downloaded shards; None without a cache.
        access: (s,) LOCAL, RANGES or DOWNLOAD for each shard; None takes the default of `options`.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        *,
        storage_options: Mapping[str, Any] | None = None,
        options: RemoteOptions | None = None,
        cache_folder: Path | None = None,
        access: np.ndarray | None = None,
    ) -> None:
        self.shards = shards
        self.options = options or RemoteOptions()
        self.store = Store(storage_options, self.options)
        self.cache_folder = cache_folder
        remote = np.array([is_remote(shard.url) for shard in shards])
        default = DOWNLOAD if self.options.access == "shards" else RANGES
        self.access = np.where(remote, default, LOCAL) if access is None else np.where(remote, access, LOCAL)
        self.counters = ReadCounters()
        self._local = LocalReader(shards)
        self._cached = None if cache_folder is None else CachedReader(self, cache_folder)
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """The bytes of each member, in the given order; all arguments (m,) int64.

        Raises:
            PoolError: a shard is missing or has changed, or the network keeps failing.
        """
        found: list[bytes] = [b""] * len(shard)
        access = self.access[shard]
        for number in np.unique(shard[access == RANGES]).tolist():
            if not self.store.can_read_ranges(self.shards[number].url):
                access[shard == number] = self.access[number] = DOWNLOAD
        for way in np.unique(access).tolist():
            rows = np.flatnonzero(access == way)
            part = self._reading(way)(shard[rows], offset[rows], size[rows])
            for row, data in zip(rows.tolist(), part):
                found[row] = data
        self.counters.bytes_needed += int(size.sum())
        self.counters.n_members += len(shard)
        return found

    @contextmanager
    def source(self, shard: ShardFile) -> Iterator[Source]:
        """A remote shard for indexing: read in large pieces, or from the shard cache."""
        if self.options.access != "shards" and self.store.can_read_ranges(shard.url):

            def read(offset: int, length: int) -> bytes:
                return self.store.read(shard, offset, min(offset + length, shard.size))

            # Reading another megabyte takes less time than another request.
            yield Source(shard.url, shard.size, read, least=256 << 10, most=8 << 20)
            return
        handle = self._shard_cache(shard).open(shard, self.store.download)
        try:
            yield local_source(shard.url, handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Close files and threads; the next read reopens what it needs."""
        self._local.close()
        if self._cached is not None:
            self._cached.close()
        if self._threads is not None and self._threads[0] == os.getpid():
            self._threads[1].shutdown()
        self._threads = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "storage_options": self.store.storage_options,
            "options": self.options,
            "cache_folder": self.cache_folder,
            "access": self.access,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        RemoteReader.__init__(self, state.pop("shards"), **state)

    def _reading(self, way: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], list[bytes]]:
        if way == RANGES:
            return self._read_ranges
        reader = self._local if way == LOCAL else self._cached
        if reader is None:
            raise self._no_cache(self.shards[int(np.flatnonzero(self.access == way)[0])])

        def read(shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
            before = reader.counters.bytes_read, reader.counters.n_reads
            data = reader.read(shard, offset, size)
            if way == LOCAL:
                self.counters.bytes_read += reader.counters.bytes_read - before[0]
            self.counters.n_reads += reader.counters.n_reads - before[1]
            return data

        return read

    def _read_ranges(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        runs = plan_runs(shard, offset, size, self.options.gap, longest=8 << 20)
        found: list[bytes] = [b""] * len(shard)

        def fetch(number: int) -> None:
            start = int(runs.start[number])
            data = self.store.read(self.shards[runs.shard[number]], start, int(runs.stop[number]))
            for row in runs.order[runs.first[number] : runs.first[number + 1]].tolist():
                begin = int(offset[row]) - start
                found[row] = data[begin : begin + int(size[row])]

        list(self._executor().map(fetch, range(len(runs.shard))))
        self.counters.bytes_read += int((runs.stop - runs.start).sum())
        self.counters.n_reads += len(runs.shard)
        return found

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(self.options.n_threads)
        return self._threads[1]

    def _shard_cache(self, shard: ShardFile) -> ShardCache:
        if self.cache_folder is None:
            raise self._no_cache(shard)
        return ShardCache(self.cache_folder, self.options.cache_bytes)

    def _no_cache(self, shard: ShardFile) -> PoolError:
        return PoolError(
            f"{shard.url}: has to be downloaded whole (its server does not support ranged reads, or "
            "access='shards' was set), which needs a cache_dir; give the pool one"
        )


class CachedReader(LocalReader):
    """Reads members of downloaded shards, and downloads those that are not in the cache (any more)."""

    def __init__(self, owner: RemoteReader, cache_folder: Path) -> None:
        super().__init__(owner.shards)
        self._owner = owner
        self._shard_cache = ShardCache(cache_folder, owner.options.cache_bytes)

    def _open_file(self, number: int) -> int:
        def download(shard: ShardFile, path: Path) -> None:
            self._owner.store.download(shard, path)
            self._owner.counters.bytes_read += shard.size

        return self._shard_cache.open(self.shards[number], download)

    def _is_current(self, number: int, status: os.stat_result, was_linked: bool) -> bool:
        if status.st_size != self.shards[number].size:  # cut short since: opening it again repairs it
            return False
        return status.st_nlink > 0 or not was_linked  # otherwise evicted: closing it frees its space
