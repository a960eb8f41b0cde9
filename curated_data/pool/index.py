"""The index of a pool: the key of every sample, and the extension, offset and size of each of its members.

Members are grouped into samples as in webdataset: neighbours whose names agree up to the first dot of the
base name. Links within an archive count as the files that they lead to, and macOS's own files are left out.
All arrays are flat (row i's part of an array is `array[start[i] : start[i + 1]]`), so that 1e8
samples are a handful of memory maps instead of a Python object each.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.errors import PoolError
from curated_data.pool.grouping import group_members, text_of
from curated_data.pool.notes import Notes, add_note, joined_notes
from curated_data.pool.tar import Source, local_source

CODE_VERSION = 2  # part of every shard's fingerprint; increase it when arrays or grouping change
ARRAYS = ("key_start", "key_bytes", "member_start", "member_extension", "member_offset", "member_size")
_BLOCK = 65_536  # samples whose keys are looked at at once


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
class Members:
    """Members of a batch of samples: the row of their sample, the number of their extension, their place."""

    owner: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray


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

    def members(self, ids: np.ndarray, extensions: Sequence[str] | None) -> Members:
        """The members of samples, or only those with certain extensions, in lower case.

        Raises:
            PoolError: no sample of the pool has one of these.
        """
        start = self.member_start[ids]
        count = self.member_start[ids + 1] - start
        owner = np.repeat(np.arange(len(ids)), count)
        rows = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + start[owner]
        extension = self.member_extension[rows]
        if extensions is not None:
            is_wanted = np.array([name in extensions for name in self.extensions])
            if not is_wanted.any():
                raise PoolError(
                    f"no sample of the pool has a member {' or '.join(map(repr, extensions))}; "
                    f"there are {', '.join(map(repr, self.extensions[:20]))}"
                )
            keep = is_wanted[extension]
            owner, rows, extension = owner[keep], rows[keep], extension[keep]
        return Members(owner, extension, self.member_offset[rows], self.member_size[rows])


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


def concatenate(indexes: Sequence[ShardIndex], urls: Sequence[str] | None = None) -> PoolIndex:
    """A pool's index in memory, from the indexes of its shards in order.

    Args:
        urls: of the shards, for the notes; None numbers them.
    """
    urls = [f"shard {number}" for number in range(len(indexes))] if urls is None else urls
    sizes = ((len(index), len(index.member_size), len(index.key_bytes)) for index in indexes)
    n_samples, n_members, n_key_bytes = np.sum([(0, 0, 0), *sizes], axis=0).tolist()
    shapes = layout(n_samples, n_members, n_key_bytes)
    arrays: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
    return PoolIndex(**arrays, **join(arrays, zip(urls, indexes, strict=True)))


def join(arrays: Mapping[str, np.ndarray], shards: Iterable[tuple[str, ShardIndex]]) -> dict[str, Any]:
    """Fill the arrays of a pool's index from those of its shards, and find the other fields of `PoolIndex`.

    Args:
        arrays: as `layout` says.
        shards: in order: where each is, for the notes, and its index. One is in memory at a time.
    """
    extensions: dict[str, int] = {}
    noted, starts = [], [0]
    members = key_bytes = 0
    for url, index in shards:
        n, m, b = len(index), len(index.member_size), len(index.key_bytes)
        numbers = np.array([extensions.setdefault(e, len(extensions)) for e in index.extensions], np.int32)
        arrays["key_start"][starts[-1] : starts[-1] + n + 1] = index.key_start + key_bytes
        arrays["member_start"][starts[-1] : starts[-1] + n + 1] = index.member_start + members
        arrays["key_bytes"][key_bytes : key_bytes + b] = index.key_bytes
        if m:
            arrays["member_extension"][members : members + m] = numbers[index.member_extension]
        arrays["member_offset"][members : members + m] = index.member_offset
        arrays["member_size"][members : members + m] = index.member_size
        members, key_bytes = members + m, key_bytes + b
        starts.append(starts[-1] + n)
        noted.append((url, index.notes))
    n_duplicates, example = count_duplicate_keys(arrays["key_start"], arrays["key_bytes"])
    notes = joined_notes(noted)
    if n_duplicates:
        _note_scattered(arrays, list(extensions), notes)
    return {
        "extensions": list(extensions),
        "notes": notes,
        "shard_start": np.array(starts, np.int64),
        "n_duplicate_keys": n_duplicates,
        "duplicate_example": example,
    }


def layout(n_samples: int, n_members: int, n_key_bytes: int) -> dict[str, tuple[type, tuple[int]]]:
    """The type and shape of each array of an index."""
    return {
        "key_start": (np.int64, (n_samples + 1,)),
        "key_bytes": (np.uint8, (n_key_bytes,)),
        "member_start": (np.int64, (n_samples + 1,)),
        "member_extension": (np.int32, (n_members,)),
        "member_offset": (np.int64, (n_members,)),
        "member_size": (np.int64, (n_members,)),
    }


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
    # By sorting: by a table, NumPy 2.0.0 fails on values of 64 bits.
    rows = np.flatnonzero(np.isin(hashes, order[1:][order[1:] == order[:-1]], kind="sort"))
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
