"""The embeddings of a pool on disk, as one array over the files of its shards."""

import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.checksums import check_once, load_npy, load_npz
from curated_data.cache.holds import Hold
from curated_data.cache.publishing import atomic_path
from curated_data.cache.removal import remove
from curated_data.embedding.shard_files import REMEDY, embedded_in, read_details
from curated_data.errors import CacheError

VERSION = 2
"""Of the extraction; increasing it makes older embeddings stale."""

_OPEN_MAPS = 256


class EmbeddingStore:
    """The embeddings of a pool, read through memory maps that are opened on first use.

    Opening the store of a pool with many shards reads one file, in which their details are summarised.

    Args:
        folder: with `<shard fingerprint>.npy` and `<shard fingerprint>.json` for each shard.
        shard_fingerprints: the names of the contents of the pool's shards, in pool order.
        dimension: length of an embedding.
        dtype: of the stored values.
        ids: (m,) ascending, the sample of each row, if the store has only some of the pool's samples; None if
            row i is sample i. Rows are always requested by their number.
        urls: of the shards, for `failures`; None shows where each was when it was embedded.
        files: the file of each shard, see `ShardFiles`; None: those that are named as the shards are.
        left_out: (n,) bool, rows that a filter drops, which need not be embedded; None: none.

    Raises:
        CacheError: a file of a shard is missing or damaged.
    """

    def __init__(
        self,
        folder: Path,
        shard_fingerprints: Sequence[str],
        dimension: int,
        dtype: str,
        *,
        ids: np.ndarray | None = None,
        urls: Sequence[str] | None = None,
        files: Sequence[str] | None = None,
        left_out: np.ndarray | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.ids = ids
        self.urls = urls
        self.shard_fingerprints = list(shard_fingerprints)
        self.files = self.shard_fingerprints if files is None else list(files)
        self.dtype = np.dtype(dtype)
        self.left_out = left_out
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # the clustering reads from several threads
        self._hold = Hold(self.folder)
        summary = store_fingerprint(self.folder, self.files, self.dtype)
        self._table = _shard_table(self.folder, summary, self.files)
        self._starts = np.concatenate([[0], np.cumsum(self._table.samples)])
        self.shape = (int(self._starts[-1]), dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        n, d = self.shape
        return f"{type(self).__name__}({n} x {d} {self.dtype}, {self.folder.name})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.as_array(dtype or self.dtype)

    @property
    def fingerprint(self) -> str:
        """Of the embedder (by the folder's name), the shards and the dtype."""
        return store_fingerprint(self.folder, self.shard_fingerprints, self.dtype)

    @property
    def embedder(self) -> str:
        """The name of the embedder of the first shard, for display only: `fingerprint` identifies it."""
        return read_details(self.folder, self.files[0]).get("embedder", "")

    @property
    def valid(self) -> np.ndarray:
        """(n,) bool: False for samples that could not be decoded or whose embedding is not finite, and for
        those that are left out.
        """
        mask = np.ones(len(self), bool) if self.left_out is None else ~self.left_out
        mask[self._table.failed] = False
        if len(self._table.absent):
            mask &= ~np.unpackbits(self._table.absent, count=len(self)).astype(bool)
        return mask

    @property
    def n_failures(self) -> int:
        """The number of failed samples, without those that are left out."""
        return len(self._failed)

    @property
    def failures(self) -> list[dict[str, Any]]:
        """`id`, `shard`, `key` and `reason` of each failed sample, in pool order."""
        return list(self.iterate_failures())

    def iterate_failures(self, first: int = 0, last: int | None = None) -> Iterator[dict[str, Any]]:
        """`failures` one by one; a shard's details are read when it is reached.

        Args:
            first, last: only of samples from the one up to, but without, the other.
        """
        failed = self._failed
        samples = failed if self.ids is None else self.ids[failed]
        start, stop = np.searchsorted(samples, (first, np.iinfo(np.int64).max if last is None else last))
        failed, samples = failed[start:stop], samples[start:stop]
        shards = self.shard_of(failed)  # ascending, as the rows are
        for number in np.unique(shards).tolist():
            here = slice(*np.searchsorted(shards, (number, number + 1)))
            places = failed[here] - self._starts[number]
            sample_at = dict(zip(places.tolist(), samples[here].tolist(), strict=True))
            for failure in read_details(self.folder, self.files[number])["failures"]:
                if failure["place"] in sample_at:
                    yield {
                        "id": sample_at[failure["place"]],
                        "shard": failure["shard"] if self.urls is None else self.urls[number],
                        **{name: failure[name] for name in ("key", "reason")},
                    }

    def failure(self, sample: int) -> dict[str, Any] | None:
        """The entry of one sample in `failures`; None if it did not fail."""
        return next(self.iterate_failures(sample, sample + 1), None)

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the shard that each row belongs to, (m,) int64."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def verify(self) -> None:
        """Compare all rows with the checksums from when they were written, once in a process.

        Rows are compared when a shard is first read, too; this does so by several threads, and before
        anything is built.

        Raises:
            CacheError: a shard's file is missing or damaged; names the first.
        """
        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(self._verify_shard, range(len(self.files))):
                pass

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice or by an array of numbers, as from an array in memory; the clustering uses it."""
        if not isinstance(which, slice):
            return self.rows(which)
        start, stop, step = which.indices(len(self))
        if step != 1:
            return self.rows(np.arange(start, stop, step))
        first, last = np.searchsorted(self._starts, (start, max(start, stop - 1)), side="right") - 1
        parts = [
            self._map(number)[max(start - base, 0) : stop - base]
            for number, base in zip(range(first, last + 1), self._starts[first:], strict=False)
            if stop > base
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (m, d) by their row numbers, in the given order.

        Raises:
            IndexError: a number out of range.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"ids need to lie in 0..{len(self) - 1}, found {ids.min()}..{ids.max()}")
        out = np.empty((len(ids), self.shape[1]), self.dtype)
        order = np.argsort(ids, kind="stable")
        shard = self.shard_of(ids[order])
        cuts = np.flatnonzero(np.diff(shard, prepend=-1, append=-1)).tolist()
        for start, stop in pairwise(cuts):
            number, here = int(shard[start]), order[start:stop]
            out[here] = self._map(number)[ids[here] - self._starts[number]]
        return out

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each shard, its first row number and its embeddings, as a memory map."""
        for number, start in enumerate(self._starts[:-1]):
            yield int(start), self._map(number)

    def as_array(self, dtype: Any = np.float32) -> np.ndarray:
        """All rows in one array in memory, (n, d)."""
        out = np.empty(self.shape, dtype)
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out

    @property
    def _failed(self) -> np.ndarray:
        """The failed rows that are not left out, ascending."""
        failed = self._table.failed
        return failed if self.left_out is None else failed[~self.left_out[failed]]

    def _verify_shard(self, number: int) -> None:
        if self._table.size[number] < 0:  # an earlier version did not record it
            return
        path = self.folder / f"{self.files[number]}.npy"
        checksum = {"bytes": int(self._table.size[number]), "crc32": int(self._table.crc32[number])}
        check_once(path, checksum, REMEDY)

    def _map(self, number: int) -> np.ndarray:
        """A shard's rows. Only a few maps stay open, the last ones used, since each holds a file handle."""
        with self._lock:
            if number in self._maps:
                self._maps.move_to_end(number)
                return self._maps[number]
            path = self.folder / f"{self.files[number]}.npy"
            self._verify_shard(number)
            array = load_npy(path, REMEDY, map_mode="r")
            expected = (int(self._table.samples[number]), self.shape[1])
            if array.shape != expected or array.dtype != self.dtype:
                raise CacheError(
                    f"{path}: holds {array.shape} {array.dtype}, expected {expected} {self.dtype}; {REMEDY}"
                )
            self._maps[number] = array
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
            return array

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._maps, self._lock = OrderedDict(), threading.Lock()


def store_fingerprint(folder: Path, shard_fingerprints: Sequence[str], dtype: Any) -> str:
    """The name of the embeddings of some shards, by their folder, the shards and the dtype."""
    return fingerprint(
        embedder=folder.name, shards=list(shard_fingerprints), dtype=np.dtype(dtype).str, version=VERSION
    )


def forget_table(folder: Path, store_fingerprint: str) -> None:
    """Remove the summary of a store, because some of its shards are about to be written again."""
    remove(_table_path(folder, store_fingerprint), below=folder)


class _Table(NamedTuple):
    """A summary of the details of all shards. It is derived from them, so a damaged one is ignored."""

    samples: np.ndarray  # (n_shards,) int64
    size: np.ndarray  # (n_shards,) int64, bytes of the file; -1 if it was not recorded
    crc32: np.ndarray  # (n_shards,) int64, of the file
    failed: np.ndarray  # int64, the failed rows, ascending
    absent: np.ndarray  # uint8, bits of the rows that were not embedded; empty if all were


def _table_path(folder: Path, store_fingerprint: str) -> Path:
    return folder / ".pools" / f"{store_fingerprint}.npz"


def _shard_table(folder: Path, store_fingerprint: str, shards: Sequence[str]) -> _Table:
    path = _table_path(folder, store_fingerprint)
    with contextlib.suppress(CacheError):  # missing or damaged
        table = _Table(**load_npz(path, _Table._fields, REMEDY))
        if _is_of(table, len(shards)):
            return table
    details = [read_details(folder, name) for name in shards]
    samples = np.array([item["samples"] for item in details], np.int64)
    starts = np.cumsum(samples) - samples
    checksums = [item.get("file", {"bytes": -1, "crc32": 0}) for item in details]
    table = _Table(
        samples=samples,
        size=np.array([checksum["bytes"] for checksum in checksums], np.int64),
        crc32=np.array([checksum["crc32"] for checksum in checksums], np.int64),
        failed=np.array(
            [
                start + place
                for start, item in zip(starts, details, strict=True)
                for place in sorted(failure["place"] for failure in item["failures"])
            ],
            np.int64,
        ),
        absent=np.empty(0, np.uint8)
        if all("embedded" not in item for item in details)
        else np.packbits(np.concatenate([~embedded_in(item) for item in details])),
    )
    # If it cannot be written, the details are read again next time.
    content = io.BytesIO()
    np.savez(content, **table._asdict())
    with contextlib.suppress(CacheError), atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return table


def _is_of(table: _Table, n_shards: int) -> bool:
    """Whether a table can be that of so many shards."""
    per_shard = (table.samples, table.size, table.crc32)
    n = int(table.samples.sum()) if table.samples.dtype == np.int64 else -1
    return (
        all(array.dtype == np.int64 and array.ndim == 1 for array in (*per_shard, table.failed))
        and table.absent.dtype == np.uint8
        and table.absent.shape in ((0,), (-(-n // 8),))
        and all(len(array) == n_shards for array in per_shard)
        and int(table.samples.min(initial=0)) >= 0
        and int(table.failed.min(initial=0)) >= 0
        and int(table.failed.max(initial=-1)) < int(table.samples.sum())
        and bool((np.diff(table.failed) > 0).all())
    )
