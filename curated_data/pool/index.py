"""The index of a pool: the key of every sample, and the extension, offset and size of each of its members.

Members are grouped into samples as in webdataset: neighbours whose names agree up to the first dot of the
base name. Links within an archive count as the files that they lead to, and macOS's own files are left out.
All arrays are flat (row i's part of an array is `array[start[i] : start[i + 1]]`), so that 1e8
samples are a handful of memory maps instead of a Python object each.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import (
    MANIFEST,
    atomic_path,
    fingerprint,
    new_array,
    read_array,
    read_arrays,
    read_manifest,
    verify_once,
    write_manifest,
)
from curated_data.errors import CacheError, PoolError
from curated_data.layout import INDEX, POOL
from curated_data.pool.grouping import group_members, text_of
from curated_data.pool.grouping import split_name as split_name
from curated_data.pool.notes import Notes, add_note, joined_notes, notes_from_json
from curated_data.pool.tar import Source, local_source
from curated_data.remedies import Remedy
from curated_data.removal import shown
from curated_data.seals import reading

CODE_VERSION = 2  # part of every shard's fingerprint; increase it when arrays or grouping change
ARRAYS = ("key_start", "key_bytes", "member_start", "member_extension", "member_offset", "member_size")
_BLOCK = 65_536  # samples whose keys are looked at at once
_CHECKED = 1 << 22  # values of an array that are checked at once
_FARTHEST = 1 << 62  # bytes into a shard


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
        notes: what is odd about the archive, with counts, see `report_notes`.
    """

    extensions: list[str]
    key_start: np.ndarray
    key_bytes: np.ndarray
    member_start: np.ndarray
    member_extension: np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    notes: Notes = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key_start) - 1

    @cached_property
    def layout(self) -> str:
        """The name of this index by what it holds: the keys, extensions, offsets and sizes of all members.

        Wherever the shard lies and whenever it was written; of the members' bytes it knows nothing.
        """
        arrays = {name: getattr(self, name) for name in ("extensions", *ARRAYS)}
        return fingerprint(stage="layout", code=CODE_VERSION, **arrays)

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

    shard_start: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    n_duplicate_keys: int = 0
    duplicate_example: str | None = None

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """The shard of each id, (n,) int64."""
        return np.searchsorted(self.shard_start, ids, side="right") - 1


def index_shard(shard: str | Path | Source) -> ShardIndex:
    """Index one archive by its headers, without reading the data of its members.

    What is odd about it, such as data after its end, is counted in the index's `notes`.

    Args:
        shard: a local path, or a `Source` for any other storage.

    Raises:
        PoolError: the file is missing, not a tar, compressed, damaged or truncated; or a sample has two
            members with the same extension, which webdataset rejects too.
    """
    if isinstance(shard, Source):
        return _of_source(shard)
    try:
        handle = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise PoolError(f"{shard}: cannot be opened ({error.strerror})") from error
    try:
        return _of_source(local_source(shard, handle))
    finally:
        os.close(handle)


def save_shard_index(folder: Path, index: ShardIndex, *, url: str) -> None:
    """Publish a shard's index as an artifact folder."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        arrays = io.BytesIO()  # in memory first: on a full disk an open archive raises again when closed
        np.savez(arrays, **{name: getattr(index, name) for name in ARRAYS})
        (temporary / "arrays.npz").write_bytes(arrays.getbuffer())
        write_manifest(
            temporary,
            INDEX,
            {
                "url": url,
                "extensions": index.extensions,
                "n_samples": len(index),
                "n_members": len(index.member_size),
                "n_key_bytes": len(index.key_bytes),
                "n_bytes": int(index.member_size.sum()),
                "notes": index.notes,
            },
        )


def load_shard_index(folder: Path) -> ShardIndex:
    """Read what `save_shard_index` wrote.

    Raises:
        CacheError: missing, damaged, or written by another version.
    """
    return _read_shard_index(folder, _read_shard_manifest(folder))


def _read_shard_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard's index, whose fields are of the types that `save_shard_index` writes.

    Raises:
        CacheError: it is missing, damaged, or holds something else.
    """
    manifest = read_manifest(folder, INDEX)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        # Room for the pool's index is made by these: the arrays' own file says how many there can be.
        size = (folder / "arrays.npz").stat().st_size
        most = {"n_samples": size // 8, "n_members": size // 8, "n_key_bytes": size, "n_bytes": _FARTHEST}
        for name, limit in most.items():
            if type(manifest[name]) is not int or not 0 <= manifest[name] <= limit:
                raise ValueError(f"{name} is {shown(manifest[name])}")
        if not isinstance(manifest["url"], str):
            raise ValueError(f"url is {shown(manifest['url'])}")
        _check_extensions(manifest["extensions"])
        notes_from_json(manifest["notes"])
    return manifest


def _check_extensions(names: object) -> None:
    """Check that names of extensions are a list of different texts."""
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != len(names)
    ):
        raise ValueError(f"extensions are {shown(names)}")


def _read_shard_index(folder: Path, manifest: Mapping[str, Any]) -> ShardIndex:
    path = folder / "arrays.npz"
    arrays = read_arrays(folder, "arrays", ARRAYS, manifest)
    with reading(path, Remedy(path)):
        index = ShardIndex(manifest["extensions"], **arrays, notes=notes_from_json(manifest["notes"]))
        _check(index, *(manifest[name] for name in ("n_samples", "n_members", "n_key_bytes")))
    return index


def concatenate(indexes: Sequence[ShardIndex], urls: Sequence[str] | None = None) -> PoolIndex:
    """A pool's index in memory, from the indexes of its shards in order.

    Args:
        urls: of the shards, for the notes; None numbers them.
    """
    urls = [f"shard {number}" for number in range(len(indexes))] if urls is None else urls
    arrays = _empty_arrays(indexes)
    extensions: dict[str, int] = {}
    shard_start = np.zeros(len(indexes) + 1, np.int64)
    at = _Cursor()
    for number, index in enumerate(indexes):
        _append(arrays, at, index, extensions)
        shard_start[number + 1] = at.samples
    n_duplicates, example = count_duplicate_keys(arrays["key_start"], arrays["key_bytes"])
    notes = joined_notes((urls[number], index.notes) for number, index in enumerate(indexes))
    if n_duplicates:
        _note_scattered(arrays, list(extensions), notes)
    return PoolIndex(
        list(extensions),
        **arrays,
        notes=notes,
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
    manifests = [_read_shard_manifest(path) for path in shard_folders]
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
    notes = joined_notes((manifest["url"], notes_from_json(manifest["notes"])) for manifest in manifests)
    if n_duplicates:
        _note_scattered(arrays, list(extensions), notes)
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    write_manifest(
        folder,
        POOL,
        {
            "extensions": list(extensions),
            "shards": [manifest["url"] for manifest in manifests],
            "n_samples": n_samples,
            "n_bytes": sum(manifest["n_bytes"] for manifest in manifests),
            "n_duplicate_keys": n_duplicates,
            "duplicate_example": example,
            "notes": notes,
        },
    )


def load_pool_index(folder: Path, *, checked: bool = True) -> PoolIndex:
    """Open what `write_pool_index` wrote, as memory maps.

    Args:
        checked: verify the checksums and the places of all samples; a process's workers need not.

    Raises:
        CacheError: missing, damaged, or written by another version.
    """
    manifest = read_manifest(folder, POOL)
    if checked:
        verify_once(folder, manifest)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        _check_extensions(manifest["extensions"])
        arrays = {
            # A plain view of the map: indexing an np.memmap costs microseconds per call.
            name: np.asarray(read_array(folder, name, manifest, map_mode="r"))
            for name in (*ARRAYS, "shard_start")
        }
        _check_layout(folder, arrays, len(manifest["shards"]), manifest["n_samples"])
        index = PoolIndex(
            manifest["extensions"],
            **arrays,
            notes=notes_from_json(manifest["notes"]),
            n_duplicate_keys=manifest["n_duplicate_keys"],
            duplicate_example=manifest["duplicate_example"],
        )
        if checked:
            _check(index, len(index), len(index.member_size), len(index.key_bytes))
            _check_starts("shard_start", index.shard_start, len(index))
        return index


def count_duplicate_keys(key_start: np.ndarray, key_bytes: np.ndarray) -> tuple[int, str | None]:
    """The number of samples with the key of an earlier one, and one such key.

    Keys are compared by a 64-bit multilinear hash (8 bytes per sample): for 1e8 keys the expected number of
    false matches is below 0.1.
    """
    hashes = _key_hashes(key_start, key_bytes)
    order = np.sort(hashes)
    repeated = np.flatnonzero(order[1:] == order[:-1])
    if not len(repeated):
        return 0, None
    row = int(np.flatnonzero(hashes == order[repeated[0]])[0])
    key = bytes(key_bytes[key_start[row] : key_start[row + 1]])
    return len(repeated), key.decode("utf-8", "backslashreplace")


def _key_hashes(key_start: np.ndarray, key_bytes: np.ndarray) -> np.ndarray:
    """(n,) uint64, of the keys."""
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
    return hashes


def _note_scattered(arrays: Mapping[str, np.ndarray], extensions: Sequence[str], notes: Notes) -> None:
    """Note samples that share their key, but no extension, with one of another shard.

    Called where keys repeat. Those within a shard are noted already, see `_note_parts_apart`.
    """
    hashes = _key_hashes(arrays["key_start"], arrays["key_bytes"])
    order = np.sort(hashes)
    rows = np.flatnonzero(np.isin(hashes, order[1:][order[1:] == order[:-1]]))
    start = arrays["member_start"][rows]
    length = arrays["member_start"][rows + 1] - start
    member = (
        np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
    )
    _, group = np.unique(hashes[rows], return_inverse=True)
    pairs = np.repeat(group, length) * len(extensions) + arrays["member_extension"][member]
    values, counts = np.unique(pairs, return_counts=True)
    is_apart = np.ones(group.max() + 1, bool)
    is_apart[values[counts > 1] // len(extensions)] = False
    number = int((np.bincount(group) - 1)[is_apart].sum())
    number -= notes["apart"].number if "apart" in notes else 0
    if number > 0:
        row = rows[np.flatnonzero(is_apart[group])[0]]
        key = bytes(arrays["key_bytes"][arrays["key_start"][row] : arrays["key_start"][row + 1]])
        add_note(notes, "scattered", number, f"key {text_of(key)!r}")


def _of_source(source: Source) -> ShardIndex:
    grouped = group_members(source)
    key_start = np.zeros(len(grouped.keys) + 1, np.int64)
    np.cumsum([len(key) for key in grouped.keys], out=key_start[1:])
    return ShardIndex(
        grouped.extensions,
        key_start,
        np.frombuffer(b"".join(grouped.keys), np.uint8),
        np.array(grouped.member_start, np.int64),
        np.array(grouped.member_extension, np.int32),
        np.array(grouped.member_offset, np.int64),
        np.array(grouped.member_size, np.int64),
        grouped.notes,
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


def _check(index: ShardIndex, n_samples: int, n_members: int, n_key_bytes: int) -> None:
    """Check that the arrays of an index fit each other, so that none leads outside another.

    Raises:
        ValueError: one does not; names it.
    """
    for name, (dtype, shape) in _layout(n_samples, n_members, n_key_bytes).items():
        array = getattr(index, name)
        if array.dtype != dtype or array.shape != shape:
            expected = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"{name} holds {array.dtype} {array.shape}, expected {expected}")
    _check_starts("key_start", index.key_start, n_key_bytes)
    _check_starts("member_start", index.member_start, n_members)
    for name, most in (
        ("member_extension", len(index.extensions) - 1),
        ("member_offset", _FARTHEST),
        ("member_size", _FARTHEST),
    ):
        array = getattr(index, name)
        for first in range(0, n_members, _CHECKED):
            part = array[first : first + _CHECKED]
            if part.min() < 0 or part.max() > most:
                raise ValueError(f"{name} holds {part.min()} to {part.max()}, expected 0 to {most}")


def _check_starts(name: str, starts: np.ndarray, stop: int) -> None:
    """Check the starts of rows that follow each other up to `stop`."""
    for first in range(0, len(starts), _CHECKED):
        part = starts[first : first + _CHECKED + 1]
        if (part[1:] < part[:-1]).any():
            raise ValueError(f"{name} is not in ascending order")
    if starts[0] != 0 or starts[-1] != stop:
        raise ValueError(f"{name} runs from {starts[0]} to {starts[-1]}, expected 0 to {stop}")


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
