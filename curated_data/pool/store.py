"""Access to remote files through fsspec, with retries: their state, ranges of bytes, downloads."""

import contextlib
import logging
import math
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from curated_data.errors import CuratedDataError, PoolError, printable
from curated_data.pool import http
from curated_data.pool.access import RemoteOptions
from curated_data.pool.out import writing
from curated_data.pool.shard import ShardFile
from curated_data.pool.urls import a_folder, unreachable

log = logging.getLogger(__name__)

_HTTP = ("http://", "https://")
_S3 = ("s3://", "s3a://")
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime")
_LISTED_FROM = 200  # shards in one folder, from which listing it is faster than one request per shard
_PIECE = 8 << 20  # bytes asked for at once, to download
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
            if not url.startswith(_HTTP):
                return filesystem.info(path)
            info = self._wait(filesystem, filesystem._info, path, timeout=2 * self.options.silence)
            if info.get("mimetype") == "text/html":  # as of servers that call everything so
                first = self._wait(filesystem, http.first_bytes, filesystem, path, self.options.silence)
                if first.lstrip()[:1] == b"<":
                    raise PoolError(
                        f"{url}: its server answers with a web page, not with a shard; give the URL of a "
                        "file, or for a folder add *.tar"
                    )
            return info

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

        failed, silence = False, self.options.silence

        def ask() -> bytes:
            nonlocal failed
            if failed:  # a changed shard fails in many ways: check before retrying
                self._check_unchanged(shard, at_once=True)
            failed = True
            filesystem, path = self._resolve(shard.url)
            same: bool | None = None  # unknown
            if shard.url.startswith(_HTTP):
                with self._told_by_size(shard):
                    data, same = self._wait(
                        filesystem, http.read_range, filesystem, path, shard, start, stop, silence
                    )
            elif shard.url.startswith(_S3):
                data, same = self._wait(filesystem, _ask_s3, filesystem, path, shard, start, stop)
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
            with writing(path):
                handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(handle, "wb", buffering=0) as file:

                def write(piece: bytes) -> None:
                    if file.tell() + len(piece) > shard.size:
                        raise OSError(f"sends more than its {shard.size} bytes")
                    with writing(path):
                        while piece:
                            piece = piece[file.write(piece) :]

                same, silence = True, self.options.silence
                if shard.url.startswith(_HTTP):
                    with self._told_by_size(shard):
                        same = self._wait(
                            filesystem, http.read_whole, filesystem, remote, shard, write, silence
                        )
                elif shard.url.startswith(_S3):
                    for start in range(0, shard.size, _PIECE):
                        write(self.read(shard, start, min(start + _PIECE, shard.size)))
                else:
                    with filesystem.open(remote, "rb") as stored:
                        while piece := stored.read(_PIECE):
                            write(piece)
                size = file.tell()
            if size != shard.size:
                raise OSError(f"got {size} of its {shard.size} bytes")
            if same is False:
                self._check_unchanged(shard, at_once=True)

        self._retried(fetch, shard.url)

    def can_read_ranges(self, url: str) -> bool:
        """Whether ranges are supported. An HTTP server may not; each host is tested once."""
        if not url.startswith(_HTTP):
            return True
        self._check_process()
        host = urlsplit(url).netloc
        with self._lock:
            if host not in self._ranges:
                self._ranges[host] = self._has_ranges(url)
                if not self._ranges[host]:
                    log.info("%s does not support ranged reads: its shards are downloaded whole", host)
            return self._ranges[host]

    def _has_ranges(self, url: str) -> bool:
        filesystem, path = self._resolve(url)
        silence = self.options.silence
        ask = partial(self._wait, filesystem, http.has_ranges, filesystem, path, silence)
        return self._retried(ask, url)

    @contextlib.contextmanager
    def _told_by_size(self, shard: ShardFile) -> Iterator[None]:
        """Stat a shard again whose server reports another size."""
        try:
            yield
        except http.OtherSizeError:
            self._check_unchanged(shard, at_once=True)
            raise

    def _wait(self, filesystem: Any, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return fsspec.asyn.sync(filesystem.loop, call, *arguments, **options)

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
                f"then, {now.size}, {now.version!r} now; open the pool again to index it again"
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
                    raise PoolError(f"{url}: does not exist, or disappeared since it was indexed") from error
                last = error.__cause__
            except PermissionError as error:
                raise PoolError(f"{url}: access denied ({printable(error)}); see storage_options") from error
            except CuratedDataError:
                raise
            except Exception as error:  # each protocol has its own network errors
                last = error
            if attempt + 1 < self.options.attempts:
                # With jitter, so that many readers do not return at once; no generator that users seed.
                pause = self.options.backoff * 2**attempt * (0.5 + random.SystemRandom().random())
                log.warning("%s: %s; trying again in %.3g s", url, printable(last), pause)
                time.sleep(pause)
        raise PoolError(
            f"{url}: cannot be read: {self.options.attempts} attempts failed over "
            f"{time.monotonic() - started:.1f} s ({printable(last)})"
        ) from last


def _state(url: str, info: Mapping[str, Any]) -> ShardFile:
    if info.get("type") == "directory":
        raise a_folder(url)
    if info.get("size") is None or int(info["size"]) < 0:
        raise PoolError(f"{url}: its server does not report its size, so it cannot be indexed")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return ShardFile(url, int(info["size"]), version)


async def _ask_s3(
    filesystem: Any, path: str, shard: ShardFile, start: int, stop: int
) -> tuple[bytes, bool | None]:
    """As `http.read_range`. s3fs's own methods do not return the version."""
    bucket, key, _ = filesystem.split_path(path)
    answer = await filesystem._call_s3(
        "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}"
    )
    pieces: list[bytes] = []
    try:
        missing = stop - start + 1  # one more than there should be, to see whether there is
        while missing > 0 and (piece := await answer["Body"].read(missing)):
            pieces.append(piece)
            missing -= len(piece)
    finally:
        answer["Body"].close()
    return b"".join(pieces), _is_same(shard, answer.get("ContentRange", ""), answer.get("ETag"))


def _is_same(shard: ShardFile, content_range: str, etag: str | None) -> bool | None:
    total = content_range.rpartition("/")[2]
    if total.isdigit() and int(total) != shard.size:
        return False
    return None if etag is None else etag == shard.version
