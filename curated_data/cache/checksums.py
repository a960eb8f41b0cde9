"""Reading files back exactly as they were written: each one's size and checksum, and clear errors.

The functions take a `remedy`, the end of every error message, as text: what to do about that file. Whatever a
file makes a reader raise, `reading` turns into one error.
"""

import contextlib
import errno
import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal

import numpy as np

from curated_data.cache.paths import local_path
from curated_data.errors import CacheError, ConfigError, CuratedDataError, first_line

MapMode = Literal["r", "c"] | None

_BLOCK = 1 << 22
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_verified: set[tuple[int, ...]] = set()  # states of files that this process has found to be as written


@contextlib.contextmanager
def reading(path: Path, remedy: object) -> Iterator[None]:
    """Turn every error of the block, which reads a file, into one that names the file and what to do.

    There is no list of the errors that count: what a damaged file makes a parser raise has no end.
    """
    try:
        yield
    except CuratedDataError:
        raise
    except Exception as error:
        raise unreadable(path, error, remedy) from error


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a regular file for reading; a pipe, a socket or a device in its place never blocks.

    Raises:
        OSError: there is not a regular file.
    """
    return open(path, "rb", opener=_open_regular)


def read_bytes(path: Path | str) -> bytes:
    """All bytes of a regular file."""
    with open_regular(path) as file:
        return file.read()


def file_checksum(path: Path) -> dict[str, int]:
    """The size and checksum of a file, as `check_file` takes them."""
    crc, size = 0, 0
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def check_size(path: Path, checksum: Mapping[str, int], remedy: object) -> None:
    """Check that a file exists and has the size it was written with.

    Raises:
        CacheError: it does not.
    """
    _state(path, checksum, remedy)


def check_file(path: Path, checksum: Mapping[str, int], remedy: object) -> None:
    """Check that a file holds every byte as it was written. Reads all of it.

    Raises:
        CacheError: it does not.
    """
    check_size(path, checksum, remedy)
    with reading(path, remedy):
        found = file_checksum(path)
    if found != {"bytes": checksum["bytes"], "crc32": checksum["crc32"]}:
        raise CacheError(f"{path}: damaged (its checksum differs); {remedy}")


def check_once(path: Path, checksum: Mapping[str, int], remedy: object) -> None:
    """`check_file`, unless this process has found the same file, unchanged since, to be as written.

    For files that stay on disk as memory maps, and are opened again and again. The first look reads the whole
    file, at 1 to 2 GB/s where it is in memory; the others ask for its state only. Forked processes inherit
    what was found.

    Raises:
        CacheError: it does not hold what was written.
    """
    before = _state(path, checksum, remedy)
    if before not in _verified:
        check_file(path, checksum, remedy)
        if _state(path, checksum, remedy) == before:  # otherwise it changed while it was read
            _verified.add(before)


def check_all_once(checksums: Mapping[Path, Mapping[str, int]], remedy: Mapping[Path, object]) -> None:
    """`check_once` of several files, by a few threads; raises the error of the first."""
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda path: check_once(path, checksums[path], remedy[path]), checksums):
            pass


def load_npy(path: Path, remedy: object, *, map_mode: MapMode = None) -> np.ndarray:
    """An array from a `.npy` file without pickles, which holds as many bytes as its header says.

    Args:
        map_mode: leave the array on disk, as a memory map: "r" read-only; "c" writable, but what is written
            stays in this process.

    Raises:
        CacheError: it cannot be read.
    """
    with reading(path, remedy), open_regular(path) as file:
        shape, is_fortran, dtype = _header(file, os.fstat(file.fileno()).st_size)
        order: Literal["C", "F"] = "F" if is_fortran else "C"
        if map_mode is not None:
            return np.memmap(file, dtype, map_mode, file.tell(), shape, order)
        return np.fromfile(file, dtype, math.prod(shape)).reshape(shape, order=order)


def load_given(place: str | Path, name: str) -> np.ndarray:
    """An array from a `.npy` file that the user names.

    Args:
        place: as the user gave it.
        name: of the setting, for the error.

    Raises:
        ConfigError: it cannot be read, or is a URL.
    """
    try:
        return load_npy(local_path(place, name), "give another")
    except CacheError as error:
        raise ConfigError(f"{name}: {error}") from error


def load_npz(path: Path, names: Sequence[str], remedy: object) -> dict[str, np.ndarray]:
    """Arrays from a `.npz` archive without pickles or compression.

    Each member is read to its end, so that its checksum covers all of it, the header of the array included.

    Raises:
        CacheError: it lacks one of the names, or cannot be read.
    """
    with reading(path, remedy), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        found = {}
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:  # of which a few bytes can become any number
                raise ValueError(f"its member {name!r} is compressed")
            content = io.BytesIO(archive.read(member))
            shape, is_fortran, dtype = _header(content, len(content.getbuffer()))
            flat = np.frombuffer(content.getbuffer(), dtype, math.prod(shape), content.tell())
            found[name] = flat.reshape(shape, order="F" if is_fortran else "C").copy()
        return found


def unreadable(path: Path, error: BaseException, remedy: object) -> CacheError:
    """The error for a file that cannot be read. One that the system refuses to open is not called damaged."""
    if isinstance(error, MemoryError):
        return CacheError(f"{path}: there is not enough memory to read it; free some, and run again")
    if not isinstance(error, OSError) or error.errno is None:
        return CacheError(f"{path}: damaged ({first_line(error)}); {remedy}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return CacheError(f"{path}: too many open files; raise `ulimit -n`")
    if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ELOOP):
        return CacheError(f"{path}: missing, or no file ({error.strerror}); {remedy}")
    return CacheError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk")


def _open_regular(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError("is not a regular file")
    except BaseException:
        os.close(handle)
        raise
    return handle


def _state(path: Path, checksum: Mapping[str, int], remedy: object) -> tuple[int, ...]:
    """What identifies a file with its content as it is now, and the checksum that it should have."""
    with reading(path, remedy):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CacheError(f"{path}: is not a regular file; {remedy}")
    if status.st_size != checksum["bytes"]:
        raise CacheError(f"{path}: damaged ({status.st_size} bytes of {checksum['bytes']} written); {remedy}")
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times, checksum["crc32"])


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an array, which fills the rest of its `size` bytes."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array file of version {version}")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    written = file.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or written != size:
        raise ValueError(f"{size} bytes, but its header says {written}")
    return shape, is_fortran, dtype
