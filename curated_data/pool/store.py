"""Access to remote files through fsspec, with retries: their state, ranges of bytes, downloads."""

import logging
import math
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from curated_data.errors import PoolError
from curated_data.pool.access import RemoteOptions
from curated_data.pool.storage import ShardFile
from curated_data.pool.urls import unreachable

log = logging.getLogger(__name__)

_HTTP = ("http://", "https://")
_S3 = ("s3://", "s3a://")
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime")
_LISTED_FROM = 200  # shards in one folder, from which listing it is faster than one request per shard
Result = TypeVar("Result")


class Store:
    """Remote files through fsspec, with retries; safe to use from threads and after a fork."""

    def __init__(self, storage_options: Mapping[str, Any] | None, options: RemoteOptions) -> None:
        self.storage_options = dict(storage_options or {})
        self.options = options
        self._reset()

    def stat(self, url: str) -> ShardFile:
        """The file's size and version."""

        def look() -> dict[str, Any]:
            filesystem, path = self._resolve(url)
            filesystem.invalidate_cache()
            return filesystem.info(path)

        return _state(url, self._retried(look, url))

    def stat_all(self, urls: Sequence[str]) -> list[ShardFile]:
        """`stat` of many files: large folders by a listing, the others by parallel requests."""
        by_folder: dict[str, list[str]] = defaultdict(list)
        for url in urls:
            if not url.startswith(_HTTP):  # whose listings, if any, lack versions
                by_folder[url.rpartition("/")[0]].append(url)
        found: dict[str, ShardFile] = {}
        for folder, members in by_folder.items():
            if len(members) >= _LISTED_FROM:
                found |= self._listed(folder, members)
        with ThreadPoolExecutor(self.options.n_threads) as threads:
            missing = [url for url in urls if url not in found]
            found |= zip(missing, threads.map(self.stat, missing))
        return [found[url] for url in urls]

    def read(self, shard: ShardFile, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a shard, which must still be what was indexed.

        Every answer of HTTP and S3 includes the version; in other stores the shard is checked again every
        `recheck` seconds.

        Raises:
            PoolError: it is missing or has changed, or the network keeps failing.
        """
        if stop <= start:
            return b""

        failed = False

        def ask() -> bytes:
            nonlocal failed
            if failed:  # a changed shard fails in many ways: check before retrying
                self._check_unchanged(shard, at_once=True)
            failed = True
            filesystem, path = self._resolve(shard.url)
            same: bool | None = None  # unknown
            if shard.url.startswith(_HTTP):
                data, same = fsspec.asyn.sync(
                    filesystem.loop, _ask_http, filesystem, path, shard, start, stop
                )
            elif shard.url.startswith(_S3):
                data, same = fsspec.asyn.sync(filesystem.loop, _ask_s3, filesystem, path, shard, start, stop)
            else:
                data = filesystem.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"got {len(data)} of the {stop - start} bytes from offset {start}")
            if not same:
                self._check_unchanged(shard, at_once=same is False)
            return data

        return self._retried(ask, shard.url)

    def download(self, shard: ShardFile, path: Path) -> None:
        """Download a shard, which must still be what was indexed, to an existing file."""
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
        """Whether ranges are supported. An HTTP server may not; each host is tested once."""
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
        Store.__init__(self, state["storage_options"], state["options"])

    def _check_unchanged(self, shard: ShardFile, at_once: bool = False) -> None:
        self._check_process()
        ago = time.monotonic() - self._checked.get(shard.url, -math.inf)
        if ago < self.options.recheck and not at_once:
            return
        now = self.stat(shard.url)
        if now != shard:
            raise PoolError(
                f"{shard.url}: changed since it was indexed: {shard.size} bytes, version {shard.version!r} "
                f"then, {now.size}, {now.version!r} now; open the pool again to index it anew"
            )
        self._checked[shard.url] = time.monotonic()

    def _listed(self, folder: str, urls: list[str]) -> dict[str, ShardFile]:
        """The states of a folder's files by one listing; none if it tells less than single requests do."""
        filesystem, path = self._resolve(folder)

        def look() -> list[dict[str, Any]]:
            filesystem.invalidate_cache()
            return filesystem.ls(path, detail=True)

        try:
            entries = {entry["name"].lstrip("/"): entry for entry in self._retried(look, folder)}
        except (PoolError, NotImplementedError):  # listing may be forbidden even if reading is not
            return {}
        found = {}
        for url in urls:
            entry = entries.get(self._resolve(url)[1].lstrip("/"))
            if entry is not None and entry.get("size") is not None:
                found[url] = _state(url, entry)
        first = next(iter(found), None)
        return found if first is not None and found[first] == self.stat(first) else {}

    def _probe(self, url: str) -> int:
        """The HTTP status of a request for the first byte; the body is not read."""
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
            except (ImportError, ValueError) as error:  # unknown protocol, or its package is missing
                raise unreachable(url, error) from error
        return found

    def _check_process(self) -> None:
        if self._process != os.getpid():  # fsspec's event loop does not survive a fork
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
                # fsspec reports any failure of an HTTP file like this; the cause shows which it was.
                if error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410):
                    raise PoolError(f"{url}: is not there, or vanished since it was indexed") from error
                last = error.__cause__
            except PermissionError as error:
                raise PoolError(f"{url}: may not be read ({error}); see storage_options") from error
            except PoolError:
                raise
            except Exception as error:  # each protocol has its own network errors
                last = error
            if attempt + 1 < self.options.attempts:
                # With jitter, so that many readers do not return at once; no generator that users seed.
                pause = self.options.backoff * 2**attempt * (0.5 + random.SystemRandom().random())
                log.warning("%s: %s: %s; trying again in %.3g s", url, type(last).__name__, last, pause)
                time.sleep(pause)
        raise PoolError(
            f"{url}: cannot be read: {self.options.attempts} attempts failed over "
            f"{time.monotonic() - started:.1f} s ({type(last).__name__}: {last})"
        ) from last


def _state(url: str, info: Mapping[str, Any]) -> ShardFile:
    if info.get("size") is None:
        raise PoolError(f"{url}: its server does not tell its size, so it cannot be indexed")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return ShardFile(url, int(info["size"]), version)


async def _ask_http(
    filesystem: Any, path: str, shard: ShardFile, start: int, stop: int
) -> tuple[bytes, bool | None]:
    """A range of a file, and whether the answer has the indexed version and size (None if unknown)."""
    session = await filesystem.set_session()
    headers = {**filesystem.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
    others = {name: value for name, value in filesystem.kwargs.items() if name != "headers"}
    async with session.get(filesystem.encode_url(path), headers=headers, **others) as response:
        if response.status == 404:
            raise FileNotFoundError(shard.url)
        response.raise_for_status()
        data = await response.read()
        if response.status != 206:  # the whole file, as HTTP allows
            data, total = data[start:stop], len(data)
        else:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return data, _is_same(shard, str(total), response.headers.get("ETag"))


async def _ask_s3(
    filesystem: Any, path: str, shard: ShardFile, start: int, stop: int
) -> tuple[bytes, bool | None]:
    """As `_ask_http`. s3fs's own methods do not return the version."""
    bucket, key, _ = filesystem.split_path(path)
    answer = await filesystem._call_s3(
        "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}"
    )
    try:
        data = await answer["Body"].read()
    finally:
        answer["Body"].close()
    total = answer.get("ContentRange", "").rpartition("/")[2]
    return data, _is_same(shard, total, answer.get("ETag"))


def _is_same(shard: ShardFile, total: str, etag: str | None) -> bool | None:
    if total.isdigit() and int(total) != shard.size:
        return False
    return None if etag is None else etag == shard.version
