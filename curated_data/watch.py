"""How the ranks of a run notice that one of them has failed or died: by files that all of them see.

A collective call cannot tell: it waits for a rank that never comes, until its time limit, and then names a
socket. So each rank keeps a small record of its own state, and looks at that of the next rank, the last one
at that of the first. Whoever fails, or finds the next rank failed or dead, also writes so to one file, at
which all look every second. Every name holds a number of the run, so a later run never meets these files.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curated_data.errors import RankError
from curated_data.locks import is_locked, locked, open_own
from curated_data.removal import tidy
from curated_data.seals import read_bytes

_LOOK = 1.0  # seconds between looks at the others
_BEAT = 10.0  # seconds between beats
_SILENCE = 600.0  # seconds without a beat after which a rank of another host counts as dead
_POLL = 0.05
_UNSEEN: dict[str, Any] = {"meeting": 0, "met": {"meeting": 0}}
_LAST = 1 << 30  # the number of a run's last meeting
_SIZE = 4096  # bytes of a record, which is written in place: a failure must be told on a full disk too


class Watch:
    """One rank's view of all ranks of a run.

    On the same host a lock shows that a rank has died; across hosts it cannot, because some file systems only
    lock within each host. There a rank is dead once its record has not changed for ten minutes: a thread
    renews it, however slow the rank's own work is.

    Args:
        folder: for the records, in its `.locks`; on a file system that all ranks share.
        run: names this run; the same on all ranks.
        rank: of this process.
        n_ranks: of the run.

    Attributes:
        n_collectives: how many collective calls this rank has begun; the caller counts them.
        has_met_after_failure: whether `meet` has brought all together after one had failed.
    """

    def __init__(self, folder: Path, run: str, rank: int, n_ranks: int) -> None:
        self.rank, self.n_ranks = rank, n_ranks
        self.n_collectives = 0
        self.has_met_after_failure = False
        self._folder, self._run = folder, run
        self._failed = folder / ".locks" / f"{run}.failed"
        self._record: dict[str, Any] = {"host": _host(), "beats": 0} | _UNSEEN
        self._failure: dict[str, Any] | None = None  # "why", and "dead"
        self._writing = threading.Lock()

    @contextlib.contextmanager
    def kept_up(self) -> Iterator[None]:
        """Keep this rank's record up during the block; the others are told if the block raises."""
        ended = threading.Event()
        thread = threading.Thread(target=self._look_around, args=(ended,), daemon=True)
        with locked(self._path(self.rank)):
            self._write()  # its locks are beside it, so its folder exists
            thread.start()
            try:
                yield
            except BaseException as error:
                self.fail(error)
                raise
            else:
                for path in (self._record_of(self.rank), self._failed):
                    tidy(path, below=self._folder)
            finally:
                ended.set()
                thread.join()

    def sees(self, rank: int) -> bool:
        """Whether a rank's record can be read here."""
        return self._read(rank) is not None

    @property
    def failure(self) -> RankError | None:
        """The error of a rank that has failed or died: its number, and the reason."""
        return None if self._failure is None else RankError(self._failure["why"])

    def check(self) -> None:
        """Raise `failure`, if there is one."""
        if self._failure is not None:
            raise RankError(self._failure["why"])

    def explain(self, seconds: float) -> None:
        """Wait so long for the reason why a collective call broke; raise it as `check` does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(_POLL)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank has failed, unless it only repeats the failure of another."""
        if self._failure is None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._failure = {"why": f"rank {self.rank} failed: {reason}", "dead": False}
            self._tell()

    def announce(self, name: str) -> None:
        """Let the others know that this rank has got to `name`."""
        self._write(at=name)

    def announced(self, rank: int) -> str | None:
        """What a rank announced last."""
        return (self._read(rank) or {}).get("at")

    def wait_for(self, is_due: Callable[[], bool]) -> None:
        """Wait, outside of any collective call, until something is due.

        Raises:
            RankError: a rank has failed or died.
        """
        while not is_due():
            self.check()
            time.sleep(_POLL)

    def meet(self, *, in_spite_of_failures: bool = False) -> None:
        """Wait, outside of any collective call, until all ranks have called this.

        Args:
            in_spite_of_failures: wait for ranks that have failed, too, for the last time. Afterwards
                `failure` is set on all ranks, or on none.

        Raises:
            RankError: a rank has died, or failed. Or one failed between collective calls that others have
                made: then no more of them can be made.
        """
        number = _LAST if in_spite_of_failures else self._record["meeting"] + 1
        self._write(meeting=number, n_collectives=self.n_collectives)

        def wait(record: dict[str, Any]) -> None:
            failure = self._failure or record.get("failure")
            if failure is not None and (failure["dead"] or not in_spite_of_failures):
                self._failure = failure
                self.check()
            time.sleep(_POLL)

        if self.rank == 0:
            there = []
            for rank in range(self.n_ranks):
                while (record := self._read(rank) or _UNSEEN)["meeting"] < number:
                    wait(record)
                there.append(record)
            failure = next((record["failure"] for record in there if record.get("failure")), None)
            in_step = len({record["n_collectives"] for record in there}) == 1
            met: dict[str, Any] = {"meeting": number, "failure": failure, "in_step": in_step}
            self._write(met=met)
        else:
            while (met := (record := self._read(0) or _UNSEEN)["met"])["meeting"] < number:
                wait(record)
        self._failure = self._failure or met["failure"]
        if self._failure is not None and not in_spite_of_failures:
            self.check()
        self.has_met_after_failure = self._failure is not None
        if not met["in_step"]:
            why = (met["failure"] or {"why": "a rank failed"})["why"]
            raise RankError(f"{why}, while others were in a collective call, so the run cannot go on")

    def _look_around(self, ended: threading.Event) -> None:
        """Renew the own record, and look at the next rank, until `ended`."""
        other = (self.rank + 1) % self.n_ranks
        beats, since, beaten = -1, time.monotonic(), time.monotonic()
        while not ended.wait(_LOOK):
            now = time.monotonic()
            if now - beaten > _BEAT:
                beaten = now
                self._write()
            if self._failure is not None:
                continue
            told = _read_json(self._failed)
            if told is not None:
                self._failure = told
                continue
            record = self._read(other)
            if record is None:  # it has left with the others, or its file cannot be read now
                continue
            if record["beats"] != beats:
                beats, since = record["beats"], now
            found = record.get("failure")
            if found is None and record["host"] == _host() and not is_locked(self._path(other)):
                record = self._read(other)  # it may have left meanwhile, or told why
                if record is not None:
                    found = record.get("failure") or _died(other, "it was killed, or it crashed")
            elif found is None and record["host"] != _host() and now - since > _SILENCE:
                found = _died(other, f"its host has given no sign for {_SILENCE / 60:.0f} minutes")
            if found is not None:
                self._failure = found
                self._tell()

    def _tell(self) -> None:
        """Write the failure to the own record, which always has room, and to where all look."""
        self._write(failure=self._failure)
        temporary = self._failed.with_name(f".tmp-{self._run}-{self.rank}")
        with contextlib.suppress(OSError):
            if not self._failed.exists():
                handle = open_own(temporary, os.O_WRONLY | os.O_CREAT)
                try:
                    os.pwrite(handle, json.dumps(self._failure).encode(), 0)
                finally:
                    os.close(handle)
                os.replace(temporary, self._failed)

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._run}-{rank}"

    def _record_of(self, rank: int) -> Path:
        return self._folder / ".locks" / f"{self._run}-{rank}.rank"

    def _read(self, rank: int) -> dict[str, Any] | None:
        record = _read_json(self._record_of(rank))
        return None if record is None else {"host": "", "beats": 0} | _UNSEEN | record

    def _write(self, **changes: Any) -> None:
        """Renew the own record; a thread and the work itself do so."""
        with self._writing, contextlib.suppress(OSError):  # a lasting failure shows elsewhere
            self._record |= changes | {"beats": self._record["beats"] + 1}
            handle = open_own(self._record_of(self.rank), os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(handle, json.dumps(self._record).encode().ljust(_SIZE), 0)
            finally:
                os.close(handle)


def _died(rank: int, how: str) -> dict[str, Any]:
    return {
        "why": f"rank {rank} died: {how}; see its output, and start all ranks again to go on",
        "dead": True,
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none, or it is being written."""
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@functools.cache
def _host() -> str:
    """This machine, as it has been since it started: names of machines are not always unique."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
