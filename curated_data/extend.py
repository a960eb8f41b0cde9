"""Extend a curation to a pool that has grown: assign the new samples to the clusters of the existing tree."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from curated_data.cache import MANIFEST, fingerprint, read_array, read_json, read_manifest
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.nearest import nearest, squared_distances
from curated_data.clustering.rows import rank_range
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig
from curated_data.deduplication import (
    Grown,
    check_preference,
    embed_held_out,
    find_near_duplicates,
    open_held_out,
    read_keep,
)
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.contents import Contents
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.stage import AnyEmbedder, AnyPool, embedding_stage
from curated_data.errors import CacheError, ConfigError, PoolError
from curated_data.filtering import filter_inputs, filter_pool, filter_report
from curated_data.parallel import all_gather, rank, world_size
from curated_data.paths import local_path
from curated_data.pipeline import Curation, opened, publish_tree, read_selection, report_of, select
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.remedies import Remedy
from curated_data.removal import shown
from curated_data.seals import reading
from curated_data.shared_build import build_together

log = logging.getLogger(__name__)

VERSION = 2
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
    pool: ShardPool | EmbeddedPool | str | Path | Sequence[str | Path],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
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
        config: as for `curate`; `levels` and the other settings of the clustering are ignored, since the tree
            is given.
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
    with opened(pool, config, cache_dir) as (shards, settings, root):
        return _extend(
            shards, settings, local_path(tree, "tree"), embedder, root, device, decoders, rebuild_above
        )


def _extend(
    pool: AnyPool,
    config: CurationConfig,
    base: Path,
    embedder: AnyEmbedder | None,
    root: Path,
    device: str | torch.device,
    decoders: Decoders | None,
    rebuild_above: float,
) -> Curation:
    # Another stage's folder is sound: it must not be said to be damaged.
    if not (base / MANIFEST).exists() or read_json(base / MANIFEST).get("stage") != "clustering":
        raise CacheError(f"{base}: holds no tree; give the folder that `curate` printed, CACHE/tree/NAME")
    manifest = read_manifest(base, "clustering")
    old = ClusterTree.load(base / "tree", memory_map=True)
    with reading(base / MANIFEST, Remedy(base / MANIFEST)):
        metric, own = manifest["settings"]["metric"], manifest["inputs"]["embedder"]
        if metric not in ("l2", "cosine"):
            raise ValueError(f"metric is {shown(metric)}")
    # All that can be wrong is looked at now, before anything is embedded.
    if not (isinstance(rebuild_above, int | float) and rebuild_above >= 0):
        raise ConfigError(f"rebuild_above: expected a share of the new samples, got {rebuild_above!r}")
    source = embedding_stage(pool, embedder, config, root, device, decoders)
    name = source.name(pool)
    if own != name:
        raise CacheError(
            f"{base}: its tree was built over embeddings {shown(own)}, these are {name}; give the embedder "
            "and embedding settings of that curation, or curate anew"
        )
    held_out_pool = open_held_out(config, root, pool)
    check_preference(config, pool)
    if isinstance(pool, ShardPool):
        _check_shards(pool, base, manifest, root)
    config = dataclasses.replace(config, metric=metric)
    filtered = filter_pool(pool, config)
    held_out = embed_held_out(held_out_pool, source)  # the smaller
    store = source.store(pool)
    kept, known = _kept(pool, store.shard_fingerprints, old, base)
    inputs = {"embedder": store.folder.name, "embeddings": store.fingerprint, "base": base.name}
    inputs |= filter_inputs(filtered)
    if filtered is not None:
        store.left_out = ~filtered.keep
        kept.parent[1][store.left_out] = EXCLUDED
    folders = {"embeddings": store.folder}
    cached: dict[str, bool] = {}
    copies: dict[str, int] = {}
    valid = store.valid
    in_tree = kept.parent[1] != EXCLUDED
    new = ~known
    if config.near_duplicates.enabled:
        origin = {"embedder": store.folder.name, "embeddings": store.fingerprint} | filter_inputs(filtered)
        folders["near_duplicates"], cached["near_duplicates"] = find_near_duplicates(
            root, pool, store, held_out, config, origin, Grown(base.name, known, in_tree)
        )
        inputs["near_duplicates"] = folders["near_duplicates"].name
        valid &= read_keep(folders["near_duplicates"], len(valid))
        copies = _copies(folders["near_duplicates"])
        again = np.flatnonzero(valid & known & ~in_tree)
        again = again[store.rows(again).any(axis=1)]  # zero rows are excluded for another reason
        new[again] = True
        copies["readmitted"] = len(again)
        if len(again):
            log.info("near-duplicates: %d samples removed earlier are copies of none now", len(again))
    elif "filters" in manifest["inputs"]:  # which may have dropped what they keep now
        new |= valid & known & ~in_tree
    if not config.near_duplicates.enabled and "near_duplicates" in manifest["inputs"]:
        log.warning(
            "near_duplicates is not enabled, though the tree was built without near-duplicates: copies among "
            "the new samples stay in, also those of held-out ones"
        )
    name = fingerprint(inputs=inputs, version=VERSION)

    def build(folder: Path | None) -> None:
        grown = _grow(store, kept, valid & new, metric, device)
        if folder is not None:
            content = {"inputs": inputs, "settings": manifest["settings"], "drift": _fit(grown, in_tree)}
            publish_tree(folder, grown, pool, store, content)

    folder, cached["tree"] = build_together(root / "tree" / name, build)
    grown = ClusterTree.load(folder / "tree", memory_map=True)
    figures = read_manifest(folder, "clustering")
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        drift = Drift(**figures["drift"], rebuild_due=False)
        is_due = drift.outlying > rebuild_above or drift.n_new > drift.n_old
        drift = dataclasses.replace(drift, rebuild_due=is_due)
    folders["tree"] = folder
    log.info(
        "extended by %d samples to %d: median distance %.2f of the old ones', %.1f %% outlying%s",
        drift.n_new,
        len(pool),
        drift.distance_ratio,
        100 * drift.outlying,
        "; a rebuild is due" if is_due else "",
    )
    if "near_duplicates" in manifest["inputs"]:  # then what the tree leaves out counts as near-duplicates
        valid &= ~known | (grown.parent[1] != EXCLUDED)
    folders["selection"], cached["selection"] = select(
        root,
        grown,
        config,
        folder.name,
        store,
        lambda ids: (
            report_of(pool, store, valid, grown, ids, config)
            | filter_report(filtered, pool)
            | {"drift": vars(drift)}
            | copies
        ),
    )
    ids, report = read_selection(folders["selection"], grown.n_samples)
    report |= {"drift": vars(drift), "cached": cached}  # by the limit of this call
    return Curation(ids, grown, store, report, config, folders)


def _check_shards(pool: ShardPool, base: Path, manifest: Mapping[str, Any], root: Path) -> None:
    """Check that the pool has some shard of the tree, as far as the cache knows what those are."""
    contents = Contents(root, pool)
    old = _shards_of(base, manifest)
    names = contents.recognise()
    if not set(old) & set(names) and contents.knows(old):
        raise _no_shard(old, base)


def _shards_of(base: Path, manifest: Mapping[str, Any]) -> list[str]:
    names = read_array(base, "shards", manifest, dtype="S20", shape=(None,))
    return [name.decode("ascii", "replace") for name in names]


def _no_shard(shards: list[str], base: Path) -> PoolError:
    return PoolError(f"the pool has none of the {len(shards)} shards that {base} was built over; curate anew")


def _damaged(base: Path, why: str) -> CacheError:
    path = base / "shard_ranges.npy"
    return CacheError(f"{path}: damaged ({why}); {Remedy(path)}")


def _kept(pool: AnyPool, shards: list[str], old: ClusterTree, base: Path) -> tuple[ClusterTree, np.ndarray]:
    """The old tree over the pool as it is now, without new samples, and (n,) bool: what it was built over.

    Args:
        shards: the content of each shard of the pool.
    """
    manifest = read_manifest(base, "clustering")
    old_shards = _shards_of(base, manifest)
    old_ranges = read_array(base, "shard_ranges", manifest, dtype=np.int64, shape=(len(old_shards) + 1,))
    places: dict[str, list[int]] = defaultdict(list)  # a shard may have been in the pool twice
    for number, name in reversed(list(enumerate(old_shards))):
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
        raise _no_shard(old_shards, base)
    return ClusterTree(old.centroids, old.parent | {1: parent}, distance), known


def _copies(folder: Path) -> dict[str, int]:
    """The counts of near-duplicates for the report; warns of what the tree holds that is held out."""
    manifest = read_manifest(folder, "near_duplicates")
    counts = {name: manifest[name] for name in ("removed_new", "held_out_in_tree")}
    log.info("near-duplicates: %d new samples removed", counts["removed_new"])
    if counts["held_out_in_tree"]:
        log.warning(
            "near_duplicates.held_out: %d samples of the tree are copies of held-out ones, and stay in it; "
            "curate anew to have them removed",
            counts["held_out_in_tree"],
        )
    return counts


def _grow(
    store: EmbeddingStore, kept: ClusterTree, new: np.ndarray, metric: str, device: str | torch.device
) -> ClusterTree:
    """The tree with the new samples, (n,) bool, in the nearest clusters."""
    assert kept.distance is not None
    parent, distance = kept.parent[1].copy(), kept.distance.copy()
    if new.any():
        rows = prepare(store, metric=metric, device=device, valid=new, nonfinite="exclude", max_memory=None)
        centroids = rows.frame.inside(torch.from_numpy(kept.centroids[1]).to(rows.device)).float()
        mine = rows.part(*rank_range(len(rows), rank(), world_size()))
        own = nearest(mine, centroids)
        squared = squared_distances(mine, centroids, own)
        ids = np.flatnonzero(new) if rows.ids is None else rows.ids
        parent[ids] = np.concatenate(all_gather(own))
        distance[ids] = np.sqrt(np.concatenate(all_gather(squared))) * rows.frame.scale
    return ClusterTree(kept.centroids, kept.parent | {1: parent}, distance)


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
