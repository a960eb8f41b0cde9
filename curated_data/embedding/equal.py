"""How many samples of a pool have one and the same embedding."""

import hashlib
from collections import defaultdict
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
    groups: dict[bytes, list[int]] = defaultdict(list)
    for first in range(0, len(rows), _BLOCK):
        part = rows[first : first + _BLOCK]
        block = store[part] + store.dtype.type(0)  # no -0
        for row, content in zip(part.tolist(), block, strict=True):
            if content.any():
                groups[hashlib.sha256(content.tobytes()).digest()].append(row)
    sizes = [len(group) for group in groups.values()]
    if max(sizes, default=0) <= 1:
        return EqualRows(len(sizes), 0, max(sizes, default=0), -1)
    largest = max(groups.values(), key=len)
    ids = getattr(store, "ids", None)
    sample = largest[0] if ids is None else int(ids[largest[0]])
    return EqualRows(sum(sizes), sum(size for size in sizes if size > 1), len(largest), sample)
