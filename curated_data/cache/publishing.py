"""Files and folders that appear whole or not at all: written under a temporary name, flushed, and renamed."""

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.locks import writable
from curated_data.cache.removal import TEMPORARY, remove
from curated_data.errors import CacheError


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` for a file or folder, which is renamed to `path` when the block ends.

    The content is flushed to disk before the rename, and the directory entry after it; inside a temporary
    folder neither is, because that folder is flushed as a whole. If the block raises, the temporary is
    removed and nothing changes. An existing file is replaced. An existing folder is kept and ours is dropped:
    a faster process has built it from the same inputs.
    """
    path = Path(path)
    with writable(path.parent, makes_folder=True):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        with writable(path.parent, builds=True):
            yield temporary
        is_inside = any(part.startswith(TEMPORARY) for part in path.parent.parts)
        with writable(path):
            if not is_inside:
                _flush(temporary)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if not is_inside:
                flush_entry(path.parent)
    finally:
        with contextlib.suppress(OSError, CacheError):  # the error of the block says more
            remove(temporary, below=path.parent)


def atomic_save(path: Path | str, array: np.ndarray) -> None:
    """`np.save` without pickles, published by `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def atomic_write_json(path: Path | str, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON object or array, indented and with sorted keys, published by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file of zeros, mapped for writing.

    Its disk space is reserved first: writing to a map without disk space behind it ends the process with a
    bus error.

    Raises:
        CacheError: the disk does not have enough space.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with writable(path), open(path, "r+b") as file, _unless(errno.EOPNOTSUPP, errno.EINVAL):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextlib.contextmanager
def _unless(*codes: int) -> Iterator[None]:
    """Suppress an `OSError` with one of these codes."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


def _flush(path: Path) -> None:
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            if entry.is_file() or entry.is_dir():
                flush_entry(entry)
    flush_entry(path)


def flush_entry(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
