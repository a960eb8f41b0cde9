"""Embeddings that exist already, as a pool without shards: a sample is a row."""

import hashlib
import logging
import mmap
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.layout import EMBEDDINGS
from curated_data.cache.locks import locked
from curated_data.embedding.files import EmbeddingFiles, as_array
from curated_data.embedding.files import Source as Source
from curated_data.embedding.shard_files import is_embedded, write_shard
from curated_data.embedding.store import EmbeddingStore
from curated_data.parallel import all_gather, rank, world_size
from curated_data.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

VERSION = 1
BLOCK = 1 << 16
"""Rows that are kept in one file of the cache, and recognised as one when a pool has grown."""


class EmbeddedPool:
    """Rows in place of a pool of shards; ids are their numbers.

    A file is mapped, or read in blocks, not loaded into memory. A curation keeps a copy in its cache, in
    blocks that are named by what they hold: equal blocks are written once, and a pool that has gained a
    source shares those of the others.

    Rows that are not finite count as failed, and are never selected.

    Args:
        source: (n, d) floating-point rows: an array, a tensor, a memory map, the path of a `.npy` or parquet
            file, a folder of such parts, which are taken in the order of their names (numbers by value), or
            one that clip-retrieval wrote; or a list of these, with rows of the same length.
        column: the column of a parquet file that holds the embeddings; None takes the only one with lists of
            floating-point numbers, or `embedding`.
        key: the column of keys; None takes `key`, `__key__` or `image_path`. Without one, keys are the
            numbers of rows.
        columns: parquet files, or folders of them, with more about the rows, see `columns`: with the keys of
            the rows in any order, or with a row for each.

    Raises:
        PoolError: a file is missing or damaged, a folder has no embeddings, or there are no rows.
        ConfigError: rows that are not a matrix of floating-point numbers, or differ in length, or a column
            that a file lacks.

    Examples:
        >>> import numpy as np
        >>> from curated_data import EmbeddedPool
        >>> pool = EmbeddedPool(np.random.default_rng(0).normal(size=(1000, 8)))
        >>> len(pool), pool.dimension
        (1000, 8)
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        *,
        column: str | None = None,
        key: str | None = None,
        columns: str | Path | Sequence[str | Path] | None = None,
    ) -> None:
        self.embeddings = EmbeddingFiles(source, column)
        self.dimension, self.dtype = self.embeddings.dimension, self.embeddings.dtype
        self._key = key
        self._tables: list[Path] = []
        if columns is not None:
            from curated_data.pool.columns import checked_tables

            self._tables = checked_tables(columns)
        self._blocks = [
            (part.name, part.rows, start, min(start + BLOCK, len(part.rows)))
            for part in self.embeddings.parts
            for start in range(0, len(part.rows), BLOCK)
        ]

    def __len__(self) -> int:
        return len(self.embeddings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {self.dimension} {self.dtype})"

    @property
    def urls(self) -> list[str]:
        """Where each block of rows comes from."""
        return [f"{name}[{start}:{stop}]" for name, _, start, stop in self._blocks]

    def shard_ranges(self) -> np.ndarray:
        """(blocks + 1,) int64, the first row of each block, then the number of rows."""
        return np.cumsum([0, *(stop - start for *_, start, stop in self._blocks)])

    def shard_of(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The block of each row, (n,) int64 into `urls`."""
        return np.searchsorted(self.shard_ranges(), ids, side="right") - 1

    @cached_property
    def key_array(self) -> "pa.Array | None":
        """The keys of all rows as bytes; None if they have none."""
        return self.embeddings.keys(self._key)

    def keys(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of rows; their numbers if they have none."""
        if self.key_array is None:
            return [str(row) for row in np.asarray(ids).tolist()]
        from curated_data.parquet import text_of_key

        return [text_of_key(key) for key in self.key_array.take(np.asarray(ids, np.int64)).to_pylist()]

    def columns(self, names: Sequence[str]) -> "pa.Table":
        """Columns of the parquet files given as `columns`, or of those with the embeddings, or beside them,
        with n rows in the order of ids.

        Raises:
            ConfigError: an unknown column; suggests the nearest name.
            PoolError: a file cannot be read, or holds a key twice.
        """
        from curated_data.pool.columns import columns_of_rows, columns_of_tables

        if self._tables:
            return columns_of_rows(len(self), self.key_array, names, self._tables)
        return columns_of_tables(len(self), names, [part.table for part in self.embeddings.parts])

    @property
    def name(self) -> str:
        """The folder of the rows among a cache's embeddings."""
        return rows_name(self.dimension, self.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """Of the form of the pool; what the rows are counts in the names of what is built from them."""
        return fingerprint(stage="rows", ranges=self.shard_ranges(), dimension=self.dimension)

    def store(self, root: Path) -> EmbeddingStore:
        """The rows in a cache. In a process group ranks divide the blocks among themselves."""

        def block(number: int) -> Block:
            name, matrix, start, stop = self._blocks[number]
            rows = as_array(matrix, start, stop, self.dtype)
            _give_back(matrix)
            return Block(name, rows, lambda place: str(start + place))

        return keep_rows(root, self.urls, self.dimension, self.dtype, block)


class Block(NamedTuple):
    """Rows that the cache keeps in one file.

    Attributes:
        source: where they come from, for messages.
        rows: (m, d), owned by this block.
        key: the name of a row by its place in the block.
        missing: (m,) bool, rows that do not exist, and why; None if there are none.
        identity: what counts in the name of the file beside the rows.
        not_finite: what is said of a row that is not finite.
    """

    source: str
    rows: np.ndarray
    key: Callable[[int], str]
    missing: tuple[np.ndarray, str] | None = None
    identity: str | None = None
    not_finite: str = "is not finite (NaN or infinite)"


def rows_name(dimension: int, dtype: str) -> str:
    """The folder of rows that were given, among a cache's embeddings: whatever they are, if of this form."""
    return fingerprint(stage="rows", dimension=dimension, dtype=dtype, version=VERSION)


def keep_rows(
    root: Path, urls: Sequence[str], dimension: int, dtype: str, block: Callable[[int], Block]
) -> EmbeddingStore:
    """Keep blocks of rows in a cache, each named by what it holds. Ranks divide them among themselves.

    Args:
        root: an opened cache.
        urls: where each block comes from.
        block: gives a block by its number.
    """
    folder = root / EMBEDDINGS / rows_name(dimension, dtype)
    own = range(rank(), len(urls), world_size())
    names = np.zeros(len(own), "S20")
    with progress("embeddings", len(own), "blocks") as advance:
        for place, number in enumerate(own):
            names[place] = _kept(folder, block(number))
            advance()
    every: list[str] = [""] * len(urls)
    for of_rank, part in enumerate(all_gather(names.view(np.uint8).reshape(len(own), 20))):
        every[of_rank :: world_size()] = [row.tobytes().decode() for row in part]
    store = EmbeddingStore(folder, every, dimension, dtype, urls=urls)
    if store.n_failures:
        first = next(store.iterate_failures())
        log.warning(
            "%d of %d rows are missing or not finite and will not be selected, the first: %s, key %s: %s",
            store.n_failures, len(store), first["shard"], first["key"], first["reason"],
        )  # fmt: skip
    return store


def _kept(folder: Path, block: Block) -> str:
    """Write a block to the cache, unless it is there; returns its name."""
    rows = block.rows
    reasons: dict[int, str] = dict.fromkeys(
        np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist(), block.not_finite
    )
    more: dict[str, Any] = {}
    if block.missing is not None and block.missing[0].any():
        reasons |= dict.fromkeys(np.flatnonzero(block.missing[0]).tolist(), block.missing[1])
        more["missing"] = block.missing[0]
    if block.identity is not None:
        more["identity"] = block.identity
    name = fingerprint(
        stage="rows", version=VERSION, shape=rows.shape, digest=hashlib.sha256(rows.data).digest(), **more
    )
    if is_embedded(folder, name):
        return name
    rows[list(reasons)] = 0
    failures = [
        {"place": place, "shard": block.source, "key": block.key(place), "reason": reasons[place]}
        for place in sorted(reasons)
    ]
    with locked(folder / name):
        if not is_embedded(folder, name):
            write_shard(folder, name, rows, failures, {"url": block.source, "embedder": "given"})
    return name


def _give_back(matrix: Any) -> None:
    """Let go of the pages of a mapped file, which count as this process's memory; it is copied by then."""
    is_mapped = isinstance(matrix, np.memmap) and isinstance(matrix.base, mmap.mmap)
    if is_mapped and matrix.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):  # of others it may drop changes
        matrix.base.madvise(mmap.MADV_DONTNEED)
