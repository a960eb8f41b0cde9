"""Embeddings that exist already, as a pool without shards: a sample is a row."""

import hashlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data.cache import fingerprint
from curated_data.embedding.store import EmbeddingStore, is_embedded, write_shard
from curated_data.errors import ConfigError, PoolError
from curated_data.layout import EMBEDDINGS
from curated_data.locks import locked
from curated_data.matrix import Matrix
from curated_data.parallel import all_gather, rank, world_size
from curated_data.paths import local_path
from curated_data.progress import progress
from curated_data.seals import load_npy

log = logging.getLogger(__name__)

VERSION = 1
BLOCK = 1 << 16
"""Rows that are kept in one file of the cache, and recognised as one when a pool has grown."""

_FLOATS = ("float16", "float32", "float64")
Source = str | Path | Matrix


class EmbeddedPool:
    """Rows in place of a pool of shards; ids are their numbers.

    A file is mapped, not read into memory. A curation keeps a copy in its cache, in blocks that are named by
    what they hold: equal blocks are written once, and a pool that has gained a source shares those of the
    others. Rows that are not finite count as failed, and are never selected.

    Args:
        source: (n, d) floating-point rows: an array, a tensor, a memory map, the path of a `.npy` file, a
            folder of `.npy` parts, which are taken in the order of their names; or a list of these, with rows
            of the same length.

    Raises:
        PoolError: a file is missing or damaged, a folder has no `.npy` files, or there are no rows.
        ConfigError: rows that are not a matrix of floating-point numbers, or differ in length.

    Example:
        >>> import numpy as np
        >>> from curated_data import EmbeddedPool
        >>> pool = EmbeddedPool(np.random.default_rng(0).normal(size=(1000, 8)))
        >>> len(pool), pool.dimension
        (1000, 8)
    """

    def __init__(self, source: Source | Sequence[Source]) -> None:
        given: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
        parts = [part for number, one in enumerate(given) for part in _opened(one, number)]
        if not parts:
            raise PoolError("embeddings: an empty list; give an array, a .npy file or a folder of them")
        self.dimension = int(parts[0][1].shape[1])
        for name, rows in parts:
            if rows.shape[1] != self.dimension:
                raise ConfigError(
                    f"{name}: its rows have length {rows.shape[1]}, those of {parts[0][0]} {self.dimension}; "
                    "give embeddings of one network"
                )
        self._blocks = [
            (name, rows, start, min(start + BLOCK, len(rows)))
            for name, rows in parts
            for start in range(0, len(rows), BLOCK)
        ]
        if not self._blocks:
            raise PoolError(f"{parts[0][0]}: has no rows")
        self.dtype = "float16" if all(_dtype(rows) == "float16" for _, rows in parts) else "float32"

    def __len__(self) -> int:
        return int(self.shard_ranges()[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {self.dimension} {self.dtype})"

    @property
    def urls(self) -> list[str]:
        """Where each block of rows comes from."""
        return [f"{name}[{start}:{stop}]" for name, _, start, stop in self._blocks]

    def shard_ranges(self) -> np.ndarray:
        """(blocks + 1,) int64, the first row of each block, then the number of rows."""
        return np.cumsum([0, *(stop - start for *_, start, stop in self._blocks)])

    @property
    def name(self) -> str:
        """The folder of the rows among a cache's embeddings."""
        return fingerprint(stage="rows", dimension=self.dimension, dtype=self.dtype, version=VERSION)

    @cached_property
    def fingerprint(self) -> str:
        """Of the form of the pool; what the rows are counts in the names of what is built from them."""
        return fingerprint(stage="rows", ranges=self.shard_ranges(), dimension=self.dimension)

    def store(self, root: Path) -> EmbeddingStore:
        """The rows in a cache. In a process group ranks divide the blocks among themselves."""
        folder = root / EMBEDDINGS / self.name
        own = range(rank(), len(self._blocks), world_size())
        names = np.zeros(len(own), "S20")
        with progress("embeddings", len(own), "blocks") as advance:
            for place, number in enumerate(own):
                names[place] = self._kept(folder, number)
                _give_back(self._blocks[number][1])
                advance()
        every: list[str] = [""] * len(self._blocks)
        for of_rank, part in enumerate(all_gather(names.view(np.uint8).reshape(len(own), 20))):
            every[of_rank :: world_size()] = [row.tobytes().decode() for row in part]
        store = EmbeddingStore(folder, every, self.dimension, self.dtype, urls=self.urls)
        if store.n_failures:
            first = next(store.iterate_failures())
            log.warning(
                "%d of %d rows are not finite and will not be selected, the first: %s, row %s",
                store.n_failures, len(store), first["shard"], first["key"],
            )  # fmt: skip
        return store

    def _kept(self, folder: Path, number: int) -> str:
        """Write a block to the cache, unless it is there; returns its name."""
        source, matrix, start, stop = self._blocks[number]
        rows = _as_array(matrix, start, stop, self.dtype)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        name = fingerprint(
            stage="rows", version=VERSION, shape=rows.shape, digest=hashlib.sha256(rows.data).digest()
        )
        if is_embedded(folder, name):
            return name
        rows[bad] = 0
        failures = [
            {"place": int(place), "shard": source, "key": str(start + place), "reason": "is not finite"}
            for place in bad
        ]
        with locked(folder / name):
            if not is_embedded(folder, name):
                write_shard(folder, name, rows, failures, {"url": source, "embedder": "given"})
        return name


def _give_back(matrix: Any) -> None:
    """Let go of the pages of a mapped file, which count as this process's memory; it is copied by then."""
    is_mapped = isinstance(matrix, np.memmap) and isinstance(matrix.base, mmap.mmap)
    if is_mapped and matrix.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):  # of others it may drop changes
        matrix.base.madvise(mmap.MADV_DONTNEED)


def _opened(source: Source, number: int) -> Iterator[tuple[str, Matrix]]:
    """The matrices of one source, by name."""
    if isinstance(source, str | Path):
        path = local_path(source, "embeddings")
        files = [path]
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            if not files:
                raise PoolError(f"{path}: no .npy file in this folder; give the folder of the parts")
        for file in files:
            if not file.is_file():
                raise PoolError(f"{file}: no such file; give a .npy file, or a folder of them")
            try:
                rows = load_npy(file, "write it again by numpy.save", map_mode="r")
            except ValueError as error:
                raise PoolError(f"embeddings: {error}") from error
            yield str(file), _checked(str(file), rows)
        return
    yield f"embeddings {number}", _checked(f"embeddings {number}", source)


def _checked(name: str, rows: Any) -> Matrix:
    if not isinstance(rows, torch.Tensor):
        rows = np.asanyarray(rows)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ConfigError(f"{name}: expected a matrix (n, d), found shape {tuple(rows.shape)}")
    if _dtype(rows) not in (*_FLOATS, "bfloat16"):
        raise ConfigError(f"{name}: expected floating-point rows, found {_dtype(rows)}")
    return rows


def _dtype(rows: Any) -> str:
    return str(rows.dtype).removeprefix("torch.") if isinstance(rows, torch.Tensor) else rows.dtype.name


def _as_array(matrix: Any, start: int, stop: int, dtype: str) -> np.ndarray:
    """A copy of some rows, contiguous and in the machine's byte order."""
    block = matrix[start:stop]
    if isinstance(block, torch.Tensor):
        block = block.detach().to(torch.float32 if dtype == "float32" else torch.float16).cpu().numpy()
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and counts as failed
        return np.array(block, dtype=dtype, order="C")
