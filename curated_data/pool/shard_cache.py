"""A folder of downloaded shards, of bounded size, shared by several processes."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from curated_data.cache import atomic_path
from curated_data.errors import PoolError
from curated_data.locks import locked
from curated_data.pool.storage import ShardFile

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between looks for room, while other downloads take it


class ShardCache:
    """Downloaded shards in `folder`, at most `limit` bytes; the least recently used are evicted first.

    Files are named by the shards' fingerprints, so shards with the same base name do not collide. A shard may
    be evicted while others read it: open files stay readable until they are closed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, shard: ShardFile, download: Callable[[ShardFile, Path], None]) -> int:
        """Open the shard's file; if it is missing, one process downloads it while others wait.

        Args:
            shard: to open.
            download: writes the shard to an existing file of its size.

        Returns:
            A file handle.

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
        with contextlib.suppress(FileNotFoundError):  # evicted just now, but open
            os.utime(path)
        return handle

    def _reserve(self, temporary: Path, shard: ShardFile) -> None:
        """Make room, and reserve it with a file of the full size, so that no other download takes it."""
        if shard.size > self.limit:
            raise PoolError(
                f"{shard.url}: has {shard.size} bytes, the shard cache holds {self.limit} in all; raise "
                "RemoteOptions.cache_bytes, or read by ranges"
            )
        while not self._try_to_reserve(temporary, shard.size):
            time.sleep(_POLL)

    def _try_to_reserve(self, temporary: Path, size: int) -> bool:
        """Reserve room for a file if eviction makes enough; False if other downloads take what is left."""
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
            used = sum(entry[1] for entry in entries)
            for _, freed, path in sorted(entries):
                if used + size <= self.limit:
                    break
                if not path.name.startswith(".tmp-"):  # keep what others are downloading
                    path.unlink(missing_ok=True)
                    log.info("evicted %s (%d bytes) from the shard cache", path.name, freed)
                    used -= freed
            if used + size > self.limit:
                return False
            with open(temporary, "wb") as file:
                file.truncate(size)
            return True

    def _is_abandoned(self, temporary: Path) -> bool:
        """Whether the process that was downloading this is gone: the shard's lock is free."""
        with locked(self.folder / temporary.name.split("-", 2)[2], wait=False) as held:
            return held
