"""Extend a curation to a pool that has grown: assign the new samples to the clusters of the existing tree."""

import dataclasses
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data.cache.artifacts import MANIFEST, read_json
from curated_data.cache.checksums import reading
from curated_data.cache.paths import local_path
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import shown
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.nearest import nearest, squared_distances
from curated_data.clustering.rows import rank_range
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.contents import Contents
from curated_data.errors import CacheError, ConfigError, PoolError
from curated_data.parallel import all_gather, rank, world_size
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.stages.curation import Curation, report_of, select
from curated_data.stages.embeddings import AnyEmbedder, Embeddings, inputs_of
from curated_data.stages.filtering import filter_pool, filter_report
from curated_data.stages.index import AnyPool, ConfigSource, PoolSource, opened
from curated_data.stages.near_duplicates import (
    Grown,
    NearDuplicates,
    check_preference,
    embed_held_out,
    held_out_embeddings,
)
from curated_data.stages.retrieval import embed_seeds, seed_sources
from curated_data.stages.stage import Run
from curated_data.stages.tree import BuiltTree, Tree

log = logging.getLogger(__name__)

REBUILD_ABOVE = 0.05


@dataclass(frozen=True)
class Drift:
    """How well new samples fit a tree that has not seen them.

    Attributes:
        n_new: samples that were assigned.
        n_old: samples of the tree that are still in the pool.
        distance_ratio: median distance of new samples to their centroid, divided by that of the old ones.
        outlying: share of the new samples that are farther from their centroid than 99 % of the old ones:
            about 0.01 if both come from one distribution, more if clusters are small, since centroids are
            fitted to the samples that the tree was built from.
        rebuild_due: `outlying` is above the limit, or there are more new samples than old ones.
    """

    n_new: int
    n_old: int
    distance_ratio: float
    outlying: float
    rebuild_due: bool


def extend(
    pool: PoolSource,
    config: ConfigSource,
    *,
    tree: str | Path,
    embedder: AnyEmbedder | None,
    cache_dir: str | Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    rebuild_above: float = REBUILD_ABOVE,
) -> Curation:
    """Select from a pool that has gained or lost shards, using the tree of an earlier curation.

    Shards are recognised by their fingerprints, whatever their place in the pool, and their samples keep
    their clusters. Samples of new shards go to the nearest centroid of the lowest level. In a process group
    every rank calls it, does a part of the work, and returns the same.

    With `near_duplicates` enabled, new samples are left out where they are copies of held-out ones, of
    samples in the tree, or of each other. What the tree has stays in it; a warning counts those of its
    samples that are copies of held-out ones, as they are if `held_out` has grown. Samples that were removed
    before the tree was built, but are copies of none that stays now, are assigned like new ones: what they
    were copies of may have left the pool, or the threshold may be another.

    Args:
        pool: the grown pool.
        config: as for `curate`; `levels` and the other settings of the clustering are those of the tree,
            whatever is given here, except `seed`, which the sampling takes.
        tree: the folder of the earlier tree, `curation.folders["tree"]`.
        embedder, cache_dir, device, decoders: as for `curate`; the embedder must be that of the tree.
        rebuild_above: the share of outlying new samples above which a rebuild is due.

    Returns:
        A curation whose report has an entry `drift`, with the fields of `Drift`, and with `near_duplicates`
        enabled the counts `removed_new` (new samples left out), `readmitted` (samples removed earlier that
        are copies of none now) and `held_out_in_tree`.

    Raises:
        ConfigError: a setting that is unknown or out of range, or held-out shards that cannot be embedded.
        EmbedderError: the embedder cannot be found or does not fit the pool.
        CacheError: `tree` is not the tree of a curation, or was built with another embedder.
        PoolError: the pool has none of the tree's shards.
        RankError: another rank has failed or died.
    """
    with opened(pool, config, cache_dir, device) as (shards, settings, run):
        folder = local_path(tree, "tree")
        # Another stage's folder is sound: it must not be said to be damaged.
        if not (folder / MANIFEST).exists() or read_json(folder / MANIFEST).get("stage") != Tree.kind:
            raise CacheError(
                f"{folder}: holds no tree; give the folder that `curate` printed, CACHE/tree/NAME"
            )
        base = BuiltTree(folder)
        # All that can be wrong is looked at now, before anything is embedded.
        if not (isinstance(rebuild_above, int | float) and rebuild_above >= 0):
            raise ConfigError(f"rebuild_above: expected a share of the new samples, got {rebuild_above!r}")
        embeddings = Embeddings.of(run.root, shards, embedder, settings, decoders)
        if base.inputs.get("embedder") != embeddings.name:
            raise CacheError(
                f"{base.folder}: its tree was built over embeddings {shown(base.inputs.get('embedder'))}, "
                f"these are {embeddings.name}; give the embedder and embedding settings of that curation, or "
                "curate again"
            )
        return _extend(shards, settings, run, embeddings, base, rebuild_above)


def _extend(
    pool: AnyPool,
    config: CurationConfig,
    run: Run,
    embeddings: Embeddings,
    base: BuiltTree,
    rebuild_above: float,
) -> Curation:
    old = base.tree
    of_tree = base.settings_in(config)
    held_out_stage = held_out_embeddings(config, embeddings)
    sources = seed_sources(config, embeddings)
    check_preference(config, pool)
    if isinstance(pool, ShardPool):
        _check_shards(pool, base, run.root)
    filtered = filter_pool(pool, config)
    with run.timed("embed"):
        held_out = embed_held_out(held_out_stage, run)  # the smaller
        seeds = embed_seeds(sources, run)
        store = embeddings.of_kept(filtered).build(run.device)
    run.folders["embeddings"] = store.folder
    kept, known = _kept(pool, store.shard_fingerprints, old, base)
    if filtered is not None:
        kept.parent[1][~filtered.keep] = EXCLUDED
    valid, inputs = store.valid, inputs_of(store) | {"base": base.folder.name}
    in_tree = kept.parent[1] != EXCLUDED
    new = ~known
    counts: dict[str, int] = {}
    if config.near_duplicates.enabled:
        beside = {} if held_out is None else {"held_out": held_out.fingerprint}
        copies = NearDuplicates(run.root, config, inputs | beside)
        valid &= copies.build(run, pool, store, held_out, Grown(known, in_tree))
        inputs = inputs | {copies.place: copies.name}
        again = np.flatnonzero(valid & known & ~in_tree)
        again = again[store.rows(again).any(axis=1)]  # zero rows are excluded for another reason
        new[again] = True
        counts = _copies(copies) | {"readmitted": len(again)}
        if len(again):
            log.info("near-duplicates: %d samples removed earlier are copies of none now", len(again))
    elif "filters" in base.inputs:  # which may have dropped what they keep now
        new |= valid & known & ~in_tree
    if not config.near_duplicates.enabled and NearDuplicates.place in base.inputs:
        log.warning(
            "near_duplicates is not enabled, though the tree was built without near-duplicates: copies among "
            "the new samples stay in, also those of held-out ones"
        )
    stage = Tree(run.root, of_tree, inputs)
    tree = stage.build(
        run,
        pool,
        store,
        lambda: _grow(store, kept, valid & new, run.device),
        find=lambda tree: {"drift": _fit(tree, in_tree)},
    )
    drift = _drift(BuiltTree(stage.folder), rebuild_above)
    log.info(
        "extended by %d samples to %d: median distance %.2f of the old ones', %.1f %% outlying%s",
        drift.n_new,
        len(pool),
        drift.distance_ratio,
        100 * drift.outlying,
        "; a rebuild is due" if drift.rebuild_due else "",
    )
    if NearDuplicates.place in base.inputs:  # then what the tree leaves out counts as near-duplicates
        valid &= ~known | (tree.parent[1] != EXCLUDED)
    config = dataclasses.replace(of_tree, seed=config.seed)
    found = {"drift": vars(drift)}
    counts_of_filters = filter_report(filtered, pool)
    made = select(
        run,
        config,
        tree,
        store,
        lambda ids: report_of(pool, store, valid, tree, ids, config) | counts_of_filters | found | counts,
        seeds,
    )
    return dataclasses.replace(made, report=made.report | found)  # by the limit of this call


def _drift(built: BuiltTree, rebuild_above: float) -> Drift:
    with reading(built.folder / MANIFEST, Remedy(built.folder / MANIFEST)):
        drift = Drift(**built.manifest["drift"], rebuild_due=False)
        is_due = drift.outlying > rebuild_above or drift.n_new > drift.n_old
        return dataclasses.replace(drift, rebuild_due=is_due)


def _check_shards(pool: ShardPool, base: BuiltTree, root: Path) -> None:
    """Check that the pool has some shard of the tree, as far as the cache knows what those are."""
    contents = Contents(root, pool)
    names = contents.recognise()
    if not set(base.shards) & set(names) and contents.knows(base.shards):
        raise _no_shard(base)


def _no_shard(base: BuiltTree) -> PoolError:
    return PoolError(
        f"the pool has none of the {len(base.shards)} shards that {base.folder} was built over; curate again"
    )


def _damaged(base: BuiltTree, why: str) -> CacheError:
    path = base.folder / "shard_ranges.npy"
    return CacheError(f"{path}: damaged ({why}); {Remedy(path)}")


def _kept(
    pool: AnyPool, shards: list[str], old: ClusterTree, base: BuiltTree
) -> tuple[ClusterTree, np.ndarray]:
    """The old tree over the pool as it is now, without new samples, and (n,) bool: what it was built over.

    Args:
        shards: the content of each shard of the pool.
    """
    old_ranges = base.shard_ranges()
    places: dict[str, list[int]] = defaultdict(list)  # a shard may have been in the pool twice
    for number, name in reversed(list(enumerate(base.shards))):
        places[name].append(number)
    ranges = pool.shard_ranges()
    sizes, old_sizes = np.diff(ranges), np.diff(old_ranges)
    if old_ranges[0] != 0 or old_ranges[-1] != old.n_samples or (old_sizes < 0).any():
        raise _damaged(base, f"expected ranges from 0 to {old.n_samples}")
    parent = np.full(len(pool), EXCLUDED, np.int64)
    distance = np.full(len(pool), np.nan, np.float32)
    known = np.zeros(len(pool), bool)
    for number, name in enumerate(shards):
        if places[name]:
            place = places[name].pop()
            if sizes[number] != old_sizes[place]:
                raise _damaged(base, f"shard {place} has {old_sizes[place]} samples, now {sizes[number]}")
            here = slice(ranges[number], ranges[number + 1])
            there = slice(old_ranges[place], old_ranges[place + 1])
            parent[here], known[here] = old.parent[1][there], True
            distance[here] = np.nan if old.distance is None else old.distance[there]
    if not known.any():
        raise _no_shard(base)
    return ClusterTree(old.centroids, old.parent | {1: parent}, distance, metric=old.metric), known


def _copies(stage: NearDuplicates) -> dict[str, int]:
    """The counts of near-duplicates for the report; warns of what the tree holds that is held out."""
    counts = stage.counts("removed_new", "held_out_in_tree")
    log.info("near-duplicates: %d new samples removed", counts["removed_new"])
    if counts["held_out_in_tree"]:
        log.warning(
            "near_duplicates.held_out: %d samples of the tree are copies of held-out ones, and stay in it; "
            "curate again to have them removed",
            counts["held_out_in_tree"],
        )
    return counts


def _grow(
    store: EmbeddingStore, kept: ClusterTree, new: np.ndarray, device: str | torch.device
) -> ClusterTree:
    """The tree with the new samples, (n,) bool, in the nearest clusters."""
    assert kept.distance is not None
    parent, distance = kept.parent[1].copy(), kept.distance.copy()
    if new.any():
        rows = prepare(
            store, metric=kept.metric, device=device, valid=new, nonfinite="exclude", max_memory=None
        )
        centroids = rows.frame.inside(torch.from_numpy(kept.centroids[1]).to(rows.device)).float()
        mine = rows.part(*rank_range(len(rows), rank(), world_size()))
        own = nearest(mine, centroids)
        squared = squared_distances(mine, centroids, own)
        ids = np.flatnonzero(new) if rows.ids is None else rows.ids
        parent[ids] = np.concatenate(all_gather(own))
        distance[ids] = np.sqrt(np.concatenate(all_gather(squared))) * rows.frame.scale
    return ClusterTree(kept.centroids, kept.parent | {1: parent}, distance, metric=kept.metric)


def _fit(tree: ClusterTree, was_in: np.ndarray) -> dict[str, Any]:
    """The fields of `Drift` that do not depend on the limit."""
    assert tree.distance is not None
    inside = tree.parent[1] != EXCLUDED
    before, after = tree.distance[inside & was_in], tree.distance[inside & ~was_in]
    ratio, outlying = 1.0, 0.0
    if len(after):
        ratio = float(np.median(after) / max(np.median(before), np.finfo(np.float32).tiny))
        outlying = float((after > np.quantile(before, 0.99)).mean())
    return {"n_new": len(after), "n_old": len(before), "distance_ratio": ratio, "outlying": outlying}
