"""Embeddings on disk: one `.npy` a shard, beside it which samples failed and why."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import FORMAT_VERSION, atomic_save, atomic_write_json, fingerprint, read_json
from curated_data.errors import CacheError

VERSION = 1
"""Of what extraction computes; a change to it makes older embeddings stale."""


class EmbeddingStore:
    """The embeddings of a pool, read through memory maps that open on first use.

    Args:
        folder: holds `<shard fingerprint>.npy` and `<shard fingerprint>.json` for each shard.
        shard_fingerprints: of the pool's shards, in pool order.
        dimension: length of an embedding.
        dtype: of the stored values.

    Raises:
        CacheError: a file of a shard is missing, or is not what its name says.
    """

    def __init__(self, folder: Path, shard_fingerprints: Sequence[str], dimension: int, dtype: str):
        self.folder = Path(folder)
        self.shard_fingerprints = list(shard_fingerprints)
        self.dtype = np.dtype(dtype)
        self._maps: dict[int, np.ndarray] = {}
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
                "id": int(start) + failure["place"],
                **{name: failure[name] for name in ("shard", "key", "reason")},
            }
            for start, details in zip(self._starts[:-1], self._details, strict=True)
            for failure in details["failures"]
        ]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (m, d) of the ids, in the order asked."""
        ids = np.asarray(ids, np.int64)
        out = np.empty((len(ids), self.shape[1]), self.dtype)
        shard = np.searchsorted(self._starts, ids, side="right") - 1
        for number in np.unique(shard):
            here = shard == number
            out[here] = self._map(int(number))[ids[here] - self._starts[number]]
        return out

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Shard by shard, its first id and its embeddings, as memory maps."""
        for number, start in enumerate(self._starts[:-1]):
            yield int(start), self._map(number)

    def as_array(self, dtype: Any = np.float32) -> np.ndarray:
        """All rows in one array in memory, (n, d). For a pool beyond memory use `mapped`."""
        out = np.empty(self.shape, dtype)
        for start, block in self.blocks():
            out[start : start + len(block)] = block
        return out

    def mapped(self, path: Path) -> np.ndarray:
        """All rows as one memory-mapped array, (n, d), copied into a file at `path` if it is not there
        yet.
        """
        if not path.exists():
            from curated_data.cache import atomic_path

            with atomic_path(path) as temporary:
                out = np.lib.format.open_memmap(temporary, "w+", self.dtype, self.shape)
                for start, block in self.blocks():
                    out[start : start + len(block)] = block
                out.flush()
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = self.folder / f"{self.shard_fingerprints[number]}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise CacheError(
                    f"{path}: cannot be read ({error}); remove it to embed its shard again"
                ) from error
            expected = (self._details[number]["samples"], self.shape[1])
            if array.shape != expected or array.dtype != self.dtype:
                raise CacheError(
                    f"{path}: holds {array.shape} {array.dtype}, expected {expected} {self.dtype}; remove "
                    "it to embed its shard again"
                )
            self._maps[number] = array
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


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
