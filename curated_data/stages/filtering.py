"""The filters of a curation, over the columns of its pool."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.config import CurationConfig
from curated_data.embedding.existing import EmbeddedPool
from curated_data.errors import ConfigError
from curated_data.parallel import check_same
from curated_data.pool import ShardPool
from curated_data.selection.filters import Filtered, named_ids, sample_filter

if TYPE_CHECKING:
    import pyarrow as pa

AnyPool = ShardPool | EmbeddedPool


def with_named_ids(config: CurationConfig, pool: AnyPool) -> CurationConfig:
    """The settings with ids in place of the keys and files in `exclude` and `include`.

    Raises:
        ConfigError: an id or a key that is not in the pool, a file that cannot be read, or more samples to
            include than to select.
    """
    if not config.exclude and not config.include:
        return config

    def of_keys(keys: list[str]) -> np.ndarray:
        from curated_data.parquet import bytes_of_keys

        return ids_of_keys(pool, bytes_of_keys(keys))

    named = {
        name: named_ids(getattr(config, name), name, len(pool), of_keys).tolist()
        for name in ("exclude", "include")
    }
    least = min([config.target_size, *config.nested_sizes])
    if len(named["include"]) > least:
        raise ConfigError(
            f"include: {len(named['include'])} samples are more than "
            f"{'target_size' if least == config.target_size else 'nested_sizes'}, {least}; raise it, or "
            "include fewer"
        )
    return dataclasses.replace(config, **named)


def ids_of_keys(pool: AnyPool, keys: "pa.Array") -> np.ndarray:
    """(m,) int64, the samples with these keys, as bytes; -1 for those that are not in the pool. Rows without
    keys are named by their numbers.
    """
    from curated_data.parquet import join, packed_keys

    if isinstance(pool, ShardPool):
        index = pool.index()
        return join(keys, packed_keys(index.key_start, index.key_bytes))
    if pool.key_array is None:
        rows = [int(key) if key.isdigit() and len(key) < 19 else -1 for key in keys.to_pylist()]
        return np.array([row if row < len(pool) else -1 for row in rows], np.int64)
    return join(keys, pool.key_array)


def filter_pool(pool: AnyPool, config: CurationConfig) -> Filtered | None:
    """What the filters of a configuration leave of a pool; None if it has none.

    Args:
        pool: n samples, whose columns are read as far as a condition names them.
        config: with ids alone in `exclude`, see `with_named_ids`.

    Raises:
        ConfigError: not a condition, or one that names an unknown column, or cannot be evaluated.
        PoolError: nothing is left, or a column cannot be read.
    """
    if config.where is None and not config.exclude:
        return None
    found = sample_filter(
        len(pool),
        config.where,
        np.array(config.exclude, np.int64),
        np.array(config.include, np.int64),
        pool.columns,
        pool.keys,
    )
    check_same(filters=fingerprint(keep=np.packbits(found.keep)))
    return found


def filter_report(found: Filtered | None, pool: AnyPool) -> dict[str, Any]:
    """What a filter adds to the report of a curation."""
    return {} if found is None else {"filters": found.report(pool.keys)}


def filter_rows(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What filters drop as rows of a table; none without filters."""
    if report is None:
        return []
    rows = [("dropped by filters", f"{report['dropped']:,}")]
    for condition in report["conditions"]:
        null = f", {condition['nulls']:,} as NULL" if condition["nulls"] else ""
        rows.append((f"by {condition['text']} alone", f"{condition['drops']:,}{null}"))
    if report["excluded"]:
        rows.append(("excluded by name", f"{report['excluded']:,}"))
    for number, key in report["examples"]:
        rows.append(("for example", f"{number}: {key}"))
    return rows
