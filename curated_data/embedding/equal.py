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


def equal_rows(store: EmbeddingStore, valid: np.ndarray) -> EqualRows:
    """Look for equal rows among the valid ones, or among a fixed random choice of them in a large store.

    Images that look different have equal embeddings if decoding lost what told them apart.

    Args:
        valid: (n,) bool, which rows hold an embedding.
    """
    rows = np.flatnonzero(valid)
    if len(rows) > _LOOKED_AT:
        rows = np.sort(np.random.default_rng(0).choice(rows, _LOOKED_AT, replace=False))
    if not len(rows):
        return EqualRows(0, 0, 0, -1)
    width = store.shape[1] * store.dtype.itemsize
    weights = np.random.default_rng(1).integers(1, 2**63, width, np.uint64) | np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)  # 64-bit sums: a false match is less likely than 1e-10
    for first in range(0, len(rows), _BLOCK):
        block = np.ascontiguousarray(store.rows(rows[first : first + _BLOCK])) + store.dtype.type(0)  # no -0
        content = block.view(np.uint8).reshape(len(block), width).astype(np.uint64)
        hashes[first : first + len(block)] = ((content + np.uint64(1)) * weights).sum(1, dtype=np.uint64)
    _, at, counts = np.unique(hashes, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    if counts[largest] == 1:
        return EqualRows(len(rows), 0, 1, -1)
    row = int(rows[at[largest]])
    sample = row if store.ids is None else int(store.ids[row])
    return EqualRows(len(rows), int(counts[counts > 1].sum()), int(counts[largest]), sample)
