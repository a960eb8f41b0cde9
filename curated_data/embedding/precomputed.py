"""Embeddings that exist already for a pool of shards, found by their keys or by their order."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import parse_qsl

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.checks import check_choice
from curated_data.embedding.existing import Block, keep_rows, rows_name
from curated_data.embedding.files import EmbeddingFiles
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import ConfigError, EmbedderError, PoolError
from curated_data.parallel import rank, world_size
from curated_data.pool import ShardPool
from curated_data.pool.out import writing

log = logging.getLogger(__name__)

_PREFIX = "precomputed:"
_BLOCK = 1 << 14  # rows that are read at once


@dataclass(frozen=True)
class Precomputed:
    """Embeddings in files, in place of an embedder; `precomputed:PATH` in text.

    With a column of keys, each sample gets the row of its key: their order does not matter, and samples of
    which there is no row count as failed. Without one, there is a row for every sample, in the pool's order.

    Args:
        path: see `EmbeddedPool`.
        key: the column of keys; None takes `key`, `__key__` or `image_path`. In text
            `precomputed:PATH?key=id`.
        column: that of embeddings in a parquet file; None takes the only one, or `embedding`.
        missing: "exclude" samples without a row, or "refuse" to continue.

    Examples:
        >>> from curated_data import curate
        >>> from curated_data.embedding import Precomputed
        >>> found = Precomputed("embeddings.parquet", key="uid", missing="refuse")
        >>> curate("pool-{000..099}.tar", config, embedder=found, cache_dir="cache")  # doctest: +SKIP
    """

    path: str | Path
    key: str | None = None
    column: str | None = None
    missing: str = "exclude"

    def __post_init__(self) -> None:
        check_choice(f"embedder {_PREFIX}{self.path}: missing", self.missing, ("exclude", "refuse"))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What `precomputed:PATH?key=…&column=…&missing=…` says; None for the name of another embedder.

        Raises:
            EmbedderError: no path, or an unknown option.
        """
        if not text.startswith(_PREFIX):
            return None
        path, options = with_options(text, ("key", "column", "missing"))
        return cls(path, **options)

    @cached_property
    def embeddings(self) -> EmbeddingFiles:
        """The files, opened."""
        return EmbeddingFiles(self.path, self.column)

    @property
    def dimension(self) -> int:
        """Of a row."""
        return self.embeddings.dimension

    @property
    def name(self) -> str:
        """The folder of the rows among a cache's embeddings."""
        return rows_name(self.dimension, self.embeddings.dtype)

    def places(self, pool: ShardPool) -> np.ndarray:
        """The row of each sample, (n,) int64; -1 for samples without one.

        Raises:
            ConfigError: without keys, another number of rows than samples; or samples without a row, if they
                are refused.
            PoolError: a key occurs twice, in the files or in the pool, or they have none in common.
        """
        from curated_data.parquet import check_unique, join, packed_keys, text_of_key

        keys, n = self.embeddings.keys(self.key), len(pool)
        if keys is None:
            if self.key is not None:
                raise ConfigError(f"{self.path}: has no column {self.key!r} of keys")
            if any(part.table is not None for part in self.embeddings.parts):
                # Parquet is written in any order, so that it is not taken for the pool's.
                names = _columns(self.embeddings)
                raise ConfigError(
                    f"{self.path}: has no column of keys; there are {names}: name it, as in "
                    f"'{_PREFIX}{self.path}?key=COLUMN'"
                )
            if len(self.embeddings) != n:
                raise ConfigError(
                    f"{self.path}: has {len(self.embeddings)} rows, and the pool {n} samples; without keys "
                    "there must be a row for each, in the pool's order"
                )
            return np.arange(n)
        check_unique(keys, self.path)
        index = pool.index()
        if index.n_duplicate_keys:
            raise PoolError(
                f"the pool has key {index.duplicate_example!r} more than once, so rows of {self.path} cannot "
                "be told apart by their keys; give a file without keys, in the pool's order"
            )
        places = join(packed_keys(index.key_start, index.key_bytes), keys)
        found = places >= 0
        n_found = int(found.sum())
        if not n_found:
            raise PoolError(
                f"{self.path}: has no key of the pool (one of its {len(keys)} keys is "
                f"{text_of_key(keys[0].as_py())!r}, one of the pool's {n} {pool.keys([0])[0]!r}); give the "
                "embeddings of this pool, or the column of its keys"
            )
        if n_found < n:
            first = pool.keys([int(np.flatnonzero(~found)[0])])[0]
            if self.missing == "refuse":
                raise ConfigError(
                    f"{self.path}: has no row for {n - n_found} of {n} samples, the first: key {first!r}; "
                    "embed these, or leave out missing=refuse"
                )
        log.info(
            "%s: rows for %d of %d samples by key; %d samples without one, %d rows left over",
            self.path, n_found, n, n - n_found, len(keys) - n_found,
        )  # fmt: skip
        return places

    def store(self, pool: ShardPool, root: Path) -> EmbeddingStore:
        """The rows of a pool's samples in a cache, in the pool's order. Ranks divide the shards."""
        places, ranges, layouts = self.places(pool), pool.shard_ranges(), pool.shard_fingerprints
        own = range(rank(), len(pool.urls), world_size())
        some = [places[ranges[number] : ranges[number + 1]] for number in own]
        rows_of = self._reader(np.concatenate(some) if some else np.empty(0, np.int64), root)

        def block(number: int) -> Block:
            first, last = int(ranges[number]), int(ranges[number + 1])
            missing = places[first:last] < 0
            rows = np.zeros((last - first, self.dimension), self.embeddings.dtype)
            rows[~missing] = rows_of(places[first:last][~missing])
            return Block(
                pool.urls[number],
                rows,
                lambda place: pool.keys([first + place])[0],
                (missing, f"{self.path} has no row of its key"),
                fingerprint(layout=layouts[number]),
                f"its row of {self.path} is not finite (NaN or infinite)",
            )

        return keep_rows(root, pool.urls, self.dimension, self.embeddings.dtype, block)

    def _reader(self, wanted: np.ndarray, root: Path) -> Callable[[np.ndarray], np.ndarray]:
        """A function that gives rows by their numbers; it is called with the wanted ones in sequence.

        Parquet whose order is another is decoded once, to a file without a name in the cache: it cannot be
        read at random, and may be larger than memory.
        """
        wanted = wanted[wanted >= 0]
        if self.embeddings.are_mapped or (np.diff(wanted) > 0).all():
            return self.embeddings.take
        target = np.full(len(self.embeddings), -1)
        target[wanted] = np.arange(len(wanted))
        shape = (len(wanted), self.dimension)
        with writing(root), tempfile.TemporaryFile(dir=root) as file:
            size = shape[0] * shape[1] * np.dtype(self.embeddings.dtype).itemsize
            _reserve(file.fileno(), size)
            sorted_rows = np.memmap(cast(Any, file), self.embeddings.dtype, "r+", shape=shape)
        for start, rows in self.embeddings.blocks(_BLOCK):
            to = target[start : start + len(rows)]
            sorted_rows[to[to >= 0]] = rows[to >= 0]
        return lambda rows: sorted_rows[target[rows]]


def with_options(text: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The path in `PATH?key=…&column=…`, also after `precomputed:`, and what follows the question mark. The
    name of a file that is there may have one.

    Raises:
        EmbedderError: no path, or an option that is none of these names.
    """
    given = text.removeprefix(_PREFIX)
    path, mark, rest = given.partition("?")
    if mark and Path(given).expanduser().exists():
        return given, {}
    options = dict(parse_qsl(rest, keep_blank_values=True))
    if not path or options.keys() - {*names} or (mark and rest and not options):
        raise EmbedderError(
            f"embeddings {text!r}: expected a path, and after a question mark at most {', '.join(names)}, as "
            "in 'rows.parquet?key=uid'"
        )
    return path, options


def _reserve(handle: int, size: int) -> None:
    """Take the disk space of a file that is mapped, since writing to a map without it ends the process."""
    os.truncate(handle, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def _columns(embeddings: EmbeddingFiles) -> str:
    from curated_data.parquet import column_names, open_parquet

    table = next(part.table for part in embeddings.parts if part.table is not None)
    return ", ".join(map(repr, column_names(open_parquet(table), table)))
