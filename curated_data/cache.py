"""Artifacts named by what determined them, published whole or not at all.

An artifact is a file or a folder under the cache root whose name holds a fingerprint of everything that went
into it. Nothing under its final name is ever half-written: builders write to a temporary name beside it,
flush to disk, and rename. Locks are `flock`s, which the kernel drops when their holder dies, so a killed run
never blocks the next.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.errors import CacheError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"


def fingerprint(**parts: Any) -> str:
    """A 20-digit hexadecimal name for a set of inputs; equal inputs give equal names, on any machine.

    Args:
        parts: named inputs: numbers, strings, booleans, None, paths, numpy arrays, bytes, and lists, tuples
            or mappings of these.

    Raises:
        TypeError: an input of another type, whose identity cannot be told from its value.
    """
    digest = hashlib.sha256()
    _update(digest, parts)
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or a folder to; it takes the final name when the block
    ends.

    The content is flushed to disk before the rename, and the folder's entry after it. If the block raises,
    the temporary is removed and nothing changes. An existing file is replaced; an existing folder, made by a
    process that was faster, is kept and ours is dropped: both were built from the same fingerprint.
    """
    path = Path(path)
    with _writable(path.parent, makes_folder=True):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        with _writable(path.parent):
            yield temporary
        _flush(temporary)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _flush_entry(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def atomic_save(path: Path | str, array: np.ndarray) -> None:
    """`np.save` without pickles, published by `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def atomic_write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and with sorted keys, published by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object that `atomic_write_json` wrote.

    Raises:
        CacheError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path}: not a readable JSON object ({error}); remove its folder to rebuild it"
        ) from error
    if not isinstance(content, dict):
        raise CacheError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_manifest(folder: Path, stage: str, content: Mapping[str, Any]) -> None:
    """Write an artifact folder's `manifest.json`: its stage, the cache's format version, and what the stage
    says.
    """
    atomic_write_json(folder / MANIFEST, {"stage": stage, "format": FORMAT_VERSION, **content})


def read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Read and check an artifact folder's manifest.

    Raises:
        CacheError: it is missing, damaged, of another stage, or of another format version.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"{folder}: written in cache format {manifest.get('format')!r}, this version reads "
            f"{FORMAT_VERSION}; give another cache_dir, or remove this one to rebuild it"
        )
    if manifest.get("stage") != stage:
        raise CacheError(f"{folder}: is an artifact of {manifest.get('stage')!r}, expected {stage!r}")
    return manifest


@contextlib.contextmanager
def locked(path: Path | str, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file beside `path`, across processes; yields whether it is held.

    With `wait=False` it yields False at once where another process holds it: that process is at work, take
    another piece. The lock file stays behind on purpose: removing it would race with a process that has just
    opened it.
    """
    lock = Path(path).parent / ".locks" / f"{Path(path).name}.lock"
    with _writable(lock.parent, makes_folder=True):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    held = False
    try:
        held = _try_lock(handle)
        if not held and wait:
            log.info("waiting for %s, which builds %s", _holder(lock), Path(path).name)
            while (
                not held
            ):  # polling, so that Ctrl-C works and network file systems that lose wake-ups do no harm
                time.sleep(0.2)
                held = _try_lock(handle)
        if held:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{socket.gethostname()} pid {os.getpid()}".encode(), 0)
        yield held
    finally:
        if held:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to children forked meanwhile
        os.close(handle)


def build_once(folder: Path | str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return an artifact folder and whether it was there already; else one process builds it, the others
    wait.

    Args:
        folder: the final name; its last component holds the fingerprint.
        build: writes the whole artifact, manifest included, into the temporary folder that it is given.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        return folder, True
    with locked(folder):
        if (folder / MANIFEST).exists():
            return folder, True
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            build(temporary)
    return folder, False


def open_cache(root: Path | str) -> Path:
    """Make or check a cache root: writable, and of this format version. Sweeps temporaries of runs killed
    long ago.

    Raises:
        CacheError: it cannot be written, or another format version wrote it.
    """
    root = Path(root).expanduser().absolute()
    with _writable(root, makes_folder=True):
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-probe"
        probe.touch()
        probe.unlink()
    marker = root / "cache.json"
    if marker.exists():
        written = read_json(marker).get("format")
        if written != FORMAT_VERSION:
            raise CacheError(
                f"{root}: written in cache format {written!r}, this version reads {FORMAT_VERSION}; "
                "give another cache_dir, or remove this one to rebuild it"
            )
    else:
        atomic_write_json(marker, {"format": FORMAT_VERSION})
    _sweep(root)
    return root


def _update(digest: Any, value: Any) -> None:
    """Feed a value to a hash with its type and length, so that no two different inputs read the same."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str | Path):
        kind = "str" if isinstance(value, Path) else type(value).__name__
        text = repr(str(value) if isinstance(value, Path) else value)
        digest.update(f"{kind}:{len(text)}:{text};".encode())
    elif isinstance(value, bytes):
        digest.update(f"bytes:{len(value)}:".encode())
        digest.update(value)
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("cannot take the fingerprint of an object array")
        digest.update(f"array:{value.dtype.str}:{value.shape}:".encode())
        for start in range(0, len(value), 1 << 20) if value.ndim else ():  # in blocks: it may be a memory map
            digest.update(np.ascontiguousarray(value[start : start + (1 << 20)]).data)
        if not value.ndim:
            digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"map:{len(value)}:".encode())
        for key in sorted(value, key=str):
            _update(digest, str(key))
            _update(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"list:{len(value)}:".encode())
        for item in value:
            _update(digest, item)
    else:
        raise TypeError(f"cannot take the fingerprint of a {type(value).__name__}")


@contextlib.contextmanager
def _writable(path: Path, makes_folder: bool = False) -> Iterator[None]:
    """Turn the system's refusals to write below `path` into one clear error.

    Where the block only makes the folder, "no such file" is such a refusal too, as below /proc.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOSPC,
            errno.EDQUOT,
            errno.ENOTDIR,
            *((errno.ENOENT,) if makes_folder else ()),
        ):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{path}: no space left ({error}); free some, or give another cache_dir"
            ) from error
        raise CacheError(f"{path}: cannot be written ({error}); give a cache_dir that can be") from error


def _flush(path: Path) -> None:
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            if entry.is_file() or entry.is_dir():
                _flush_entry(entry)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: Path) -> str:
    try:
        return lock.read_text().strip() or "another process"
    except OSError:
        return "another process"


def _sweep(root: Path, older_than: float = 7 * 24 * 3600.0) -> None:
    """Remove temporaries that no living run can still be writing."""
    limit = time.time() - older_than
    for path in root.glob(f"*/{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
