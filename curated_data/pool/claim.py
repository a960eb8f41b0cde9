"""The marker of a writer at work, by which a living one is known from a dead one.

It lists the files that its run has written or is to replace, and says how far it came. The next run of the
same pattern goes on from there if it would write the same, or else removes these files, and no others.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Iterable
from typing import IO, NamedTuple

from curated_data.errors import CacheError, PoolError
from curated_data.pool.out import LocalFolder, RemoteFolder, writing

_HEADER = re.compile(r"(\S{1,255}) (\d{1,10}) ([0-9a-f]{32})")
# No file is called like this. The last is a checksum, since a line may be torn or damaged.
_PROGRESS = re.compile(r"/([0-9a-f]{20}|-) (\d{1,9}) (\d{1,15}) (\d{1,15}) [0-9a-f]{8}")
_alive: set[str] = set()  # the tokens of this process's writers in stores
# How many seconds a lock may be in the way: of a process that only looks; of a child of a killed writer,
# which shares its lock from the fork until it runs its command.
_GLANCE, _ORPHAN = 0.5, 10.0


class Progress(NamedTuple):
    """How far a run came.

    Attributes:
        run: a fingerprint of all that determines what it writes; "-" for one that cannot be continued.
        shards: how many it has published.
        samples: how many are in these.
        place: how far its source was read for these, as the run counts.
    """

    run: str
    shards: int = 0
    samples: int = 0
    place: int = 0


class Claim:
    """The right to write the shards of one pattern in a folder, until `release`.

    On this machine it is a lock on the marker, which the kernel releases when its holder dies. A store has no
    locks: its marker names host and process, so a writer on the same host is known to be dead or alive. One
    on another host is taken to be alive unless `overwrite` is asked.

    Args:
        folder: where the shards go.
        marker: the name of the marker in it.
        overwrite: take over the marker of a writer on another host.

    Attributes:
        listed: the files that the marker lists.
        progress: that of the run which is at work, or of a dead one before; None if it had none.

    Raises:
        PoolError: another writer is at work.
        CacheError: the marker cannot be written.
    """

    def __init__(self, folder: LocalFolder | RemoteFolder, marker: str, *, overwrite: bool = False) -> None:
        self.folder, self.marker = folder, marker
        self.token = uuid.uuid4().hex
        self.is_released = False
        self._file: IO[bytes] | None = None
        if isinstance(folder, LocalFolder):
            with writing(folder.path):
                folder.path.mkdir(parents=True, exist_ok=True)
            self._file = _locked_marker(folder, marker)
            content = folder.read(marker)
        else:
            content = folder.read(marker)
            _check_holder(folder, content, overwrite)
        self.listed, self.progress = names_in(content), _progress_in(content)
        if self._file is not None:
            self._append(["", _header(self.token)])  # after a line that a killed run may have torn
        else:
            self._put()
            self._check_ours()
            _alive.add(self.token)

    def add(self, names: Iterable[str]) -> None:
        """List files before they are written or replaced."""
        new = [name for name in names if name not in self.listed]
        if self._file is None:
            self._check_ours()
        if not new:
            return
        self.listed |= set(new)
        if self._file is not None:
            self._append(new)
        else:
            self._put()

    def note(self, progress: Progress) -> None:
        """Say how far the run is."""
        self.progress = progress
        if self._file is not None:
            self._append([_line(progress)])
        else:
            self._check_ours()
            self._put()

    def release(self, *, is_done: bool) -> None:
        """End it: the marker goes if the run is done, and stays for the next run if not."""
        if self.is_released:
            return
        self.is_released = True
        _alive.discard(self.token)
        try:
            if is_done:
                self.folder.remove(self.marker)  # under the lock: whoever opens it next makes a new one
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)  # closing alone leaves it with forked children
                self._file.close()

    def _append(self, lines: list[str]) -> None:
        assert self._file is not None, "on this machine"
        with writing(self.folder.place(self.marker)):
            self._file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _put(self) -> None:
        lines = [_header(self.token), *sorted(self.listed)]
        if self.progress is not None:
            lines.append(_line(self.progress))
        with self.folder.create(self.marker) as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))

    def _check_ours(self) -> None:
        content = self.folder.read(self.marker)
        if content is None or _holder(content)[2] != self.token:
            raise PoolError(
                f"{self.folder}: another writer of these shards ({_named(content or b'')}) has taken over; "
                "let only one write them"
            )


def check_free(folder: LocalFolder | RemoteFolder, marker: str, *, overwrite: bool) -> set[str]:
    """The files that a dead writer listed, without claiming anything.

    Raises:
        PoolError: a writer is at work.
    """
    content = folder.read(marker)
    if content is None:
        return set()
    if isinstance(folder, RemoteFolder):
        _check_holder(folder, content, overwrite)
        return names_in(content)
    with contextlib.suppress(FileNotFoundError), open(_open(folder, marker, os.O_RDONLY), "rb") as file:
        _wait_for(file, fcntl.LOCK_SH, folder)
        fcntl.flock(file, fcntl.LOCK_UN)
    return names_in(content)


def names_in(content: bytes | None) -> set[str]:
    """The names that a marker lists. They are compared with what is there, and never taken for paths."""
    lines = (content or b"").decode("utf-8", "surrogateescape").split("\n")[:-1]
    return {line for line in lines if line and "/" not in line and not _HEADER.fullmatch(line)}


def _progress_in(content: bytes | None) -> Progress | None:
    """The last progress that a marker notes; None if there is none, or it is damaged."""
    lines = (content or b"").decode("utf-8", "replace").split("\n")[:-1]  # the last may be torn
    last = next((line for line in reversed(lines) if line.startswith("/")), "")
    found = _PROGRESS.fullmatch(last)
    if found is None:
        return None
    progress = Progress(found[1], int(found[2]), int(found[3]), int(found[4]))
    return progress if _line(progress) == last else None


def _line(progress: Progress) -> str:
    text = "/" + " ".join(map(str, progress))
    return f"{text} {zlib.crc32(text.encode()):08x}"


def _open(folder: LocalFolder, marker: str, flags: int) -> int:
    path = folder.path / marker
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CacheError(f"{path}: cannot be opened ({error}); move it away, or write elsewhere") from error


def _locked_marker(folder: LocalFolder, marker: str) -> IO[bytes]:
    path = folder.path / marker
    while True:
        handle = _open(folder, marker, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        file = open(handle, "r+b", buffering=0)  # noqa: SIM115 (kept open)
        try:
            _wait_for(file, fcntl.LOCK_EX, folder)
        except BaseException:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):  # its holder removed it as we opened it
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return file
        file.close()


def _wait_for(file: IO[bytes], kind: int, folder: LocalFolder) -> None:
    """Lock a marker, or raise where a living writer holds it."""
    start = time.monotonic()
    while not _lock(file, kind):
        content = os.pread(file.fileno(), 4096, 0)
        host, process, _ = _holder(content)
        is_dead = host == socket.gethostname() and not _is_running(process)
        if time.monotonic() - start > (_ORPHAN if is_dead else _GLANCE):
            raise _at_work(folder, content)
        time.sleep(0.05)


def _lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise CacheError(
            f"{file.name}: its file system refuses file locks ({error}); mount it with locks, or write the "
            "shards elsewhere and copy them"
        ) from error
    return True


def _header(token: str) -> str:
    return f"{socket.gethostname()} {os.getpid()} {token}"


def _holder(content: bytes) -> tuple[str, int, str]:
    """Host, process and token in a marker; empty where it has none."""
    found = None
    for line in content.decode("utf-8", "replace").split("\n"):
        found = _HEADER.fullmatch(line) or found  # the last run's
    return (found[1], int(found[2]), found[3]) if found else ("", 0, "")


def _named(content: bytes) -> str:
    host, process, _ = _holder(content)
    return f"{host} process {process}" if host else "of an unknown process"


def _at_work(folder: LocalFolder | RemoteFolder, content: bytes) -> PoolError:
    return PoolError(
        f"{folder}: another writer of these shards is at work ({_named(content)}); wait for its end, or give "
        "another name or folder"
    )


def _check_holder(folder: LocalFolder | RemoteFolder, content: bytes | None, overwrite: bool) -> None:
    if content is None:
        return
    host, process, token = _holder(content)
    if host == socket.gethostname():
        if token in _alive or (process != os.getpid() and _is_running(process)):
            raise _at_work(folder, content)
    elif not overwrite:
        raise PoolError(
            f"{folder}: a writer of these shards ({_named(content)}) is at work, or was killed; if it is "
            "gone, pass overwrite=True (--overwrite) to start over"
        )


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
