"""Reading files back exactly as they were written: each one's size and checksum, and clear errors.

The functions take a `remedy`, the end of every error message, as text: what to do about that file.
"""

import errno
import stat
import tokenize
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from curated_data.errors import CacheError

MapMode = Literal["r", "c"] | None

_BLOCK = 1 << 22


def file_seal(path: Path) -> dict[str, int]:
    """The size and checksum of a file, as `check_file` takes them."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def check_size(path: Path, seal: Mapping[str, int], remedy: object) -> None:
    """Check that a file exists and has the size it was written with.

    Raises:
        CacheError: it does not.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error, remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise CacheError(f"{path}: is no regular file; {remedy}")
    if status.st_size != seal["bytes"]:
        raise CacheError(f"{path}: damaged ({status.st_size} bytes of {seal['bytes']} written); {remedy}")


def check_file(path: Path, seal: Mapping[str, int], remedy: object) -> None:
    """Check that a file holds every byte as it was written. Reads all of it.

    Raises:
        CacheError: it does not.
    """
    check_size(path, seal, remedy)
    try:
        found = file_seal(path)
    except OSError as error:
        raise unreadable(path, error, remedy) from error
    if found != seal:
        raise CacheError(f"{path}: damaged (its checksum differs); {remedy}")


def load_npy(path: Path, remedy: object, *, map_mode: MapMode = None) -> np.ndarray:
    """`np.load` without pickles; whatever a damaged file makes it raise becomes one error.

    Args:
        map_mode: leave the array on disk, as a memory map: "r" read-only; "c" writable, but what is written
            stays in this process.

    Raises:
        CacheError: it cannot be read.
    """
    try:
        return np.load(path, mmap_mode=map_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise unreadable(path, error, remedy) from error


def unreadable(path: Path, error: BaseException, remedy: object) -> CacheError:
    """The error for a file that cannot be read. One that the system refuses to open is not called damaged."""
    if not isinstance(error, OSError) or error.errno is None:
        return CacheError(f"{path}: damaged ({error}); {remedy}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return CacheError(f"{path}: too many open files; raise `ulimit -n`")
    if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
        return CacheError(f"{path}: missing, or no file ({error.strerror}); {remedy}")
    return CacheError(f"{path}: cannot be read ({error.strerror}); see to its permissions and its disk")
