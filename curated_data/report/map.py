"""The map on the report page: data about each sample that is shown and about its clusters."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.decomposition import PCA

from curated_data.clustering.tree import ClusterTree
from curated_data.report.examples import random_subset
from curated_data.report.tiles import Tiles
from curated_data.selection import metrics
from curated_data.selection.removed import Removed

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation
    from curated_data.stages.index import AnyPool


def samples_shown(curation: "Curation", most: int, rng: np.random.Generator) -> np.ndarray:
    """Ascending ids of the samples to show: all, or a random subset of which up to half are selected."""
    n = curation.tree.n_samples
    if n <= most:
        return np.arange(n)
    selected = random_subset(np.unique(curation.ids), most // 2, rng)
    others = rng.choice(n, min(n, 2 * most), replace=False)
    others = others[~np.isin(others, curation.ids)][: most - len(selected)]
    return np.sort(np.concatenate([selected, others]))


def sample_map(
    curation: "Curation",
    pool: "AnyPool",
    shown: np.ndarray,
    coordinates: np.ndarray | None,
    labels: np.ndarray | None,
    tiles: Tiles,
    n_images: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The page's data about each sample shown; arrays in base64, little endian."""
    tree = curation.tree
    xy = _principal_components(curation, shown, rng) if coordinates is None else coordinates[shown]
    xy = np.asarray(xy, np.float64)
    finite = np.isfinite(xy).all(axis=1)
    low, high = (xy[finite].min(0), xy[finite].max(0)) if finite.any() else (np.zeros(2), np.ones(2))
    scale = max(float((high - low).max()), 1e-12)
    placed = np.where(finite[:, None], (xy - low) / scale * 65_534 + 1, 0)  # 0: not on the map
    leaf = tree.parent[1][shown]
    count = np.bincount(curation.ids, minlength=tree.n_samples)[shown]
    folder = curation.folders.get("near_duplicates")
    found = None if folder is None else Removed.load(folder)
    wide = tree.n_samples >= 2**31
    tiles.add(shown[np.sort(rng.permutation(len(shown))[:n_images])])
    tile = np.array([tiles.place.get(int(i), -1) for i in shown])
    return {
        "n": len(shown),
        "whole": len(shown) == tree.n_samples,
        "aspect": ((high - low) / scale).tolist(),
        "keys": pool.keys(shown),
        "shards": [Path(url).name for url in pool.urls] if len(pool.urls) <= 10_000 else [],
        "shard": _packed(pool.shard_of(shown), np.int32),
        "id": _packed(shown, np.float64 if wide else np.int32),
        "wide_ids": wide,
        "copy": None if found is None else _packed(_copies(found, shown), np.float64 if wide else np.int32),
        "cosine": None if found is None else _packed(found.cosine[shown], np.float32),
        "x": _packed(placed[:, 0], np.uint16),
        "y": _packed(placed[:, 1], np.uint16),
        "leaf": _packed(np.where(leaf >= 0, np.searchsorted(np.unique(leaf[leaf >= 0]), leaf), -1), np.int32),
        "count": _packed(np.minimum(count, 65_535), np.uint16),
        "tile": _packed(tile, np.int32),
        "label": None if labels is None else _packed(labels[shown], np.int32),
        "rank": None if tree.distance is None else _packed(_leaf_ranks(tree, tree.distance, shown), np.int32),
        "distance": None if tree.distance is None else _packed(tree.distance[shown], np.float32),
    }


def rows_of(curation: "Curation", shown: np.ndarray) -> np.ndarray:
    """(m, d) float32, the embeddings of the samples shown."""
    store = curation.embeddings
    return np.asarray(store.rows(shown) if hasattr(store, "rows") else store[shown], np.float32)


def cluster_tables(curation: "Curation", shown: np.ndarray) -> list[dict[str, str]]:
    """One table a level, of the clusters above the samples shown: number, size, how many were selected from
    each, the parent's row in the next table, and siblings.
    """
    tree = curation.tree
    given = metrics.selected_sizes(tree, curation.ids)
    node = tree.parent[1][shown]
    tables: list[dict[str, str]] = []
    clusters = np.unique(node[node >= 0])
    for level in range(1, tree.n_levels + 1):
        sizes = tree.sizes(level)
        top = level == tree.n_levels
        parent = np.zeros(len(sizes), np.int64) if top else tree.parent[level + 1]
        attached = (parent >= 0) & (sizes > 0)
        siblings = np.bincount(parent[attached], minlength=parent.max(initial=0) + 1)
        above = np.unique(parent[clusters])
        columns = {
            "id": clusters,
            "size": sizes[clusters],
            "given": given[level][clusters],
            "parent": np.searchsorted(above, parent[clusters]),
            "siblings": siblings[parent[clusters]],
        }
        tables.append({name: _packed(values, np.int32) for name, values in columns.items()})
        clusters = above
    return tables


def _copies(found: Removed, shown: np.ndarray) -> np.ndarray:
    """(m,) the sample kept in place of a copy, -2 for a copy of a held-out sample, -1 for no copy."""
    return np.where((found.held_out[shown] >= 0) & ~found.keep[shown], -2, found.near[shown])


def _leaf_ranks(tree: ClusterTree, distance: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """(m,) the rank, from 1, of each sample shown by distance to the centroid in its lowest cluster; 0 if
    excluded. Sorts these clusters alone.
    """
    leaf = tree.parent[1]
    wanted = np.zeros(len(tree.centroids[1]) + 1, bool)  # the last for -1, excluded
    wanted[leaf[shown]] = True
    wanted[-1] = False
    members = np.flatnonzero(wanted[leaf])
    cluster = leaf[members]
    order = np.lexsort((distance[members], cluster))
    size = np.where(wanted[:-1], tree.sizes(1), 0)
    rank = np.empty(len(members), np.int64)
    rank[order] = np.arange(1, len(order) + 1) - (np.cumsum(size) - size)[cluster[order]]
    found = np.zeros(len(shown), np.int64)
    held = leaf[shown] >= 0
    found[held] = rank[np.searchsorted(members, shown[held])]
    return found


def _principal_components(
    curation: "Curation", shown: np.ndarray, rng: np.random.Generator, most: int = 20_000
) -> np.ndarray:
    """(m, 2) for the samples shown, fitted on a random subset of them; NaN for samples without embedding."""
    rows = rows_of(curation, shown)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1) & (curation.tree.parent[1][shown] >= 0))
    xy = np.full((len(shown), 2), np.nan)
    if len(usable) < 2 or rows.shape[1] < 2:
        xy[usable] = 0
        return xy
    fitted = PCA(2, svd_solver="covariance_eigh" if rows.shape[1] <= 4096 else "randomized", random_state=0)
    xy[usable] = fitted.fit(rows[random_subset(usable, most, rng)]).transform(rows[usable])
    return xy


def _packed(values: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()
