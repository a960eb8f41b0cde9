"""The progress of a long clustering on disk: finished pieces, each written completely or not at all."""

import json
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from curated_data import parallel
from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest, write_manifest
from curated_data.cache.publishing import atomic_path
from curated_data.cache.removal import TEMPORARY, shown, tidy
from curated_data.errors import CacheError

Arrays = dict[str, np.ndarray]

_WRITING_SHARE = 0.1  # largest share of the time spent on writing the state of work in progress


class Checkpoint:
    """The finished pieces of one run, by name, in a folder.

    In a process group only rank zero looks at the folder and tells the others what it found, since they might
    see a later state.

    Args:
        folder: for the pieces; created if missing. None keeps nothing.
        run: the fingerprint of data and settings; a folder of another run is rejected.

    Raises:
        CacheError: the folder contains something else, or another run's pieces. Raised on every rank.
    """

    def __init__(self, folder: Path | str | None, run: str) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._on_rank_zero(partial(_open, self.folder, run))

    def save(self, name: str, arrays: Arrays) -> None:
        """Write a piece, on this rank."""
        if self.folder is None:
            return
        with atomic_path(self.folder / name) as temporary:
            temporary.mkdir()
            for key, array in arrays.items():
                np.save(temporary / f"{key}.npy", array, allow_pickle=False)
            write_manifest(temporary, "clustering-piece", {})

    def load(self, name: str) -> Arrays | None:
        """Read a piece; None if it does not exist yet.

        Raises:
            CacheError: it is damaged. Raised on every rank.
        """
        if self.folder is None:
            return None
        folder, arrays = self.folder / name, {}

        def read() -> list[tuple[str, str, list[int]]] | None:
            if not folder.exists():
                return None
            arrays.update(_read(folder))
            return [(key, array.dtype.str, list(array.shape)) for key, array in arrays.items()]

        described = self._on_rank_zero(read)
        if described is None:
            return None
        return {
            key: parallel.broadcast(arrays.get(key, np.zeros(shape, np.dtype(dtype))))
            for key, dtype, shape in described
        }

    def names(self) -> list[str]:
        """The names of all pieces."""
        if self.folder is None:
            return []
        folder = self.folder
        return self._on_rank_zero(lambda: sorted(p.parent.name for p in folder.glob(f"[!.]*/{MANIFEST}")))

    def drop(self, name: str) -> None:
        """Remove a piece that another one replaces, on this rank."""
        if self.folder is not None:
            tidy(self.folder / name, below=self.folder)

    def _on_rank_zero(self, look: Callable[[], Any]) -> Any:
        """Call `look()` on rank zero; return its JSON-like answer, or raise its error, on every rank."""
        if not parallel.is_distributed():
            return look()
        payload, failed = b"", None
        if parallel.rank() == 0:
            try:
                payload = json.dumps({"answer": look()}).encode()
            except Exception as error:  # raised below, after the others have been told
                payload, failed = json.dumps({"error": str(error)}).encode(), error
        length = int(parallel.broadcast(np.array([len(payload)]))[0])
        received = parallel.broadcast(
            np.frombuffer(payload, np.uint8) if parallel.rank() == 0 else np.zeros(length, np.uint8)
        )
        if failed is not None:
            raise failed
        message = json.loads(received.tobytes())
        if "error" in message:
            raise CacheError(message["error"])
        return message["answer"]


class Running:
    """The saved state of a k-means in progress, so that a kill loses minutes instead of hours.

    It is written at most every `seconds`, and rarely enough for writing to take at most a tenth of the time;
    a k-means that ends sooner writes nothing. Pieces are numbered, and a new one is written before the last
    is removed.

    Args:
        saved: the run's checkpoint.
        name: of the pieces; no other piece's name may begin with it.
        seconds: the minimum time between two writes.
        alone: this process works by itself, even in a group; otherwise all ranks call each method together.
    """

    def __init__(self, saved: Checkpoint, name: str, seconds: float, *, alone: bool = False) -> None:
        self.saved, self.name, self.seconds, self.alone = saved, name, seconds, alone
        self.last, self.took = time.monotonic(), 0.0
        self.number = 0

    def load(self, names: Iterable[str] | None = None) -> Arrays | None:
        """The last saved state, or None. All ranks call this together, also with `alone`.

        Args:
            names: of all pieces of the checkpoint, if the caller has them.
        """
        names = self.saved.names() if names is None else names
        mine = re.compile(rf"{re.escape(self.name)}-[0-9]{{6,12}}", re.ASCII)
        pieces = sorted(filter(mine.fullmatch, names))
        if not pieces:
            return None
        self.number = int(pieces[-1].rpartition("-")[2])
        return self.saved.load(pieces[-1])

    def offer(self, state: Callable[[], Arrays]) -> None:
        """Save `state()` if it is due."""
        if self.saved.folder is None:
            return
        began = time.monotonic()
        due = began - self.last >= max(self.seconds, self.took / _WRITING_SHARE)
        if not self.alone:  # by rank zero's clock
            due = bool(parallel.broadcast(np.array([due], np.int64))[0])
        if not due:
            return
        arrays = state()
        self.number += 1
        if self.alone or parallel.rank() == 0:
            self.saved.save(f"{self.name}-{self.number:06d}", arrays)
            self.saved.drop(f"{self.name}-{self.number - 1:06d}")
        self.last = time.monotonic()
        self.took = self.last - began

    def clear(self) -> None:
        """Remove the saved state, because the work is finished."""
        if self.alone or parallel.rank() == 0:
            self.saved.drop(f"{self.name}-{self.number:06d}")


def _open(folder: Path, run: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: is a file; give a folder for the checkpoint")
    if not (folder / MANIFEST).exists():
        strange = [p.name for p in folder.glob("*") if not p.name.startswith(".")]
        if strange:
            raise CacheError(f"{folder}: holds {strange[0]!r} but no checkpoint; give an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, "clustering-checkpoint", {"run": run})
    found = read_manifest(folder, "clustering-checkpoint").get("run")
    if found != run:
        raise CacheError(
            f"{folder}: belongs to another run ({shown(found)}, this one is {run}): the data or a setting "
            "changed; give another checkpoint folder"
        )
    for leftover in folder.glob(f"{TEMPORARY}*"):  # of a killed run; the folder has one user at a time
        tidy(leftover, below=folder)


def _read(folder: Path) -> Arrays:
    manifest = read_manifest(folder, "clustering-piece")
    names = [name.removesuffix(".npy") for name in manifest["files"] if name.endswith(".npy")]
    return {name: read_array(folder, name, manifest) for name in names}
