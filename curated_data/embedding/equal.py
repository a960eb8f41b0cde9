"""How many samples of a pool have one and the same embedding."""

from typing import NamedTuple

import numpy as np

from curated_data.embedding.store import EmbeddingStore

_LOOKED_AT = 16_384  # rows: a group of 1 % is some 160 of them
_BLOCK = 1_024


class EqualRows(NamedTuple):
    """Of embeddings looked at: how many, how many equal another one, how many are in the largest group of
    equal ones, and a sample of that group (-1 if there is none).
    """

    looked_at: int
    equal: int
    largest: int
    example: int

    @property
    def are_many(self) -> bool:
        """Whether one embedding stands for 1 % of the samples or more, and for ten at least."""
        return self.largest >= max(10, 0.01 * self.looked_at)


def equal_rows(store: EmbeddingStore | np.ndarray) -> EqualRows:
    """Look for equal rows, in a large store among a fixed random choice. Rows of zeros, which are those of
    samples that failed, do not count.

    Images that look different have equal embeddings if decoding lost what told them apart.
    """
    rows = np.arange(len(store))
    if len(rows) > _LOOKED_AT:
        rows = np.sort(np.random.default_rng(0).choice(len(store), _LOOKED_AT, replace=False))
    width = store.shape[1] * store.dtype.itemsize
    weights = np.random.default_rng(1).integers(1, 2**63, width, np.uint64) | np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)  # 64-bit sums: a false match is less likely than 1e-10
    is_there = np.empty(len(rows), bool)
    for first in range(0, len(rows), _BLOCK):
        part = slice(first, first + _BLOCK)
        block = np.ascontiguousarray(store[rows[part]]) + store.dtype.type(0)  # no -0
        content = block.view(np.uint8).reshape(len(block), width).astype(np.uint64)
        hashes[part] = ((content + np.uint64(1)) * weights).sum(1, dtype=np.uint64)
        is_there[part] = block.any(axis=1)
    rows, hashes = rows[is_there], hashes[is_there]
    if not len(rows):
        return EqualRows(0, 0, 0, -1)
    _, at, counts = np.unique(hashes, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    if counts[largest] == 1:
        return EqualRows(len(rows), 0, 1, -1)
    row = int(rows[at[largest]])
    ids = getattr(store, "ids", None)
    sample = row if ids is None else int(ids[row])
    return EqualRows(len(rows), int(counts[counts > 1].sum()), int(counts[largest]), sample)
