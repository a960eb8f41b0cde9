"""Shards on other machines: ranged reads run at once, or whole shards in a bounded cache; and the choice."""

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import fsspec
import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.reader import LocalReader, ReadCounters, plan_runs
from curated_data.pool.shard_cache import ShardCache
from curated_data.pool.storage import ShardFile
from curated_data.pool.tar import Source, local_source
from curated_data.pool.urls import is_remote

log = logging.getLogger(__name__)

_HTTP = ("http://", "https://")
LOCAL, RANGES, DOWNLOAD = 0, 1, 2
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteOptions:
    """How remote shards are read.

    Attributes:
        access: `ranges` asks for the bytes of the members; `download` keeps whole shards in the cache; `auto`
            takes ranges until `ShardPool.plan_access` has weighed the two, and downloads where ranges are not
            supported.
        gap: bytes between members that are read over rather than asked for apart. At 25 KB a sample, 64 KiB
            merges requests from a tenth of a shard on and hardly ever below.
        n_threads: requests at once, in each process.
        attempts: tries of a request before the error, with pauses of `backoff`, twice that, four times ...
            seconds.
        cache_bytes: what the downloaded shards may take together, over all processes that share the cache.
        latency: seconds a request takes at the least, for the choice.
        bandwidth: bytes a second of one process, for the choice.
        recheck: seconds after which a process looks again whether a shard is what was indexed. Over HTTP
            every answer is compared besides; other stores do not tell with the bytes of which version they
            are.
    """

    access: Literal["auto", "ranges", "download"] = "auto"
    gap: int = 64 << 10
    n_threads: int = 32
    attempts: int = 5
    backoff: float = 0.5
    cache_bytes: int = 32 << 30
    latency: float = 0.02
    bandwidth: float = 100e6
    recheck: float = 60.0


def choose_access(
    shard_size: np.ndarray,
    selected_bytes: np.ndarray,
    selected_samples: np.ndarray,
    *,
    epochs: int = 1,
    options: RemoteOptions | None = None,
) -> np.ndarray:
    """Which shards to download whole, by the time that each way takes over all epochs.

    Ranges cost, in every epoch, a request a sample (a shuffled batch holds few neighbours), `n_threads` at
    once, and the bytes; a download costs its bytes once, as only shards that fit in the cache together are
    chosen: those that save most time a byte first.

    Args:
        shard_size, selected_bytes, selected_samples: (s,) per shard: bytes of all, bytes of the selected
            members, and how many samples are selected.
        epochs: how often the selection is read.
        options: latency, bandwidth, threads, and the size of the cache.

    Returns:
        (s,) bool: download this shard.
    """
    options = options or RemoteOptions()
    request = options.latency / options.n_threads
    ranges = epochs * (selected_samples * request + selected_bytes / options.bandwidth)
    download = request + shard_size / options.bandwidth
    saved = np.where(selected_samples > 0, ranges - download, 0.0)
    order = np.argsort(-saved / np.maximum(shard_size, 1), kind="stable")
    order = order[saved[order] > 0]
    chosen = np.zeros(len(shard_size), bool)
    chosen[order[np.cumsum(shard_size[order]) <= options.cache_bytes]] = True
    return chosen


def stat_remote(
    url: str, storage_options: Mapping[str, Any] | None = None, options: RemoteOptions | None = None
) -> ShardFile:
    """The present state of a remote shard.

    Raises:
        PoolError: it is not there, not reachable, or its server does not say how large it is.
    """
    return Store(storage_options, options or RemoteOptions()).stat(url)


class Store:
    """Remote files through fsspec, with retries; safe to use from threads and after a fork."""

    def __init__(self, storage_options: Mapping[str, Any] | None, options: RemoteOptions):
        self.storage_options = dict(storage_options or {})
        self.options = options
        self._reset()

    def stat(self, url: str) -> ShardFile:
        """The file's size and version."""

        def look() -> dict[str, Any]:
            filesystem, path = self._resolve(url)
            filesystem.invalidate_cache()
            return filesystem.info(path)

        info = self._retried(look, url)
        if info.get("size") is None:
            raise PoolError(f"{url}: its server does not say how large it is; it cannot be indexed there")
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        return ShardFile(url, int(info["size"]), version)

    def read(self, shard: ShardFile, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a shard that is still what was indexed.

        Raises:
            PoolError: it changed or vanished, or the network failed for good.
        """
        if stop <= start:
            return b""

        def ask() -> bytes:
            self._check_unchanged(shard)
            filesystem, path = self._resolve(shard.url)
            try:
                if shard.url.startswith(_HTTP):
                    data, same = fsspec.asyn.sync(
                        filesystem.loop, _ask_http, filesystem, path, shard, start, stop
                    )
                else:
                    data, same = filesystem.cat_file(path, start=start, end=stop), True
                if len(data) != stop - start:
                    raise OSError(f"got {len(data)} of the {stop - start} bytes from offset {start}")
            except Exception:
                self._checked.pop(
                    shard.url, None
                )  # a changed shard fails in many ways: look before the next try
                raise
            if not same:
                self._checked.pop(shard.url, None)
                self._check_unchanged(shard)
            return data

        return self._retried(ask, shard.url)

    def download(self, shard: ShardFile, path: Path) -> None:
        """Write the whole shard to an existing file, after the same check."""
        self._check_unchanged(shard)

        def fetch() -> None:
            filesystem, remote = self._resolve(shard.url)
            with open(path, "r+b") as file:
                filesystem.get_file(remote, file)
                size = file.tell()
            if size != shard.size:
                raise OSError(f"got {size} of its {shard.size} bytes")

        self._retried(fetch, shard.url)

    def can_read_ranges(self, url: str) -> bool:
        """Whether a part can be asked for: an HTTP server may send the whole file; each is tried once."""
        if not url.startswith(_HTTP):
            return True
        self._check_process()
        host = urlsplit(url).netloc
        with self._lock:
            if host not in self._ranges:
                self._ranges[host] = self._probe(url) == 206
                if not self._ranges[host]:
                    log.info("%s does not support ranged reads: its shards are downloaded whole", host)
            return self._ranges[host]

    def __getstate__(self) -> dict[str, Any]:
        return {"storage_options": self.storage_options, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["storage_options"], state["options"])

    def _check_unchanged(self, shard: ShardFile) -> None:
        self._check_process()
        if time.monotonic() - self._checked.get(shard.url, -math.inf) < self.options.recheck:
            return
        now = self.stat(shard.url)
        if now != shard:
            raise PoolError(
                f"{shard.url}: changed since it was indexed: {shard.size} bytes, version {shard.version!r} "
                f"then, {now.size}, {now.version!r} now; make the pool anew to index it again"
            )
        self._checked[shard.url] = time.monotonic()

    def _probe(self, url: str) -> int:
        """The status of a request for the first byte; the answer's body is left where it is."""
        filesystem, path = self._resolve(url)

        async def status() -> int:
            session = await filesystem.set_session()
            headers = {**filesystem.kwargs.get("headers", {}), "Range": "bytes=0-0"}
            others = {name: value for name, value in filesystem.kwargs.items() if name != "headers"}
            async with session.get(filesystem.encode_url(path), headers=headers, **others) as response:
                if response.status >= 500:
                    response.raise_for_status()
                return response.status

        return self._retried(lambda: fsspec.asyn.sync(filesystem.loop, status), url)

    def _resolve(self, url: str) -> tuple[Any, str]:
        self._check_process()
        found = self._files.get(url)
        if found is None:
            try:
                found = self._files[url] = fsspec.core.url_to_fs(url, **self.storage_options)
            except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
                raise PoolError(f"{url}: cannot be reached ({error})") from error
        return found

    def _check_process(self) -> None:
        if self._process != os.getpid():  # the event loop of fsspec's filesystems did not survive the fork
            self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: dict[str, tuple[Any, str]] = {}
        self._checked: dict[str, float] = {}  # when a shard was last found unchanged
        self._ranges: dict[str, bool] = {}

    def _retried(self, call: Callable[[], Result], url: str) -> Result:
        started = time.monotonic()
        for attempt in range(self.options.attempts):
            try:
                return call()
            except FileNotFoundError as error:
                # fsspec reports every failure to look at an HTTP file so; its cause tells.
                if error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410):
                    raise PoolError(f"{url}: is not there, or vanished since it was indexed") from error
                last = error.__cause__
            except PermissionError as error:
                raise PoolError(f"{url}: may not be read ({error}); see storage_options") from error
            except PoolError:
                raise
            except Exception as error:  # every protocol has its own kinds of network error
                last = error
            if attempt + 1 < self.options.attempts:
                # Jittered, so that many readers do not return at once; not from a generator that users seed.
                pause = self.options.backoff * 2**attempt * (0.5 + random.SystemRandom().random())
                log.warning("%s: %s: %s; trying again in %.3g s", url, type(last).__name__, last, pause)
                time.sleep(pause)
        raise PoolError(
            f"{url}: cannot be read: {self.options.attempts} attempts failed over "
            f"{time.monotonic() - started:.1f} s ({type(last).__name__}: {last})"
        ) from last


async def _ask_http(
    filesystem: Any, path: str, shard: ShardFile, start: int, stop: int
) -> tuple[bytes, bool]:
    """A range of a file, and whether the answer is of the version and size that were indexed, as far as it
    says.
    """
    session = await filesystem.set_session()
    headers = {**filesystem.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    others = {name: value for name, value in filesystem.kwargs.items() if name != "headers"}
    async with session.get(filesystem.encode_url(path), headers=headers, **others) as response:
        if response.status == 404:
            raise FileNotFoundError(shard.url)
        response.raise_for_status()
        data = await response.read()
        if response.status != 206:  # the whole file, as HTTP allows
            return data[start:stop], len(data) == shard.size
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        same = not total.isdigit() or int(total) == shard.size
        return data, same and response.headers.get("ETag", shard.version) == shard.version


class RemoteReader:
    """Reads members of a pool with remote shards: each shard as a local file, by ranges, or from the shard
    cache.

    Args:
        shards: the pool's shards.
        storage_options: for fsspec.
        options: how.
        cache_folder: where downloaded shards are kept; None where there is no cache.
        access: (s,) LOCAL, RANGES or DOWNLOAD for each shard, where that was decided.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        *,
        storage_options: Mapping[str, Any] | None = None,
        options: RemoteOptions | None = None,
        cache_folder: Path | None = None,
        access: np.ndarray | None = None,
    ):
        self.shards = shards
        self.options = options or RemoteOptions()
        self.store = Store(storage_options, self.options)
        self.cache_folder = cache_folder
        remote = np.array([is_remote(shard.url) for shard in shards])
        default = DOWNLOAD if self.options.access == "download" else RANGES
        self.access = np.where(remote, default, LOCAL) if access is None else np.where(remote, access, LOCAL)
        self.counters = ReadCounters()
        self._local = LocalReader(shards)
        self._cached = CachedReader(self) if cache_folder is not None else None
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> list[bytes]:
        """The bytes of each member, in the order asked; arguments (m,) int64.

        Raises:
            PoolError: a shard vanished or changed, or the network failed for good.
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
        """A remote shard as what an index is built from: read in large pieces, or from the shard cache."""
        if self.options.access != "download" and self.store.can_read_ranges(shard.url):

            def read(offset: int, length: int) -> bytes:
                return self.store.read(shard, offset, min(offset + length, shard.size))

            # Reading over a megabyte takes less time than another request.
            yield Source(shard.url, shard.size, read, least=256 << 10, most=8 << 20)
            return
        handle = self._shard_cache(shard).open(shard, self.store.download)
        try:
            yield local_source(shard.url, handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        """Close files and threads; the next read opens what it needs."""
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
        self.__init__(state.pop("shards"), **state)

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
            "access='download' was asked for), which takes a cache_dir; give the pool one"
        )


class CachedReader(LocalReader):
    """Reads members of downloaded shards, downloading those that are not, or no longer, in the cache."""

    def __init__(self, owner: RemoteReader):
        super().__init__(owner.shards)
        self._owner = owner
        self._shard_cache = ShardCache(owner.cache_folder, owner.options.cache_bytes)

    def _open_file(self, number: int) -> int:
        def download(shard: ShardFile, path: Path) -> None:
            self._owner.store.download(shard, path)
            self._owner.counters.bytes_read += shard.size

        return self._shard_cache.open(self.shards[number], download)

    def _is_current(self, number: int, status: os.stat_result, was_linked: bool) -> bool:
        return status.st_nlink > 0 or not was_linked  # else evicted: closing it gives its space back
