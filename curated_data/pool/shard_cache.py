"""A bounded folder of downloaded shards that several processes share."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from curated_data.cache import atomic_path, locked
from curated_data.errors import PoolError
from curated_data.pool.storage import ShardFile

log = logging.getLogger(__name__)


class ShardCache:
    """Downloaded shards under `folder`, at most `limit` bytes of them; the longest unused go first.

    A shard's file is named by its fingerprint, so shards of one base name do not meet. It may be evicted
    while
    others read it: what they have open stays readable until they close it.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit

    def open(self, shard: ShardFile, download: Callable[[ShardFile, Path], None]) -> int:
        """An open file of the shard; one process downloads it if it is not there, the others wait.

        Args:
            shard: what is wanted.
            download: writes the shard to an existing file of its size.

        Raises:
            PoolError: the shard alone is larger than the limit.
        """
        path = self.folder / f"{shard.fingerprint}.tar"
        while True:
            handle = self._open_existing(path)
            if handle is not None:
                return handle
            with locked(path):
                if not path.exists():
                    with atomic_path(path) as temporary:
                        self._reserve(temporary, shard)
                        download(shard, temporary)

    def _open_existing(self, path: Path) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with contextlib.suppress(FileNotFoundError):  # evicted between the two lines, and open all the same
            os.utime(path)
        return handle

    def _reserve(self, temporary: Path, shard: ShardFile) -> None:
        """Make room and take it, by a file of the full size: processes must not count on the same room."""
        if shard.size > self.limit:
            raise PoolError(
                f"{shard.url}: has {shard.size} bytes, the shard cache holds {self.limit} in all; raise "
                "RemoteOptions.cache_bytes, or read by ranges"
            )
        with locked(self.folder / "eviction"):
            entries = []
            for path in self.folder.iterdir():
                if path.suffix != ".tar":
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.name.startswith(".tmp-") and self._is_abandoned(path):
                    path.unlink(missing_ok=True)
                else:
                    entries.append((status.st_mtime_ns, status.st_size, path))
            used = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if used + shard.size <= self.limit:
                    break
                if not path.name.startswith(".tmp-"):  # nor what others are downloading
                    path.unlink(missing_ok=True)
                    log.info("evicted %s (%d bytes) from the shard cache", path.name, size)
                    used -= size
            with open(temporary, "wb") as file:
                file.truncate(shard.size)

    def _is_abandoned(self, temporary: Path) -> bool:
        """Whether the process that was downloading this is gone: nobody holds the shard's lock."""
        with locked(self.folder / temporary.name.split("-", 2)[2], wait=False) as held:
            return held
