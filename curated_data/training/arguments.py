"""The arguments of a data module: opening pools, reading ids and labels from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from curated_data.cache.checksums import load_given
from curated_data.errors import ConfigError
from curated_data.pool import ShardPool
from curated_data.streaming.labels import SampleLabels

Pool = ShardPool | str | Path | Sequence[str | Path]
Ids = str | Path | np.ndarray


def open_pool(
    pool: Pool,
    cache_dir: str | Path | None,
    storage_options: Mapping[str, Any] | None = None,
    labels: Ids | None = None,
) -> ShardPool:
    """A `ShardPool` that keeps its index in `cache_dir`, unless it already has a cache of its own.

    Args:
        labels: as those of a data module; if they are a column, the pool has its classes from there.

    Raises:
        ConfigError: they are another column than the pool was opened with.
    """
    column = labels if is_column(labels) else None
    if not isinstance(pool, ShardPool):
        return ShardPool(pool, cache_dir=cache_dir, storage_options=storage_options, labels=column)
    if column not in (None, pool.label_column):
        raise ConfigError(
            f"labels: the column {column!r} is given for a pool that was opened with "
            f"labels={pool.label_column!r}; open it with ShardPool(…, labels={column!r})"
        )
    return pool if cache_dir is None or pool.cache_dir is not None else pool.with_cache(cache_dir)


def is_column(labels: Ids | None) -> TypeGuard[str]:
    """Whether labels are the name of a column, not integers or a `.npy` file."""
    return isinstance(labels, str) and not labels.endswith(".npy")


def load_ids(selection: Ids, name: str = "selection") -> np.ndarray:
    """The ids themselves, or read from a `.npy` file.

    Raises:
        ConfigError: the file cannot be read.
    """
    return load_given(selection, name) if isinstance(selection, str | Path) else np.asarray(selection)


def checked_selection(ids: np.ndarray, pool: ShardPool, name: str) -> np.ndarray:
    """The ids as int64.

    Raises:
        ConfigError: not a list of integers, an empty one, or one with an id that is not in the pool.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
        raise ConfigError(f"{name}: expected one or more integer ids, found {ids.dtype} of shape {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(pool):
        raise ConfigError(
            f"{name}: id {low if low < 0 else high} is not in the pool, whose ids go from 0 to "
            f"{len(pool) - 1}; was it made for another pool?"
        )
    return ids.astype(np.int64, copy=False)


def load_labels(
    labels: Ids | None, selection: Ids | None, pool: ShardPool, name: str = "labels"
) -> SampleLabels | None:
    """Labels for the samples of a selection, or for the whole pool; None if the pool's own count.

    Raises:
        ConfigError: the labels do not match the samples.
    """
    if labels is None or is_column(labels):
        return None
    ids = None if selection is None else load_ids(selection)
    labels = load_ids(labels, name)
    if ids is None and len(labels) != len(pool):
        raise ConfigError(
            f"{name}: {len(labels)} of them for a pool of {len(pool)} samples; give one for each, "
            "or with `selection` the samples that they belong to"
        )
    return SampleLabels(ids, labels)


def check_absent(why: str, **arguments: object) -> None:
    """Check that none of some arguments is given.

    Args:
        why: they cannot be, for the error.

    Raises:
        ConfigError: names the first one that is.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(f"{name}: {why}, drop either")


def check_functions(**functions: object) -> None:
    """Check that what is given for some arguments are functions of an image.

    Raises:
        ConfigError: names the first one that is not.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name}: expected a function of an image, found {value!r}")


def named_pools(
    pools: "Pool | Mapping[str, Pool] | None",
    cache_dir: str | Path | None,
    storage_options: Mapping[str, Any] | None,
    name: str,
    labels: Ids | None = None,
) -> dict[str, ShardPool]:
    """Pools by name, opened; one that has none is named "". Those that are opened already keep their labels.

    Raises:
        ConfigError: a mapping without any, or whose names are not text.
        PoolError: no shard matches.
    """
    if pools is None:
        return {}
    if not isinstance(pools, Mapping):
        pools = {"": pools}
    elif not pools or not all(isinstance(key, str) and key for key in pools):
        raise ConfigError(f"{name}: expected pools by their names, found {dict(pools)!r}")
    return {
        key: open_pool(pool, cache_dir, storage_options, None if isinstance(pool, ShardPool) else labels)
        for key, pool in pools.items()
    }
