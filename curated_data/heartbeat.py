"""A file that tells the other ranks what rank zero is doing, for waits longer than a collective's timeout."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from curated_data.locks import is_locked, locked

_BEAT = 10.0  # seconds between beats
_SILENCE = 600.0  # seconds without a beat after which rank zero counts as dead
_POLL = 0.05


class Heartbeat:
    """A status line that one process writes and others watch, through a file that all of them see.

    The file also holds a counter that goes up every ten seconds. On the same host a lock shows sooner that
    the writer has died; across hosts it cannot, because some file systems only lock within each host.

    Args:
        path: a unique name for each use; the files go to `.locks` beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.parent / ".locks" / f"{path.name}.heartbeat"
        self._said = "wait"
        self._beats = 0
        self._writing = threading.Lock()

    @contextlib.contextmanager
    def kept_up(self) -> Iterator[None]:
        """Keep the heartbeat up during the block; watchers are told if the block raises."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(_BEAT):
                with contextlib.suppress(OSError):  # a lasting failure shows elsewhere
                    self._write()

        with locked(self.path):
            self.say(self._said)
            thread = threading.Thread(target=beat, daemon=True)
            thread.start()
            try:
                yield
            except BaseException as error:
                with contextlib.suppress(OSError):
                    self.say(f"failed: {type(error).__name__}: {error}")
                raise
            else:
                self._file.unlink(missing_ok=True)
            finally:
                ended.set()
                thread.join()

    def say(self, line: str) -> None:
        """Set the status line."""
        self._said = line
        self._write()

    def wait_for(self, is_due: Callable[[str], bool]) -> str:
        """Watch until `is_due(line)` is true; returns the line.

        Raises:
            RuntimeError: the writer failed or died.
        """
        beats, since = -1, time.monotonic()
        while True:
            line, found, host = self._read()
            is_near = host == socket.gethostname()
            died = is_near and not is_locked(self.path)
            if died:  # or finished: its last status counts
                line, *_ = self._read()
            if is_due(line):
                return line
            if line.startswith("failed"):
                raise RuntimeError(f"rank 0 {line} (while it built {self.path.parent.name}/{self.path.name})")
            if found != beats:
                beats, since = found, time.monotonic()
            if died or time.monotonic() - since > _SILENCE:
                raise RuntimeError(
                    f"rank 0 died or hangs (while it built {self.path.parent.name}/{self.path.name}); see "
                    "its output, and start all ranks again to go on"
                )
            time.sleep(_POLL)

    def _write(self) -> None:
        with self._writing:
            self._beats += 1
            content = f"{socket.gethostname()}\n{self._beats}\n{self._said}"
            temporary = self._file.with_name(f".tmp-{os.getpid()}-{self._file.name}")
            temporary.write_text(content)
            os.replace(temporary, self._file)

    def _read(self) -> tuple[str, int, str]:
        """The line, the counter and the host; an empty line if there is no file (yet, or any more)."""
        try:
            host, beats, line = self._file.read_text().split("\n", 2)
        except (OSError, ValueError):
            return "", -1, ""
        return line, int(beats), host
