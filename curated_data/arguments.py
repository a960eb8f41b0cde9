"""The arguments of a data module: opening pools, reading ids and labels from files, checking the rest."""

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.errors import CacheError, ConfigError
from curated_data.paths import local_path
from curated_data.pool import ShardPool
from curated_data.processes import check_context
from curated_data.seals import load_npy
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.labels import SampleLabels
from curated_data.streaming.order import EpochOrder
from curated_data.streaming.strata import check_level

if TYPE_CHECKING:
    from curated_data.datamodule import CuratedDataModule

Pool = ShardPool | str | Path | Sequence[str | Path]
Ids = str | Path | np.ndarray


def open_pool(
    pool: Pool, cache_dir: str | Path | None, storage_options: Mapping[str, Any] | None = None
) -> ShardPool:
    """A `ShardPool` that keeps its index in `cache_dir`, unless it already has a cache of its own."""
    if not isinstance(pool, ShardPool):
        return ShardPool(pool, cache_dir=cache_dir, storage_options=storage_options)
    return pool if cache_dir is None or pool.cache_dir is not None else pool.with_cache(cache_dir)


def load_ids(selection: Ids, name: str = "selection") -> np.ndarray:
    """The ids themselves, or read from a `.npy` file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not isinstance(selection, str | Path):
        return np.asarray(selection)
    try:
        return load_npy(local_path(selection, name), "give another")
    except CacheError as error:
        raise ConfigError(
            f"{name}: {selection} cannot be read as a .npy file of integers ({error})"
        ) from error


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


def load_labels(labels: Ids | None, selection: Ids | None, pool: ShardPool) -> SampleLabels | None:
    """Labels for the samples of a selection, or for the whole pool.

    Raises:
        ConfigError: the labels do not match the samples.
    """
    if labels is None:
        return None
    ids = None if selection is None else load_ids(selection)
    labels = load_ids(labels, "labels")
    if ids is None and len(labels) != len(pool):
        raise ConfigError(
            f"labels: {len(labels)} of them for a pool of {len(pool)} samples; give one for each, "
            "or with `selection` the samples that they belong to"
        )
    return SampleLabels(ids, labels)


def _is_integer(value: object) -> bool:
    """Whether a value is an integer of any type, such as numpy's; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_alone(**arguments: object) -> None:
    """Check that none of the arguments that a mixture replaces is given.

    Raises:
        ConfigError: names the first one that is.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(
                f"{name}: given together with mixture; its components have their own, drop either"
            )


def check_arguments(data: "CuratedDataModule", selection: Ids | None, labels: Ids | None) -> None:
    """Check the arguments of a data module, each by itself and against the others; make integers plain ones.

    Raises:
        ConfigError: arguments that contradict each other or are out of range.
    """
    curated = data.curation_config is not None
    if data.mixture is not None:
        if data.decode_on_device:
            raise ConfigError("decode_on_device: takes one pool, and not a mixture; leave either out")
        if data.stratify_level is not None:
            raise ConfigError("stratify_level: belongs to the components of a mixture; give it to these")
        if "source" in (data.decoders or {}):
            raise ConfigError(
                "decoders['source']: batches of a mixture have a 'source'; rename these members"
            )
    if curated:
        if selection is not None:
            raise ConfigError("selection: given together with curation, which makes one; drop either")
        if data.embedder is None:
            raise ConfigError(
                "embedder: a curation needs one, say 'hub:dinov2_vitl14_reg' or a module of yours"
            )
        if data.cache_dir is None:
            raise ConfigError("cache_dir: a curation needs a folder for its artifacts, shared by all ranks")
    elif data.stratify_level is not None:
        raise ConfigError("stratify_level: needs a curation, whose tree has the clusters")
    if data.stratify_level is not None and data.shuffle != "full":
        raise ConfigError(f'stratify_level: takes shuffle="full", found {data.shuffle!r}')
    if data.stratify_level is not None and data.curation_config is not None and data.curation_config.levels:
        check_level(data.stratify_level, len(data.curation_config.levels))  # derived ones later, by the tree
    for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("num_workers", 0), ("image_size", 1)):
        value = getattr(data, name)
        if value is None and name in ("eval_batch_size", "num_workers"):
            continue
        if not _is_integer(value) or value < least:
            raise ConfigError(f"{name}: expected an integer of at least {least}, found {value!r}")
        setattr(data, name, int(value))
    if not _is_integer(data.seed):
        raise ConfigError(f"seed: expected an integer, found {data.seed!r}")
    data.seed = int(data.seed)
    for name in ("views", "device_views", "eval_transform"):
        value = getattr(data, name)
        if value is not None and not callable(value):
            of_what = "a batch of images and seeds" if name == "device_views" else "an image"
            raise ConfigError(f"{name}: expected a function of {of_what}, found {value!r}")
    if data.decode_on_device:
        if data.device_views is None:
            raise ConfigError("decode_on_device: takes device_views, which are made of what is decoded there")
        for name in ("views", "min_size"):
            if getattr(data, name) is not None:
                raise ConfigError(
                    f"{name}: takes images that workers decode; with decode_on_device they do not"
                )
    if labels is not None and curated:
        raise ConfigError("labels: given together with curation; give the `selection` they belong to")
    check_context(data.multiprocessing_context, "multiprocessing_context")
    if data.slow_after < 0:
        raise ConfigError(f"slow_after: expected seconds, 0 or more, found {data.slow_after!r}")
    if not 0 <= data.max_skipped <= 1:
        raise ConfigError(f"max_skipped: expected a share in 0..1, found {data.max_skipped!r}")
    EpochOrder(  # checks these itself
        1,
        seed=0,
        batch_size=1,
        shuffle=data.shuffle,
        last_batch=data.last_batch,
        shard_starts=np.zeros(2),
    )
    for pool in {id(pool): pool for pool in (data.pool, *(c.pool for c in data.components))}.values():
        PoolDataset(pool, on_error=data.on_error, decoders=data.decoders, fields=data.fields)
