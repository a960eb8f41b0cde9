"""A folder that attacked processes cannot leave: forks that are watched, limited, and killed on demand."""

import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curated_data.errors import CuratedDataError

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ONE = {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.symlink"}
_TWO = {"os.rename", "os.link"}
_KILLABLE = _TWO | {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open", "fsync"}
_DEVICES = ("/dev/null", "/dev/tty", "/dev/urandom", "/dev/shm/torch_", "/dev/shm/sem.", "/proc/")
_SECONDS = re.compile(rb'"seconds": ?{[^}]*}')
_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass
class Ending:
    """How an attacked process came to its end.

    Attributes:
        how: "done", "error", "killed" (by us), "died" (by another signal), or "hung".
        value: what its function returned.
        error: of an exception, the message; its traceback is `trace`.
        is_ours: whether the exception is one of the package's.
        said: what it printed.
        n_events: file events that it went through.
        escapes: what it tried outside of the cage.
    """

    how: str
    value: Any = None
    error: str = ""
    trace: str = ""
    is_ours: bool = False
    said: str = ""
    n_events: int = 0
    seconds: float = 0.0
    escapes: list[str] = field(default_factory=list)


class Cage:
    """A fresh temporary folder, with a tree beside it that must not change.

    The folder is on a file system in memory if there is one, since every case flushes many files.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self.home = Path(tempfile.mkdtemp(prefix="chaos-", dir=place)).resolve()
        self.inside, self.canary = self.home / "cage", self.home / "canary"
        self.inside.mkdir()
        for name in ("precious", "cache.json", "deep/tree/manifest.json", "pool-000000.tar", "victim/x"):
            (self.canary / name).parent.mkdir(parents=True, exist_ok=True)
            (self.canary / name).write_text(f"years of work: {name}")
        self._canary, self._escapes = snapshot(self.canary), -1
        (self.inside / "tmp").mkdir()
        (self.inside / "case").mkdir()

    @property
    def case(self) -> Path:
        """The folder of the case at hand; always the same, since some artifacts tell where they lie."""
        return self.inside / "case"

    def fresh(self, start: Path | None) -> Path:
        """`case` as a copy of a folder."""
        shutil.rmtree(self.case)
        if start is None:
            self.case.mkdir()
        else:
            shutil.copytree(start, self.case, symlinks=True)
        return self.case

    def is_touched(self) -> bool:
        """Whether the tree beside the cage has changed."""
        return snapshot(self.canary) != self._canary

    def n_escapes(self) -> int:
        """How much an attacked process has noted of what it tried outside; to be asked in that process."""
        return os.fstat(self._escapes).st_size

    def close(self) -> None:
        shutil.rmtree(self.home)

    def start(
        self, function: Callable[[], Any], *, kill_at: int | None = None, events: frozenset[str] | None = None
    ) -> "Attacked":
        """Start a function in a fork; it is killed just before its `kill_at`-th file event, from 1."""
        return Attacked(self, function, kill_at, events or frozenset(_KILLABLE))

    def run(
        self,
        function: Callable[[], Any],
        *,
        limit: float = 60.0,
        kill_at: int | None = None,
        kill_after: float | None = None,
    ) -> Ending:
        """Run a function in a fork to its end; `kill_after` seconds it is killed."""
        return self.start(function, kill_at=kill_at).wait(limit, kill_after)


class Attacked:
    """A fork in a session of its own."""

    def __init__(
        self, cage: Cage, function: Callable[[], Any], kill_at: int | None, events: frozenset[str]
    ) -> None:
        self._files = [os.memfd_create(name) for name in ("report", "said", "escapes")]
        self._began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            _child(cage, function, kill_at, events, *self._files)
        self._watch = os.pidfd_open(self.process)

    def wait(self, limit: float, kill_after: float | None = None, watched: Path | None = None) -> Ending:
        """Wait for its end; a process that takes longer than the limit is killed, and has hung.

        Args:
            kill_after: seconds after which it is killed.
            watched: a file; while it grows, the limit begins again.
        """
        poll = select.poll()
        poll.register(self._watch, select.POLLIN)
        if kill_after is not None and not poll.poll(kill_after * 1000):
            os.kill(self.process, signal.SIGKILL)
        size, ended = -1, poll.poll(0 if watched else limit * 1000)
        while watched and not ended and size != (size := watched.stat().st_size if watched.exists() else 0):
            ended = poll.poll(limit * 1000)
        hung = not ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # its workers too
        status = os.waitpid(self.process, 0)[1]
        os.close(self._watch)
        seconds = time.monotonic() - self._began
        report, said, escapes = map(_content, self._files)
        lines = escapes.decode(errors="replace").splitlines()
        text = said.decode(errors="replace")
        if hung:
            return Ending("hung", said=text, escapes=lines, seconds=seconds)
        if os.WIFSIGNALED(status):
            how = "killed" if os.WTERMSIG(status) == signal.SIGKILL else "died"
            error = f"signal {os.WTERMSIG(status)}"
            return Ending(how, error=error, said=text, escapes=lines, seconds=seconds)
        if not report:
            return Ending("died", error=f"status {status}", said=text, escapes=lines, seconds=seconds)
        return Ending(**json.loads(report), said=text, escapes=lines, seconds=seconds)


def snapshot(folder: Path, skip: Callable[[str], bool] | None = None) -> dict[str, str]:
    """What a folder holds: a digest of each file by its relative path, in sorted order."""
    found = {}
    for above, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*files, *(one for one in folders if os.path.islink(os.path.join(above, one)))]):
            path = os.path.join(above, name)
            relative = os.path.relpath(path, folder)
            if skip is not None and skip(relative):
                continue
            if os.path.islink(path):
                found[relative] = f"link to {os.readlink(path)}"
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    content = file.read()
                if name.endswith(".html"):  # a page tells how long its run took
                    content = _SECONDS.sub(b"", content)
                found[relative] = hashlib.sha256(content).hexdigest()[:16]
            else:
                found[relative] = "no file"
    return found


def _child(
    cage: Cage,
    function: Callable[[], Any],
    kill_at: int | None,
    events: frozenset[str],
    report: int,
    said: int,
    escapes: int,
) -> None:
    try:
        os.setsid()
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(cage.case)
        cage._escapes = escapes
        counter = _guard(cage.inside, kill_at, events, escapes)
        try:
            found = {"how": "done", "value": function()}
        except BaseException as error:
            found = {
                "how": "error",
                "error": f"{type(error).__name__}: {error}",
                "trace": traceback.format_exc(),
                "is_ours": isinstance(error, CuratedDataError),
            }
        found["n_events"] = counter[0]
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(report, json.dumps(found).encode())
    finally:
        os._exit(0)


def _guard(inside: Path, kill_at: int | None, events: frozenset[str], escapes: int) -> list[int]:
    """Refuse and note whatever would change something outside; count file events, and die at one of them."""
    root, own, count = f"{inside}/", os.getpid(), [0]

    def event_of_file(event: str) -> None:
        if event in events and os.getpid() == own:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(own, signal.SIGKILL)

    def refuse(event: str, what: object) -> None:
        os.write(escapes, f"{event} {what!r}\n".encode())
        raise PermissionError(f"{event} {what!r} outside of the cage")

    def is_inside(path: object, folder: int, follows: bool) -> bool:
        if isinstance(path, int):
            return True  # opened before, and looked at then
        text = os.fsdecode(path)  # type: ignore[arg-type]
        if folder >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        text = os.path.abspath(text)
        above, name = os.path.split(text)
        real = os.path.realpath(text) if follows else os.path.join(os.path.realpath(above), name)
        return real.startswith((root, *_DEVICES))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & _WRITES:
                return
            if not is_inside(path, -1, follows=not flags & os.O_NOFOLLOW):
                refuse(event, path)
            event_of_file(event)
        elif event in _ONE:
            path = arguments[1] if event == "os.symlink" else arguments[0]
            last = arguments[-1]
            folder = last if event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(last, int) else -1
            if not is_inside(path, folder, follows=event in ("os.truncate", "os.utime", "os.chmod")):
                refuse(event, path)
            event_of_file(event)
        elif event in _TWO:
            for path, folder in zip(arguments[:2], arguments[2:4], strict=False):
                if not is_inside(path, folder, follows=False):
                    refuse(event, path)
            event_of_file(event)
        elif event == "socket.connect":
            address = arguments[1]
            if isinstance(address, tuple) and address[0] not in _HERE:
                refuse(event, address)

    fsync = os.fsync

    def counted(handle: Any) -> None:
        event_of_file("fsync")
        fsync(handle)

    os.fsync = counted
    sys.addaudithook(hook)
    return count


def _content(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    content = os.pread(handle, size, 0)
    os.close(handle)
    return content


@contextlib.contextmanager
def caged() -> Iterator[Cage]:
    """A cage for a block; temporary files of the attacked processes lie in it, too."""
    cage = Cage()
    before = dict(os.environ)
    scratch = str(cage.inside / "tmp")
    os.environ |= {"TMPDIR": scratch, "MPLCONFIGDIR": scratch, "XDG_CACHE_HOME": scratch, "COLUMNS": "500"}
    tempfile.tempdir = None
    try:
        yield cage
    finally:
        os.environ.clear()
        os.environ |= before
        tempfile.tempdir = None
        cage.close()
