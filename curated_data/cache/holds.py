"""Which artifacts of a cache are in use, so that no run removes what another one still reads.

A process that reads an artifact holds a shared lock on a small file beside it, and `remove_unheld` removes
only what nobody holds. The kernel releases the lock of a process that dies. On network file systems that
carry `flock` to the server, the lock is seen by other hosts too.
"""

import contextlib
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from curated_data.cache.locks import is_same, lock_file, locked, open_own, remove_held, try_lock
from curated_data.cache.removal import remove, set_aside
from curated_data.errors import CacheError

MARKER = "cache.json"
"""The file that makes a folder a cache."""

_POLL = 0.01
_scopes = threading.local()  # of each thread: the holds of the blocks that it is in


class Hold:
    """A shared lock on an artifact of a cache, for as long as the object lives.

    Where no lock can be taken, as in a cache that belongs to another user, it holds nothing. A forked process
    keeps the hold of its parent as long as both live; a copy, or one that was pickled, is a hold of its own.

    Args:
        folder: of the artifact, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lock = lock_file(_use(folder))
        with contextlib.suppress(OSError, CacheError):
            handle = _acquire(lock)
            if handle is not None:
                weakref.finalize(self, _release, handle, lock, os.getpid())

    def __reduce__(self) -> "tuple[type[Hold], tuple[Path]]":
        return Hold, (self.folder,)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Keep what `hold` takes within the block, until its end."""
    outer = getattr(_scopes, "holds", None)
    _scopes.holds = []
    try:
        yield
    finally:
        _scopes.holds = outer


def hold(folder: Path) -> None:
    """Hold an artifact until the end of the block of `holding`; outside of one, this does nothing."""
    holds = getattr(_scopes, "holds", None)
    if holds is not None:
        holds.append(Hold(folder))


def remove_unheld(folder: Path, *, below: Path) -> bool:
    """Remove an artifact unless somebody holds it; returns whether nothing is left of it under its name.

    Raises:
        CacheError: it does not lie below the folder that the caller owns, or there are no locks.
        OSError: the system refuses.
    """
    if not os.path.lexists(folder):
        return True
    with locked(_use(folder), wait=False) as free:
        if not free:
            return False
        aside = set_aside(folder, below=below)
    if aside is not None:
        remove(aside, below=below)
    return True


def _use(folder: Path) -> Path:
    """What is locked: a name in the cache's own folder, since one of embeddings holds nothing but these."""
    return folder.parent.parent / f"{folder.parent.name}-{folder.name}"


def _acquire(lock: Path) -> int | None:
    """A handle that holds the lock with others; None outside of a cache."""
    if not (lock.parent.parent / MARKER).exists():
        return None
    lock.parent.mkdir(exist_ok=True)
    while True:
        handle = open_own(lock, os.O_RDWR | os.O_CREAT)
        try:
            held = try_lock(handle, fcntl.LOCK_SH)
            if held and is_same(handle, lock):  # otherwise who held it removed the file as we opened it
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if not held:  # for as long as a removal takes to rename
            time.sleep(_POLL)


def _release(handle: int, lock: Path, process: int) -> None:
    with contextlib.suppress(OSError, CacheError):
        if process == os.getpid():  # otherwise the lock is the parent's
            if try_lock(handle):  # nobody else holds it
                remove_held(handle, lock)
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it with forked children
    with contextlib.suppress(OSError):
        os.close(handle)
