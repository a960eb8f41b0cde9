"""Artifacts named by what determined them, published whole or not at all.

An artifact is a file or a folder under the cache root whose name holds a fingerprint of everything that went
into it. Nothing under its final name is ever half-written: builders write to a temporary name beside it,
flush to disk, and rename. Its manifest holds the size and the checksum of every file, so that what a disk or
a hand changed is named, not used. Locks are `flock`s, which the kernel drops when their holder dies, so a
killed run never blocks the next.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tokenize
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.errors import CacheError
from curated_data.locks import locked, remove_if_free, writable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MARKER = "cache.json"
_SEAL = "seal"
_SWEPT = ".swept"
_DAY = 24 * 3600.0
_BLOCK = 1 << 22
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

    The content is flushed to disk before the rename, and the folder's entry after it; within a temporary
    folder neither is, since that is flushed as a whole. If the block raises, the temporary is removed and
    nothing changes. An existing file is replaced; an existing folder, made by a process that was faster, is
    kept and ours is dropped: both were built from the same fingerprint.
    """
    path = Path(path)
    with writable(path.parent, makes_folder=True):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{path.name}"
    try:
        with writable(path.parent):
            yield temporary
        is_inside = any(part.startswith(_TEMPORARY) for part in path.parent.parts)
        with writable(path):
            if not is_inside:
                _flush(temporary)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if not is_inside:
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


def read_json(path: Path | str, remedy: str | None = None) -> dict[str, Any]:
    """Read a JSON object that `atomic_write_json` wrote; errors say what to do by `remedy`.

    Raises:
        CacheError: the file is missing, no JSON object, or not the one that was written (see `sealed`).
    """
    path = Path(path)
    remedy = remedy or _remedy(path)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, remedy) from error
    if not isinstance(content, dict):
        raise CacheError(f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}")
    seal, is_ours = content.pop(_SEAL, None), content.get("format", FORMAT_VERSION) == FORMAT_VERSION
    if is_ours and seal not in (None, _checksum(content)):  # another format is said by who reads it
        raise CacheError(f"{path}: damaged (its checksum differs); {remedy}")
    return content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself, which `read_json` looks at and takes off."""
    return {**content, _SEAL: _checksum(content)}


def write_manifest(folder: Path, stage: str, content: Mapping[str, Any]) -> None:
    """Write an artifact folder's `manifest.json`: its stage, the cache's format version, what the stage says,
    and the size and checksum of each file that lies beside it; so write it last.
    """
    files = {path.name: file_seal(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files.pop(MANIFEST, None)
    content = {"stage": stage, "format": FORMAT_VERSION, "files": files, **content}
    atomic_write_json(folder / MANIFEST, sealed(content))


def read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Read and check an artifact folder's manifest, and that its files are there in the size written.

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
        raise CacheError(
            f"{folder}: is an artifact of {manifest.get('stage')!r}, expected {stage!r}; "
            f"{_remedy(folder / MANIFEST)}"
        )
    for name, seal in manifest.get("files", {}).items():
        check_size(folder / name, seal, _remedy(folder / name))
    return manifest


def read_array(
    folder: Path, name: str, manifest: Mapping[str, Any], *, memory_map: bool = False
) -> np.ndarray:
    """An artifact's array `name`.npy, checked against the manifest that `read_manifest` gave.

    Args:
        memory_map: leave it on disk; its checksum is then not looked at, which would read all of it.

    Raises:
        CacheError: it is missing, holds pickles, or is not what was written.
    """
    path = folder / f"{name}.npy"
    if not memory_map and path.name in manifest.get("files", {}):
        check_file(path, manifest["files"][path.name], _remedy(path))
    return load_npy(path, _remedy(path), memory_map=memory_map)


def load_npy(path: Path, remedy: str, *, memory_map: bool = False) -> np.ndarray:
    """`np.load` of plain numbers; whatever a damaged file makes of it is one error that ends with `remedy`.

    Raises:
        CacheError: it cannot be read.
    """
    try:
        return np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise _unreadable(path, error, remedy) from error


def check_artifact(folder: Path) -> None:
    """Read all files of an artifact's folder and compare them with its manifest.

    Raises:
        CacheError: the manifest is damaged, or names a file that is missing or damaged.
    """
    for name, seal in read_json(folder / MANIFEST).get("files", {}).items():
        check_file(folder / name, seal, _remedy(folder / name))


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A zero array in a new .npy file, mapped for writing, its space on the disk reserved: writing to a map
    of space that is not there ends the process with a bus error.

    Raises:
        CacheError: the disk has not that much space.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with writable(path), open(path, "r+b") as file, _unless(errno.EOPNOTSUPP, errno.EINVAL):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def file_seal(path: Path) -> dict[str, int]:
    """A file's size and checksum, for `check_file`."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def check_size(path: Path, seal: Mapping[str, int], remedy: str) -> None:
    """That a file is there in the size it was written in.

    Raises:
        CacheError: it is not; says what to do by `remedy`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    if not stat.S_ISREG(status.st_mode):
        raise CacheError(f"{path}: is no regular file; {remedy}")
    if status.st_size != seal["bytes"]:
        raise CacheError(f"{path}: damaged ({status.st_size} bytes of {seal['bytes']} written); {remedy}")


def check_file(path: Path, seal: Mapping[str, int], remedy: str) -> None:
    """That a file holds what was written, byte for byte: reads all of it.

    Raises:
        CacheError: it does not; says what to do by `remedy`.
    """
    check_size(path, seal, remedy)
    try:
        found = file_seal(path)
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    if found != seal:
        raise CacheError(f"{path}: damaged (its checksum differs); {remedy}")


def is_complete(folder: Path) -> bool:
    """Whether an artifact stands under its name.

    Raises:
        CacheError: something else does: artifacts appear whole, so somebody has changed it since.
    """
    if (folder / MANIFEST).is_file():
        return True
    if os.path.lexists(folder):
        raise CacheError(
            f"{folder}: is no artifact (it has no {MANIFEST}); move it away, the next run builds it again"
        )
    return False


def build_once(folder: Path | str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return an artifact folder and whether it was there already; else one process builds it, the others
    wait.

    Args:
        folder: the final name; its last component holds the fingerprint.
        build: writes the whole artifact, manifest included, into the temporary folder that it is given.

    Raises:
        CacheError: something stands under the name that is no artifact, or the cache cannot be written.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder, True
    with locked(folder):
        if is_complete(folder):
            return folder, True
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            build(temporary)
    return folder, False


def absolute(path: Path | str) -> Path:
    """A path that stays the same place when the process changes its working directory."""
    return Path(path).expanduser().absolute()


def open_cache(root: Path | str) -> Path:
    """Make or check a cache root: writable, and of this format version. Sweeps temporaries of runs killed
    long ago.

    Raises:
        CacheError: it cannot be written, or another format version wrote it.
    """
    if not str(root):
        raise CacheError("cache_dir: is empty; give a folder")
    root = absolute(root)
    with writable(root, makes_folder=True):
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-probe"
        probe.touch()
        now = probe.stat().st_mtime  # by the file server's clock, which also dates what is swept
        probe.unlink()
    marker = root / _MARKER
    if marker.exists():
        written = read_json(marker).get("format")
        if written != FORMAT_VERSION:
            raise CacheError(
                f"{root}: written in cache format {written!r}, this version reads {FORMAT_VERSION}; "
                "give another cache_dir, or remove this one to rebuild it"
            )
    else:
        atomic_write_json(marker, {"format": FORMAT_VERSION})
    _sweep(root, now)
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
def _unless(*codes: int) -> Iterator[None]:
    """Pass over an `OSError` with one of the codes."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


def _remedy(path: Path) -> str:
    """What to remove where a file is damaged: all of the artifact that it is a part of."""
    if path.name == _MARKER:
        return f"see what else {path.parent} has lost, and remove that file, or give another cache_dir"
    folders = [folder for folder in path.parents if (folder.parent.parent / _MARKER).exists()]
    return f"remove {folders[0] if folders else path.parent} to have it built again"


def _unreadable(path: Path, error: BaseException, remedy: str) -> CacheError:
    """The error for a file that cannot be read: what is there but refused is not damaged."""
    code = getattr(error, "errno", None)
    if code in (errno.EMFILE, errno.ENFILE):
        return CacheError(f"{path}: too many open files; raise `ulimit -n`")
    if isinstance(error, OSError) and code not in (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
        return CacheError(f"{path}: cannot be read ({error.strerror}); see to its permissions and its disk")
    if code is not None:
        return CacheError(f"{path}: missing, or no file ({error.strerror}); {remedy}")
    return CacheError(f"{path}: damaged ({error}); {remedy}")


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


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


def _sweep(root: Path, now: float) -> None:
    """Remove what killed runs left and no living one can still be using; looks once a day."""
    last = root / _SWEPT
    if last.exists() and abs(now - last.stat().st_mtime) < _DAY:
        return
    with contextlib.suppress(OSError):  # of another user's cache, say: sweeping is a courtesy
        last.touch()
        for pattern in (f"{_TEMPORARY}*", f"*/{_TEMPORARY}*", f"embeddings/*/{_TEMPORARY}*"):
            for path in root.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < now - 7 * _DAY:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for pattern in ("*/.locks/*", "embeddings/*/.locks/*"):
            for path in root.glob(pattern):
                remove_if_free(path, older_than=now - 7 * _DAY)
