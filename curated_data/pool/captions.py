"""The captions of samples: the text of their `.txt` members, or of a column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from curated_data.pool.decode import TEXT_EXTENSIONS

if TYPE_CHECKING:
    from curated_data.pool.shards import ShardPool

_READ = 4096  # samples at once


def read_captions(pool: "ShardPool", ids: Sequence[int] | np.ndarray) -> list[str | None]:
    """The caption of each sample, None for those without one; bytes that are not UTF-8 are replaced.

    Raises:
        PoolError: an id outside the pool, or a shard that is missing or has changed.
    """
    if pool.caption_column is not None:
        assert pool.described is not None, "with a column"
        return pool.described.captions(ids)
    extensions = [name for name in TEXT_EXTENSIONS if name in pool.index().extensions]
    if not extensions:
        return [None] * len(ids)
    found: list[str | None] = []
    for first in range(0, len(ids), _READ):
        for sample in pool.read(ids[first : first + _READ], extensions):
            text = next((sample[name] for name in extensions if name in sample), None)
            found.append(None if text is None else text.decode("utf-8", "replace").strip())
    return found
