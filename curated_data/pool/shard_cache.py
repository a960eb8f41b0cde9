"""A folder of downloaded shards, of bounded size, shared by several processes."""

import contextlib
import errno
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from curated_data.cache.locks import locked
from curated_data.cache.publishing import atomic_path
from curated_data.cache.removal import remove
from curated_data.errors import CacheError, PoolError
from curated_data.pool.out import writing
from curated_data.pool.shard import ShardFile
from curated_data.waiting import while_waiting

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between looks for room, while other downloads take it

_REMIND = 60.0  # seconds between log lines while waiting
_OURS = re.compile(r"(?P<temporary>\.tmp-[0-9a-f]{12}-)?(?P<file>[0-9a-f]{20}\.tar)")


class ShardCache:
    """Downloaded shards in `folder`, at most `limit` bytes; the least recently used are evicted first.

    Files are named by the shards' fingerprints, so shards with the same base name do not collide. A shard may
    be evicted while others read it: open files stay readable until they are closed.
    """

    patience = 600.0
    """Seconds to wait for room while the downloads that take it make no progress."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, shard: ShardFile, download: Callable[[ShardFile, Path], None]) -> int:
        """Open the shard's file; if it is missing, one process downloads it while others wait.

        A file of another size, or what is not a file, is taken for missing and replaced.

        Args:
            shard: to open.
            download: writes the shard to an existing file of its size.

        Returns:
            A file handle.

        Raises:
            PoolError: the shard alone is larger than the limit, or no room comes free for it.
            CacheError: the cache cannot be written, or a folder is in the file's place.
        """
        path = self.folder / f"{shard.fingerprint}.tar"
        while True:
            handle = self._open_existing(path, shard)
            if handle is not None:
                return handle
            with locked(path):
                handle = self._open_existing(path, shard)
                if handle is not None:
                    return handle
                if os.path.lexists(path):
                    self._drop_damaged(path, shard)
                with atomic_path(path) as temporary:
                    self._reserve(temporary, shard)
                    download(shard, temporary)
                    # Now, while it is ours: once it has its name, another download may evict it.
                    handle = self._open_existing(temporary, shard)
                if handle is not None:
                    return handle

    def _open_existing(self, path: Path, shard: ShardFile) -> int | None:
        """A handle of the shard's file; None if it is missing, or not whole."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EMLINK, errno.ENXIO):
                return None
            raise CacheError(f"{path}: cannot be opened ({error}); give another cache_dir") from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size != shard.size:
            os.close(handle)
            return None
        with contextlib.suppress(OSError):  # of another user's cache
            os.utime(handle)
        return handle

    def _drop_damaged(self, path: Path, shard: ShardFile) -> None:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CacheError(f"{path}: is a folder, expected a downloaded shard; move it away")
        log.warning(
            "%s: %s, expected %d bytes; downloading %s again",
            path,
            f"has {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "is not a regular file",
            shard.size,
            shard.url,
        )
        remove(path, below=self.folder)

    def _reserve(self, temporary: Path, shard: ShardFile) -> None:
        """Make room, and reserve it with a file of the full size, so that no other download takes it."""
        if shard.size > self.limit:
            raise PoolError(
                f"{shard.url}: has {shard.size} bytes, the shard cache holds {self.limit} in all; raise "
                "RemoteOptions.cache_bytes, or read by ranges"
            )
        reminded, moved = -math.inf, time.monotonic()
        before: dict[str, int] = {}
        while (others := self._try_to_reserve(temporary, shard.size)) is not None:
            for look in while_waiting:
                look()
            now = time.monotonic()
            if others != before:  # they make progress
                before, moved = others, now
            if now - moved > self.patience:
                raise PoolError(
                    f"{shard.url}: no room in the shard cache {self.folder} of {self.limit} bytes: "
                    f"{len(others)} other downloads take it, without progress for {now - moved:.0f} s "
                    f"({next(iter(others), '')}); end their processes, or raise RemoteOptions.cache_bytes"
                )
            if now - reminded > _REMIND:
                reminded = now
                log.info(
                    "waiting for %d other downloads that fill the shard cache %s (%d bytes), to download %s",
                    len(others),
                    self.folder,
                    self.limit,
                    shard.url,
                )
            time.sleep(_POLL)

    def _try_to_reserve(self, temporary: Path, size: int) -> dict[str, int] | None:
        """Reserve room for a file if eviction makes enough, and return None; otherwise the downloads that
        take what is left, with the time of their last progress.
        """
        with locked(self.folder / "eviction"):
            entries, others = [], {}
            for path in self.folder.iterdir():
                name = _OURS.fullmatch(path.name)
                if name is None:
                    continue
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    continue
                if name["temporary"] and self._is_abandoned(name["file"]):
                    remove(path, below=self.folder)
                    continue
                if name["temporary"]:
                    others[path.name] = status.st_mtime_ns
                entries.append((status.st_mtime_ns, status.st_size, path))
            used = sum(entry[1] for entry in entries)
            for _, freed, path in sorted(entries):
                if used + size <= self.limit:
                    break
                if path.name not in others:  # keep what others are downloading
                    remove(path, below=self.folder)
                    log.info("evicted %s (%d bytes) from the shard cache", path.name, freed)
                    used -= freed
            if used + size > self.limit:
                return others
            with writing(temporary):
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
                try:
                    os.truncate(handle, size)
                finally:
                    os.close(handle)
            return None

    def _is_abandoned(self, file: str) -> bool:
        """Whether the process that was downloading this is gone: the shard's lock is free."""
        with locked(self.folder / file, wait=False) as held:
            return held
