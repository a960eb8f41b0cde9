"""Embeddings on disk: one `.npy` a shard, beside it which samples failed and why."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import FORMAT_VERSION, atomic_save, atomic_write_json, fingerprint, read_json
from curated_data.errors import CacheError

VERSION = 1
"""Of what extraction computes; a change to it makes older embeddings stale."""


_OPEN_MAPS = 256


class EmbeddingStore:
    """The embeddings of a pool, read through memory maps that open on first use.

    Args:
        folder: holds `<shard fingerprint>.npy` and `<shard fingerprint>.json` for each shard.
        shard_fingerprints: of the pool's shards, in pool order.
        dimension: length of an embedding.
        dtype: of the stored values.
        ids: (m,) the sample in each row, ascending, where the store holds some of the pool alone; None: the
            rows are the pool's samples. Rows are asked for by their number either way.

    Raises:
        CacheError: a file of a shard is missing, or is not what its name says.
    """

    def __init__(
        self,
        folder: Path,
        shard_fingerprints: Sequence[str],
        dimension: int,
        dtype: str,
        *,
        ids: np.ndarray | None = None,
    ):
        self.folder = Path(folder)
        self.ids = ids
        self.shard_fingerprints = list(shard_fingerprints)
        self.dtype = np.dtype(dtype)
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # the clustering reads from several threads
        self._details = [_read_shard_details(self.folder, name) for name in self.shard_fingerprints]
        self._starts = np.cumsum([0, *(details["samples"] for details in self._details)])
        self.shape = (int(self._starts[-1]), dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.as_array(dtype or self.dtype)

    @property
    def fingerprint(self) -> str:
        """Of the embedder (the folder's name), the shards and the stored type."""
        return fingerprint(
            embedder=self.folder.name, shards=self.shard_fingerprints, dtype=self.dtype.str, version=VERSION
        )

    @property
    def valid(self) -> np.ndarray:
        """(n,) bool: False where a sample could not be decoded or its embedding is not finite."""
        mask = np.ones(len(self), bool)
        for start, details in zip(self._starts[:-1], self._details, strict=True):
            mask[start + np.array([failure["place"] for failure in details["failures"]], np.int64)] = False
        return mask

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What was left out: `id`, `shard`, `key` and `reason` of each sample, in pool order."""
        return [
            {
                "id": self._sample(int(start) + failure["place"]),
                **{name: failure[name] for name in ("shard", "key", "reason")},
            }
            for start, details in zip(self._starts[:-1], self._details, strict=True)
            for failure in details["failures"]
        ]

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice or by an array of ids, as of one array in memory: the clustering reads blocks of
        it.
        """
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
        """Embeddings (m, d) of the ids, in the order asked.

        Raises:
            IndexError: an id outside the pool.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"ids need to lie in 0..{len(self) - 1}, found {ids.min()}..{ids.max()}")
        out = np.empty((len(ids), self.shape[1]), self.dtype)
        order = np.argsort(ids, kind="stable")
        cuts = np.searchsorted(ids[order], self._starts)
        for number in np.flatnonzero(np.diff(cuts)):
            here = order[cuts[number] : cuts[number + 1]]
            out[here] = self._map(int(number))[ids[here] - self._starts[number]]
        return out

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Shard by shard, its first id and its embeddings, as memory maps."""
        for number, start in enumerate(self._starts[:-1]):
            yield int(start), self._map(number)

    def as_array(self, dtype: Any = np.float32) -> np.ndarray:
        """All rows in one array in memory, (n, d)."""
        out = np.empty(self.shape, dtype)
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out

    def _sample(self, row: int) -> int:
        return row if self.ids is None else int(self.ids[row])

    def _map(self, number: int) -> np.ndarray:
        """A shard's rows. The maps used last stay open, a few only: each holds a file handle."""
        with self._lock:
            if number in self._maps:
                self._maps.move_to_end(number)
                return self._maps[number]
            path = self.folder / f"{self.shard_fingerprints[number]}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise CacheError(
                    f"{path}: cannot be read ({error}); remove it and its .json to embed its shard again"
                ) from error
            expected = (self._details[number]["samples"], self.shape[1])
            if array.shape != expected or array.dtype != self.dtype:
                raise CacheError(
                    f"{path}: holds {array.shape} {array.dtype}, expected {expected} {self.dtype}; remove it "
                    "and its .json to embed its shard again"
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


def is_embedded(folder: Path, shard_fingerprint: str) -> bool:
    """Whether a shard's embeddings are there, whole. The details are published last."""
    return (folder / f"{shard_fingerprint}.json").exists()


def write_shard(
    folder: Path,
    shard_fingerprint: str,
    rows: np.ndarray,
    failures: list[dict[str, Any]],
    origin: dict[str, Any],
) -> None:
    """Publish a shard's embeddings (n, d): the array first, then the details that declare it whole.

    Args:
        failures: `place` in the shard, `shard`, `key` and `reason` of each sample left out.
        origin: what the manifest says of where the rows come from.
    """
    atomic_save(folder / f"{shard_fingerprint}.npy", rows)
    content = {"format": FORMAT_VERSION, "samples": len(rows), "failures": failures, **origin}
    atomic_write_json(folder / f"{shard_fingerprint}.json", content)


def _read_shard_details(folder: Path, shard_fingerprint: str) -> dict[str, Any]:
    path = folder / f"{shard_fingerprint}.json"
    details = read_json(path)
    if details.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"{path}: written in cache format {details.get('format')!r}; remove its folder to rebuild it"
        )
    return details
