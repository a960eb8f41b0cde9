"""The index of a pool: the key of every sample, and the extension, offset and size of each of its members.

Members are grouped into samples as in webdataset: neighbours whose names agree up to the first dot of the
base name. All arrays are flat (row i's part of an array is `array[start[i] : start[i + 1]]`), so that 1e8
samples are a handful of memory maps instead of a Python object each.
"""

import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import (
    MANIFEST,
    atomic_path,
    new_array,
    read_array,
    read_arrays,
    read_manifest,
    verify_once,
    write_manifest,
)
from curated_data.errors import CacheError, PoolError
from curated_data.pool.tar import Source, local_source, read_members
from curated_data.remedies import Remedy
from curated_data.removal import shown
from curated_data.seals import reading

log = logging.getLogger(__name__)

STAGE = "index"
POOL_STAGE = "pool"
CODE_VERSION = 1  # part of every shard's fingerprint; increase it when arrays or grouping change
ARRAYS = ("key_start", "key_bytes", "member_start", "member_extension", "member_offset", "member_size")
_BLOCK = 65_536  # samples whose keys are looked at at once
_RESERVED = ("__key__", "__url__", "__bad__", "__local_path__")  # webdataset's own fields of a sample

# How webdataset splits a name into key and extension, and the names that it skips.
_KEY_AND_EXTENSION = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA = re.compile(rb"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardIndex:
    """The places of the samples of one shard.

    Attributes:
        extensions: all extensions, in lower case, in order of first occurrence.
        key_start: (n + 1,) int64; sample i's key is `key_bytes[key_start[i] : key_start[i + 1]]`.
        key_bytes: uint8; the keys, as in the archive (nearly always UTF-8).
        member_start: (n + 1,) int64; sample i's members are rows `member_start[i]` to `member_start[i + 1]`
            of the following arrays.
        member_extension: (m,) int32 into `extensions`.
        member_offset: (m,) int64, the first byte of the member's data in the archive.
        member_size: (m,) int64, bytes.
    """

    extensions: list[str]
    key_start: np.ndarray
    key_bytes: np.ndarray
    member_start: np.ndarray
    member_extension: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray

    def __len__(self) -> int:
        return len(self.key_start) - 1

    def keys(self, rows: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """The keys of some samples, or of all."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        keys: list[str] = []
        for first in range(0, len(rows), _BLOCK):
            keys += self._keys(rows[first : first + _BLOCK])
        return keys

    def _keys(self, rows: np.ndarray) -> list[str]:
        starts = self.key_start[rows]
        lengths = self.key_start[rows + 1] - starts
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        joined = self.key_bytes[places].tobytes()
        begins = (ends - lengths).tolist()
        if joined.isascii():  # a byte is a character, so decode all at once
            text = joined.decode("ascii")
            return [text[begin:end] for begin, end in zip(begins, ends.tolist())]
        return [
            joined[begin:end].decode("utf-8", "surrogateescape") for begin, end in zip(begins, ends.tolist())
        ]


@dataclass(frozen=True)
class PoolIndex(ShardIndex):
    """The places of the samples of a pool: the concatenated indexes of its shards.

    Attributes:
        shard_start: (n_shards + 1,) int64; the first id of each shard, then the number of samples.
        n_duplicate_keys: samples with the key of an earlier sample.
        duplicate_example: one such key, or None.
    """

    shard_start: np.ndarray
    n_duplicate_keys: int = 0
    duplicate_example: str | None = None

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """The shard of each id, (n,) int64."""
        return np.searchsorted(self.shard_start, ids, side="right") - 1


def index_shard(shard: str | Path | Source) -> ShardIndex:
    """Index one archive by its headers, without reading the data of its members.

    Args:
        shard: a local path, or a `Source` for any other storage.

    Raises:
        PoolError: the file is missing, not a tar, compressed, damaged or truncated; or a sample has two
            members with the same extension, which webdataset rejects too.
    """
    if isinstance(shard, Source):
        return _group(shard)
    try:
        handle = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise PoolError(f"{shard}: cannot be opened ({error.strerror})") from error
    try:
        return _group(local_source(shard, handle))
    finally:
        os.close(handle)


def split_name(name: bytes) -> tuple[bytes, str] | None:
    """A member's key and extension, split as in webdataset; None for a name that it skips."""
    match = None if _METADATA.match(name) else _KEY_AND_EXTENSION.match(name)
    if match is None:
        return None
    extension = match.group(2).decode("utf-8", "surrogateescape").lower()
    return None if extension in _RESERVED else (match.group(1), extension)


def save_shard_index(folder: Path, index: ShardIndex, *, url: str) -> None:
    """Publish a shard's index as an artifact folder."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        arrays = io.BytesIO()  # in memory first: on a full disk an open archive raises again when closed
        np.savez(arrays, **{name: getattr(index, name) for name in ARRAYS})
        (temporary / "arrays.npz").write_bytes(arrays.getbuffer())
        write_manifest(
            temporary,
            STAGE,
            {
                "url": url,
                "extensions": index.extensions,
                "n_samples": len(index),
                "n_members": len(index.member_size),
                "n_key_bytes": len(index.key_bytes),
                "n_bytes": int(index.member_size.sum()),
            },
        )


def load_shard_index(folder: Path) -> ShardIndex:
    """Read what `save_shard_index` wrote.

    Raises:
        CacheError: missing, damaged, or written by another version.
    """
    return _read_shard_index(folder, read_manifest(folder, STAGE))


def _read_shard_index(folder: Path, manifest: Mapping[str, Any]) -> ShardIndex:
    return ShardIndex(manifest["extensions"], **read_arrays(folder, "arrays", ARRAYS, manifest))


def concatenate(indexes: Sequence[ShardIndex]) -> PoolIndex:
    """A pool's index in memory, from the indexes of its shards in order."""
    arrays = _empty_arrays(indexes)
    extensions: dict[str, int] = {}
    shard_start = np.zeros(len(indexes) + 1, np.int64)
    at = _Cursor()
    for number, index in enumerate(indexes):
        _append(arrays, at, index, extensions)
        shard_start[number + 1] = at.samples
    n_duplicates, example = count_duplicate_keys(arrays["key_start"], arrays["key_bytes"])
    return PoolIndex(
        list(extensions),
        **arrays,
        shard_start=shard_start,
        n_duplicate_keys=n_duplicates,
        duplicate_example=example,
    )


def write_pool_index(folder: Path, shard_folders: Sequence[Path]) -> None:
    """Write a pool's index into `folder` as `.npy` files, one shard in memory at a time.

    Args:
        folder: an existing, empty folder (a temporary one, published as a whole).
        shard_folders: the index artifacts of the shards, in the order of the pool.
    """
    manifests = [read_manifest(path, STAGE) for path in shard_folders]
    n_samples, n_members, n_key_bytes = (
        sum(manifest[name] for manifest in manifests) for name in ("n_samples", "n_members", "n_key_bytes")
    )
    arrays = {
        name: new_array(folder / f"{name}.npy", dtype, shape)
        for name, (dtype, shape) in _layout(n_samples, n_members, n_key_bytes).items()
    }
    extensions: dict[str, int] = {}
    shard_start = np.zeros(len(shard_folders) + 1, np.int64)
    at = _Cursor()
    for number, (path, manifest) in enumerate(zip(shard_folders, manifests, strict=True)):
        _append(arrays, at, _read_shard_index(path, manifest), extensions)
        shard_start[number + 1] = at.samples
    np.save(folder / "shard_start.npy", shard_start)
    n_duplicates, example = count_duplicate_keys(arrays["key_start"], arrays["key_bytes"])
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    write_manifest(
        folder,
        POOL_STAGE,
        {
            "extensions": list(extensions),
            "shards": [manifest["url"] for manifest in manifests],
            "n_samples": n_samples,
            "n_bytes": sum(manifest["n_bytes"] for manifest in manifests),
            "n_duplicate_keys": n_duplicates,
            "duplicate_example": example,
        },
    )


def load_pool_index(folder: Path) -> PoolIndex:
    """Open what `write_pool_index` wrote, as memory maps.

    Raises:
        CacheError: missing, damaged, or written by another version.
    """
    manifest = read_manifest(folder, POOL_STAGE)
    verify_once(folder, manifest)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        if not all(isinstance(name, str) for name in manifest["extensions"]):
            raise ValueError(f"extensions {shown(manifest['extensions'])}")
        arrays = {
            # A plain view of the map: indexing an np.memmap costs microseconds per call.
            name: np.asarray(read_array(folder, name, manifest, map_mode="r"))
            for name in (*ARRAYS, "shard_start")
        }
        _check_layout(folder, arrays, len(manifest["shards"]), manifest["n_samples"])
        return PoolIndex(
            manifest["extensions"],
            **arrays,
            n_duplicate_keys=manifest["n_duplicate_keys"],
            duplicate_example=manifest["duplicate_example"],
        )


def count_duplicate_keys(key_start: np.ndarray, key_bytes: np.ndarray) -> tuple[int, str | None]:
    """The number of samples with the key of an earlier one, and one such key.

    Keys are compared by a 64-bit multilinear hash (8 bytes per sample): for 1e8 keys the expected number of
    false matches is below 0.1.
    """
    n = len(key_start) - 1
    hashes = np.empty(n, np.uint64)
    weights = np.zeros(0, np.uint64)
    for first in range(0, n, _BLOCK):
        starts = np.asarray(key_start[first : first + _BLOCK + 1])
        blob = np.asarray(key_bytes[starts[0] : starts[-1]]).astype(np.uint64) + np.uint64(1)
        starts = starts - starts[0]
        lengths = np.diff(starts)
        if lengths.max(initial=0) > len(weights):
            # No key is empty, by the rules of grouping; reduceat below relies on that.
            generator = np.random.Generator(np.random.PCG64(0))
            weights = generator.integers(0, 2**64, int(lengths.max()), np.uint64)
        place = np.arange(len(blob)) - np.repeat(starts[:-1], lengths)
        hashes[first : first + len(lengths)] = np.add.reduceat(blob * weights[place], starts[:-1])
    order = np.sort(hashes)
    repeated = np.flatnonzero(order[1:] == order[:-1])
    if not len(repeated):
        return 0, None
    row = int(np.flatnonzero(hashes == order[repeated[0]])[0])
    key = bytes(key_bytes[key_start[row] : key_start[row + 1]])
    return len(repeated), key.decode("utf-8", "backslashreplace")


def _group(source: Source) -> ShardIndex:
    keys: list[bytes] = []
    member_start: list[int] = []
    member_extension: list[int] = []
    member_offset: list[int] = []
    member_size: list[int] = []
    spelled: dict[bytes, int] = {}  # number of each spelling seen, so that lower() runs once each
    extensions: dict[str, int] = {}
    current: bytes | None = None
    seen: set[int] = set()
    for block in read_members(source):
        for name, offset, size in zip(*block):
            dot = name.find(b".", name.rfind(b"/") + 1)
            if dot < 0:
                continue
            if dot and name[dot - 1] != 0x2F and name[:2] != b"__" and b"\n" not in name:
                key, spelling = name[:dot], name[dot + 1 :]
            else:  # dot-files, webdataset's metadata, and other odd names
                match = None if _METADATA.match(name) else _KEY_AND_EXTENSION.match(name)
                if match is None:
                    continue
                key, spelling = match.groups()
            number = spelled.get(spelling)
            if number is None:
                extension = spelling.decode("utf-8", "surrogateescape").lower()
                if extension in _RESERVED:
                    raise PoolError(
                        f"{source.name}: member {_text(name)!r} has a reserved name as its extension"
                    )
                number = spelled[spelling] = extensions.setdefault(extension, len(extensions))
            if key != current:
                keys.append(key)
                member_start.append(len(member_size))
                current = key
                seen = {number}
            elif number in seen:
                raise PoolError(
                    f"{source.name}: sample {_text(key)!r} has two members {list(extensions)[number]!r} "
                    f"({_text(name)!r} at offset {offset} is the second): rename one; "
                    "extensions start at the first dot and are compared in lower case"
                )
            else:
                seen.add(number)
            member_extension.append(number)
            member_offset.append(offset)
            member_size.append(size)
    member_start.append(len(member_size))
    key_start = np.zeros(len(keys) + 1, np.int64)
    np.cumsum([len(key) for key in keys], out=key_start[1:])
    return ShardIndex(
        list(extensions),
        key_start,
        np.frombuffer(b"".join(keys), np.uint8),
        np.array(member_start, np.int64),
        np.array(member_extension, np.int32),
        np.array(member_offset, np.int64),
        np.array(member_size, np.int64),
    )


def _layout(n_samples: int, n_members: int, n_key_bytes: int) -> dict[str, tuple[type, tuple[int]]]:
    return {
        "key_start": (np.int64, (n_samples + 1,)),
        "key_bytes": (np.uint8, (n_key_bytes,)),
        "member_start": (np.int64, (n_samples + 1,)),
        "member_extension": (np.int32, (n_members,)),
        "member_offset": (np.int64, (n_members,)),
        "member_size": (np.int64, (n_members,)),
    }


def _check_layout(folder: Path, arrays: dict[str, np.ndarray], n_shards: int, n_samples: int) -> None:
    """Check types and shapes of mapped arrays, of which only the file sizes were verified."""
    layout = _layout(n_samples, arrays["member_size"].size, arrays["key_bytes"].size)
    for name, (dtype, shape) in (layout | {"shard_start": (np.int64, (n_shards + 1,))}).items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise CacheError(
                f"{folder / name}.npy: holds {arrays[name].dtype} {arrays[name].shape}, expected "
                f"{np.dtype(dtype)} {shape}; remove {folder} to rebuild it from the shards' indexes"
            )


def _empty_arrays(indexes: Sequence[ShardIndex]) -> dict[str, np.ndarray]:
    layout = _layout(
        sum(map(len, indexes)),
        sum(len(index.member_size) for index in indexes),
        sum(len(index.key_bytes) for index in indexes),
    )
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}


@dataclass
class _Cursor:
    samples: int = 0
    members: int = 0
    key_bytes: int = 0


def _append(
    arrays: dict[str, np.ndarray], at: _Cursor, index: ShardIndex, extensions: dict[str, int]
) -> None:
    """Append a shard's index, with its extensions renumbered to those of the pool."""
    n, m, b = len(index), len(index.member_size), len(index.key_bytes)
    numbers = np.array([extensions.setdefault(name, len(extensions)) for name in index.extensions], np.int32)
    arrays["key_start"][at.samples : at.samples + n + 1] = index.key_start + at.key_bytes
    arrays["member_start"][at.samples : at.samples + n + 1] = index.member_start + at.members
    arrays["key_bytes"][at.key_bytes : at.key_bytes + b] = index.key_bytes
    if m:
        arrays["member_extension"][at.members : at.members + m] = numbers[index.member_extension]
    arrays["member_offset"][at.members : at.members + m] = index.member_offset
    arrays["member_size"][at.members : at.members + m] = index.member_size
    at.samples, at.members, at.key_bytes = at.samples + n, at.members + m, at.key_bytes + b


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
