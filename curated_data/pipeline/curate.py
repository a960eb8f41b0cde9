"""From a pool to a selection, stage by stage: index, embed, remove near-duplicates, cluster, sample.

Each artifact is named by a fingerprint of everything that determines it, so a second call only reads the
cache, and a changed setting redoes only what depends on it. What each stage is stands in
`curated_data.stages`.
"""

import atexit
import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from curated_data.cache.artifacts import fingerprint
from curated_data.config import CurationConfig, levels_for
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.files import Source
from curated_data.errors import ConfigError, PoolError
from curated_data.parallel import check_same
from curated_data.pool.decode import Decoders
from curated_data.selection.quota_rules import check_clusters
from curated_data.stages.curation import Curation, report_of, select
from curated_data.stages.embeddings import AnyEmbedder, Embeddings, check_any, inputs_of
from curated_data.stages.filtering import filter_pool, filter_report
from curated_data.stages.index import AnyPool, ConfigSource, Index, PoolSource, opened
from curated_data.stages.near_duplicates import (
    NearDuplicates,
    check_preference,
    embed_held_out,
    held_out_embeddings,
)
from curated_data.stages.retrieval import embed_seeds, seed_sources
from curated_data.stages.stage import Run
from curated_data.stages.tree import Tree, check_levels


def curate(
    pool: PoolSource,
    config: ConfigSource,
    *,
    embedder: AnyEmbedder | None,
    cache_dir: str | Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    fields: Sequence[str] | None = None,
) -> Curation:
    """Select a subset of a pool in which rare concepts have a larger share, without labels.

    With `preset: paper` by hierarchical k-means with resampling (arXiv 2405.15613).

    In a process group every rank calls it, does a part of each stage, and returns the same result.

    Args:
        pool: a `ShardPool`, or anything that `ShardPool` takes; or an `EmbeddedPool`.
        config: a `CurationConfig`, its fields as a mapping, or a YAML file of them.
        embedder: a name, a network, a function or an embedder, see `resolve_embedder`; None for an
            `EmbeddedPool`.
        cache_dir: a folder for the artifacts of every stage. All ranks need the same one; several runs may
            share it.
        device: for embedding and clustering; "auto" takes the current CUDA device, or the CPU if there is
            none.
        decoders: of pool members by extension, see `decode_sample`.
        fields: what training will ask for besides the images, as for `CuratedDataModule`. A sample of which
            one cannot be decoded counts as failed and is not selected. None: all.

    Raises:
        ConfigError: a setting that is unknown, out of range, or asks for more clusters than the pool has
            samples.
        PoolError: no shard matches, or one cannot be read.
        EmbedderError: the embedder cannot be found or does not fit the pool.
        CacheError: the cache cannot be written, or another version of the package wrote it.
        RankError: another rank has failed or died.

    Examples:
        >>> from curated_data import curate
        >>> curation = curate(
        ...     "pool-{000..001}.tar", {"target_size": 10}, embedder="pixels:8", cache_dir="cache"
        ... )
        >>> len(curation.ids)
        10
    """
    with opened(pool, config, cache_dir, device) as (shards, settings, run):
        embeddings = Embeddings.of(run.root, shards, embedder, settings, decoders, fields)
        return _curate(shards, settings, run, embeddings)


def _curate(pool: AnyPool, config: CurationConfig, run: Run, embeddings: Embeddings) -> Curation:
    held_out_stage = held_out_embeddings(config, embeddings)
    sources = seed_sources(config, embeddings)
    check_same(curation=fingerprint(config=dataclasses.asdict(config)))
    n_samples = Index(pool).build(run)
    check_levels(config.levels, n_samples)
    if config.levels:
        check_clusters(config)
    check_preference(config, pool)
    with run.timed("filter"):
        filtered = filter_pool(pool, config)

    with run.timed("embed"):
        held_out = embed_held_out(held_out_stage, run)  # the smaller
        seeds = embed_seeds(sources, run)
        store = embeddings.of_kept(filtered).build(run.device)
    run.folders["embeddings"] = store.folder
    check_any(store, f"the pool's {n_samples if filtered is None else int(filtered.keep.sum())} samples")
    valid, inputs = store.valid, inputs_of(store)

    if config.near_duplicates.enabled:
        beside = {} if held_out is None else {"held_out": held_out.fingerprint}
        copies = NearDuplicates(run.root, config, inputs | beside)
        valid &= copies.build(run, pool, store, held_out)
        inputs = inputs | {copies.place: copies.name}
    if not valid.any():
        raise PoolError(
            f"near-duplicates: all of the pool's {int(store.valid.sum())} samples that could be "
            "embedded are copies of held-out ones; raise near_duplicates.threshold, or look at what "
            "held_out names"
        )

    derived = not config.levels
    config = dataclasses.replace(config, levels=levels_for(config, int(valid.sum())))
    check_levels(config.levels, int(valid.sum()), n_samples)
    check_clusters(config)
    tree = Tree(run.root, config, inputs).cluster(run, pool, store, valid, derived=derived)
    return select(
        run,
        config,
        tree,
        store,
        lambda ids: report_of(pool, store, valid, tree, ids, config) | filter_report(filtered, pool),
        seeds,
    )


def curate_embeddings(
    rows: EmbeddedPool | Source | Sequence[Source],
    config: ConfigSource,
    *,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    columns: str | Path | Sequence[str | Path] | None = None,
) -> Curation:
    """Select from embeddings that exist already, without shards: the whole of `curate` but for embedding.

    Args:
        rows: an `EmbeddedPool`, or what it takes: an array, a `.npy` file, a folder of parts, a list.
        config: as for `curate`, but for `embedding`; `near_duplicates.held_out` takes `.npy` files.
        cache_dir: as for `curate`; None takes a temporary folder, which is removed when the process ends.
        device: for the clustering.
        columns: parquet files with more about the rows, for `where`; see `EmbeddedPool`.

    Returns:
        A curation whose ids are numbers of rows.

    Raises:
        ConfigError, PoolError, CacheError, RankError: as for `curate`.

    Examples:
        >>> import numpy as np
        >>> from curated_data import curate_embeddings
        >>> rows = np.random.default_rng(0).normal(size=(2000, 16))
        >>> curation = curate_embeddings(rows, {"target_size": 100})
        >>> len(rows[curation.ids])
        100
    """
    if not isinstance(rows, EmbeddedPool):
        rows = EmbeddedPool(rows, columns=columns)
    elif columns is not None:
        raise ConfigError("columns: given beside an EmbeddedPool, which has its own; give them to that")
    return curate(rows, config, embedder=None, cache_dir=cache_dir or temporary_cache(), device=device)


@functools.cache
def temporary_cache() -> Path:
    """A cache for this process, which is removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="curated_data-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
