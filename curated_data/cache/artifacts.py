"""Artifacts named by what determined them, published as a whole or not at all.

An artifact is a file or a folder under the cache root, named by a fingerprint of everything that went into
it. It never stands half-written under its final name: builders write to a temporary name beside it, flush to
disk, and rename. Its manifest holds the size and checksum of every file, so that files that were damaged or
edited raise an error instead of being used. Locks are `flock`s, which the kernel releases when their holder
dies, so a killed run never blocks the next.
"""

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from curated_data.cache.checksums import (
    MapMode,
    check_all_once,
    check_file,
    check_once,
    check_size,
    file_checksum,
    load_npy,
    load_npz,
    read_bytes,
    reading,
)
from curated_data.cache.holds import MARKER
from curated_data.cache.layout import CHECKPOINTS, EMBEDDINGS
from curated_data.cache.locks import locked, open_own, remove_if_free, writable
from curated_data.cache.paths import local_path
from curated_data.cache.publishing import atomic_path, atomic_write_json
from curated_data.cache.remedies import MANIFEST as MANIFEST
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import TEMPORARY, is_fingerprint, remove, shown
from curated_data.errors import CacheError

FORMAT_VERSION = 1
_CHECKSUM = "seal"  # its name in files, which earlier versions wrote
_SWEPT = ".swept"
_DAY = 24 * 3600.0
_REMOVED = f"{TEMPORARY}*-removed"  # what `removal.set_aside` left when it was killed


def fingerprint(**parts: Any) -> str:
    """A name for a set of inputs, 20 hexadecimal digits; equal inputs give equal names on any machine.

    Args:
        parts: named inputs: numbers, strings, booleans, None, paths, numpy arrays, bytes, and lists, tuples
            or mappings of these.

    Raises:
        TypeError: an input of another type, which has no well-defined identity.
    """
    digest = hashlib.sha256()
    _update(digest, parts)
    return digest.hexdigest()[:20]


def read_json(path: Path | str, remedy: object = None) -> dict[str, Any]:
    """Read a JSON object that `atomic_write_json` wrote.

    Args:
        remedy: how error messages end: what to do about the file. None says to remove its artifact.

    Raises:
        CacheError: the file is missing, is not a JSON object, or has changed since (see `with_checksum`).
    """
    path = Path(path)
    remedy = Remedy(path) if remedy is None else remedy
    with reading(path, remedy):
        content = json.loads(read_bytes(path))
    if not isinstance(content, dict):
        raise CacheError(f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}")
    checksum, is_ours = content.pop(_CHECKSUM, None), content.get("format", FORMAT_VERSION) == FORMAT_VERSION
    if is_ours and checksum not in (None, _checksum(content)):  # another format: left to the caller
        raise CacheError(f"{path}: damaged (its checksum differs); {remedy}")
    return content


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of itself, which `read_json` verifies and removes."""
    return {**content, _CHECKSUM: _checksum(content)}


def write_manifest(folder: Path, stage: str, content: Mapping[str, Any]) -> None:
    """Write the `manifest.json` of an artifact folder. Call it last: it records the files in the folder.

    It holds the stage, the format version, `content`, and the size and checksum of every file.
    """
    files = {
        path.name: file_checksum(path)
        for path in sorted(folder.iterdir())
        # What a killed run left is not part of the artifact, and will be removed.
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(TEMPORARY)
    }
    content = {"stage": stage, "format": FORMAT_VERSION, "files": files, **content}
    atomic_write_json(folder / MANIFEST, with_checksum(content))


def read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Read and check the manifest of an artifact folder, and the presence and size of its files.

    Raises:
        CacheError: it is missing, damaged, of another stage, or of another format version.
    """
    manifest = read_json(folder / MANIFEST)
    _check_manifest_format(folder, manifest)
    if manifest.get("stage") != stage:
        raise CacheError(
            f"{folder}: is an artifact of {shown(manifest.get('stage'))}, expected {stage!r}; "
            f"{Remedy(folder / MANIFEST)}"
        )
    manifest["files"] = _checksums(folder, manifest)
    for name, checksum in manifest["files"].items():
        check_size(folder / name, checksum, Remedy(folder / name))
    return manifest


def named_folder(root: Path, stage: str, manifest: Mapping[str, Any], *keys: str, of: Path) -> Path:
    """The folder `root / stage / NAME`, by a name that the manifest of another artifact holds.

    Args:
        keys: where in the manifest.
        of: the folder of that manifest, for the error.

    Raises:
        CacheError: there is something else than the name of an artifact.
    """
    name: Any = manifest
    for key in keys:
        name = name.get(key) if isinstance(name, Mapping) else None
    if not is_fingerprint(name):
        raise CacheError(
            f"{of / MANIFEST}: damaged ({'.'.join(keys)} is {shown(name)}, expected an artifact's name); "
            f"{Remedy(of / MANIFEST)}"
        )
    return root / stage / name


def read_array(
    folder: Path,
    name: str,
    manifest: Mapping[str, Any],
    *,
    map_mode: MapMode = None,
    dtype: DTypeLike = None,
    shape: tuple[int | None, ...] = (),
) -> np.ndarray:
    """The array `name`.npy of an artifact, checked against the manifest from `read_manifest`.

    Args:
        map_mode: leave it on disk, see `load_npy`. Its checksum is then verified once in a process, which
            reads all of it: for the index of 1e8 samples, 3 to 10 GB.
        dtype: that it must have, with `shape`, in which None is any length; None takes any array.

    Raises:
        CacheError: it is missing, contains pickles, has changed since it was written, or is another array.
    """
    path = folder / f"{name}.npy"
    check = check_file if map_mode is None else check_once
    check(path, _seal_of(path, manifest), Remedy(path))
    array = load_npy(path, Remedy(path), map_mode=map_mode)
    if dtype is not None:
        is_shape = len(shape) == array.ndim and all(
            wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(dtype) or not is_shape:
            raise CacheError(
                f"{path}: damaged (it holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} "
                f"{shape}); {Remedy(path)}"
            )
    return array


def read_arrays(
    folder: Path, name: str, arrays: Sequence[str], manifest: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Arrays of the archive `name`.npz of an artifact, checked against its manifest.

    Raises:
        CacheError: it is missing, lacks one, or has changed since it was written.
    """
    path = folder / f"{name}.npz"
    check_file(path, _seal_of(path, manifest), Remedy(path))
    return load_npz(path, arrays, Remedy(path))


def verify_once(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file of an artifact with its checksum, once in a process, before they are mapped.

    Raises:
        CacheError: a file is missing or damaged.
    """
    checksums = {folder / name: checksum for name, checksum in manifest["files"].items()}
    check_all_once(checksums, {path: Remedy(path) for path in checksums})


def check_artifact(folder: Path) -> None:
    """Read all files of an artifact and compare them with its manifest.

    Raises:
        CacheError: the manifest is damaged, or a file is missing or damaged.
    """
    manifest = read_json(folder / MANIFEST)
    _check_manifest_format(folder, manifest)
    for name, checksum in _checksums(folder, manifest).items():
        check_file(folder / name, checksum, Remedy(folder / name))


def is_complete(folder: Path) -> bool:
    """Whether there is an artifact at `folder`.

    Raises:
        CacheError: there is something else. Artifacts appear as a whole, so it was changed afterwards.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        return True
    # Looked at again: another run may have published the artifact in between.
    if os.path.lexists(folder) and not manifest.is_file():
        raise CacheError(
            f"{folder}: is not an artifact (it has no {MANIFEST}); move it away, and the next run rebuilds it"
        )
    return False


def build_once(folder: Path | str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """Build an artifact unless it exists: one process builds it while others wait.

    Args:
        folder: its final path; the last component is the fingerprint.
        build: writes the whole artifact, manifest included, into the temporary folder that it is given.

    Returns:
        The folder, and whether it already existed.

    Raises:
        CacheError: something that is not an artifact is in its place, or the cache cannot be written.
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
    """An absolute path, which stays valid if the process changes its working directory.

    Raises:
        CacheError: it is a URL; a cache needs locks and renames, which stores lack.
    """
    return local_path(path, "cache_dir", CacheError).absolute()


def open_cache(root: Path | str) -> Path:
    """Create a cache root, or check that it is writable and of this format version.

    Also removes temporary files of runs that were killed long ago.

    Raises:
        CacheError: it cannot be written, or another format version wrote it.
    """
    if not str(root):
        raise CacheError("cache_dir: is empty; give a folder")
    root = absolute(root)
    with writable(root, makes_folder=True):
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-probe"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        now = probe.lstat().st_mtime  # by the file server's clock, like the times of what is removed
        remove(probe, below=root)
    marker = root / MARKER
    if os.path.lexists(marker):
        check_format(root)
    else:
        atomic_write_json(marker, {"format": FORMAT_VERSION})
    _sweep(root, now)
    return root


def check_format(root: Path) -> None:
    """Check that the cache at `root` is of this format version.

    Raises:
        CacheError: it is of another, or its marker cannot be read.
    """
    written = read_json(root / MARKER).get("format")
    if written != FORMAT_VERSION:
        raise CacheError(
            f"{root}: written in cache format {shown(written)}, this version reads {FORMAT_VERSION}; give "
            "another cache_dir"
        )


def _check_manifest_format(folder: Path, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"{folder}: written in cache format {shown(manifest.get('format'))}, this version reads "
            f"{FORMAT_VERSION}; give another cache_dir, or {Remedy(folder / MANIFEST)}"
        )


def _checksums(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The size and checksum of each file of an artifact, by names that lie in its folder."""
    files, found = manifest.get("files"), {}
    for name, checksum in files.items() if isinstance(files, dict) else [(None, files)]:
        sizes: list[Any] = (
            [checksum.get(key) for key in ("bytes", "crc32")] if isinstance(checksum, dict) else []
        )
        if (
            not isinstance(name, str)
            or name in ("", ".", "..")
            or set(name) & {"/", "\0"}
            or [type(size) for size in sizes] != [int, int]
        ):
            raise CacheError(
                f"{folder / MANIFEST}: damaged (its files have {shown(name)}: {shown(checksum)}); "
                f"{Remedy(folder / MANIFEST)}"
            )
        if not name.startswith(TEMPORARY):  # earlier versions listed what a killed run had left
            found[name] = {"bytes": sizes[0], "crc32": sizes[1]}
    return found


def _seal_of(path: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    if path.name not in manifest["files"]:
        raise CacheError(f"{path}: is not in its artifact's {MANIFEST}; {Remedy(path)}")
    return manifest["files"][path.name]


def _update(digest: Any, value: Any) -> None:
    """Feed a value to a hash with its type and length, so that different inputs never give the same bytes."""
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
        for start in range(0, len(value), 1 << 20) if value.ndim else ():  # in blocks, for memory maps
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


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _sweep(root: Path, now: float) -> None:
    """Remove what killed runs left behind and no running one can still use; at most once a day."""
    last = root / _SWEPT
    with contextlib.suppress(OSError, CacheError):  # such as in another user's cache; sweeping is optional
        if os.path.lexists(last) and abs(now - last.lstat().st_mtime) < _DAY:
            return
        handle = open_own(last, os.O_WRONLY | os.O_CREAT)
        os.utime(handle)
        os.close(handle)
        for place in ("", "*/", f"{EMBEDDINGS}/*/", f"{CHECKPOINTS}/*/"):
            for path in root.glob(f"{place}{TEMPORARY}*"):
                with contextlib.suppress(OSError, CacheError):
                    if path.match(_REMOVED) or path.lstat().st_mtime < now - 7 * _DAY:
                        remove(path, below=root)
        for pattern in (".locks/*", "*/.locks/*", f"{EMBEDDINGS}/*/.locks/*"):
            for path in root.glob(pattern):
                remove_if_free(path, older_than=now - 7 * _DAY)
