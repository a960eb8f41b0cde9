"""Locks across processes and hosts, and one clear error for folders that cannot be written."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from curated_data.cache.removal import remove
from curated_data.errors import CacheError
from curated_data.waiting import while_waiting

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between attempts; a blocking call would ignore Ctrl-C and may miss its wake-up
_REMIND = 600.0  # seconds between log lines while waiting

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HANDLES = (errno.EMFILE, errno.ENFILE)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
)
_DISK = (errno.EIO, errno.ESTALE)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path | str, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file beside `path`, across processes; yields whether it is held.

    With `wait=False` it yields False at once if another process holds the lock, so that the caller can take
    other work. The kernel releases the lock when its holder dies; on a network file system, once the holder's
    host is known to be gone. The lock file is removed with the lock; removing it by hand breaks the lock.

    Raises:
        CacheError: the lock file cannot be written, or the file system has no locks.
    """
    lock = lock_file(path)
    with writable(lock.parent, makes_folder=True):
        lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(lock, wait)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        remove_held(handle, lock)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it with forked children
        os.close(handle)


def remove_if_free(lock: Path, older_than: float) -> None:
    """Remove a lock file older than a time (in seconds since 1970), if no process holds the lock."""
    with contextlib.suppress(OSError, CacheError):
        if lock.lstat().st_mtime >= older_than:
            return
        handle = open_own(lock, os.O_RDWR)
        try:
            if try_lock(handle):
                remove_held(handle, lock)
        finally:
            os.close(handle)


def lock_file(path: Path | str) -> Path:
    """The file whose lock is the lock of `path`."""
    return Path(path).parent / ".locks" / f"{Path(path).name}.lock"


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing that only this package writes, and that may be emptied.

    Raises:
        CacheError: there is something else in its place: a link, a pipe, or a file with another name too.
        OSError: the system refuses.
    """
    if path.parent.name == ".locks" and path.parent.is_symlink():
        raise CacheError(f"{path.parent}: is a link; remove it, and a run creates a folder there")
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise CacheError(f"{path}: is a link, which is not followed; remove it") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise CacheError(f"{path}: is not a regular file; move it away") from error
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        what = "has a second name (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise CacheError(f"{path}: {what}, so it is not written; move it away")
    return handle


@contextlib.contextmanager
def writable(path: Path, *, makes_folder: bool = False, builds: bool = False) -> Iterator[None]:
    """Turn the system's errors about writing below `path` into a `CacheError`.

    Args:
        makes_folder: the block only creates the folder; "no such file" is such an error too, as in /proc.
        builds: the block reads other things too, whose errors are not those of writing.
    """
    try:
        yield
    except OSError as error:
        code = error.errno
        if builds and code not in _FULL and _is_elsewhere(error, path):
            raise
        if code in _DISK and builds:
            raise CacheError(
                f"{path}: the system reports {error} while something was written there, or read for it; see "
                "to the disks of both"
            ) from error
        if code in _FULL or (code is None and " requested and " in str(error)):  # numpy's own short write
            raise CacheError(
                f"{path}: no space left ({error}); free some, or give another cache_dir"
            ) from error
        if code in _HANDLES:
            raise CacheError(f"{path}: too many open files ({error}); raise `ulimit -n`") from error
        if code in (*_REFUSED, *_DISK) or (makes_folder and code in (errno.ENOENT, errno.EEXIST)):
            raise CacheError(f"{path}: cannot be written ({error}); give another place") from error
        raise


def _acquire(lock: Path, wait: bool) -> int | None:
    """A handle that holds the lock on the file `lock`; None if another has it and `wait` is False."""
    started, reminded = time.monotonic(), None
    while True:
        with writable(lock):
            handle = open_own(lock, os.O_RDWR | os.O_CREAT)
        try:
            held = try_lock(handle)
            if held and is_same(handle, lock):  # otherwise its holder removed the file as we opened it
                with contextlib.suppress(OSError):  # a full disk: it only tells others who holds the lock
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"{socket.gethostname()} pid {os.getpid()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        holder = "" if held else _holder(handle)
        os.close(handle)
        if held:
            continue
        if not wait:
            return None
        for look in while_waiting:
            look()
        now = time.monotonic()
        if reminded is None or now - reminded > _REMIND:
            reminded = now
            name = lock.name.removesuffix(".lock")
            log.info(
                "waiting for %s, which builds %s%s",
                holder,
                name,
                f", since {(now - started) / 60:.0f} min; if it is gone for good, remove {lock}"
                if now - started > _REMIND
                else "",
            )
        time.sleep(_POLL)


def remove_held(handle: int, lock: Path) -> None:
    """Remove a lock file whose lock is held, before the release: who opens the path now makes a new file."""
    if is_same(handle, lock):
        with contextlib.suppress(OSError, CacheError):
            remove(lock, below=lock.parent)


def try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            raise CacheError(
                f"file locks are refused ({error}) in the cache's file system; mount it with locks (Lustre: "
                "-o flock), or give a cache_dir elsewhere"
            ) from error
        raise
    return True


def is_same(handle: int, path: Path) -> bool:
    """Whether an open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:  # removed, or stale on a network file system
        return False


def _holder(handle: int) -> str:
    try:
        return os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def _is_elsewhere(error: OSError, path: Path) -> bool:
    """Whether an error names a file, and none below `path`."""
    if not isinstance(error.filename, str | bytes):
        return False
    named = Path(os.fsdecode(error.filename)).absolute()
    return path.absolute() not in (named, *named.parents)
