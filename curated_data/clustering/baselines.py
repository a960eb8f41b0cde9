"""Baselines for hierarchical k-means: flat k-means, DBSCAN and agglomerative clustering, as one-level trees.

DBSCAN and agglomerative clustering are those of scikit-learn, which compare all pairs of rows: they are
feasible for tens of thousands of rows.
"""

from typing import Any

import numpy as np
from sklearn.cluster import DBSCAN, AgglomerativeClustering

from curated_data.clustering.hierarchy import hierarchical_kmeans
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.levels import Level
from curated_data.matrix import Matrix


def flat_kmeans(
    x: Matrix, n_clusters: int, *, metric: str = "l2", seed: int = 0, **settings: Any
) -> ClusterTree:
    """k-means with one level; `settings` as for `hierarchical_kmeans`.

    Args:
        x: (n, d) rows.
        n_clusters: k.
    """
    return hierarchical_kmeans(x, [Level(n_clusters)], metric=metric, seed=seed, **settings)


def dbscan(
    x: Matrix, *, eps: float, min_samples: int = 5, metric: str = "l2", valid: np.ndarray | None = None
) -> ClusterTree:
    """Density-based clusters (Ester et al. 1996); noise is excluded (parent -1).

    Args:
        x: (n, d) rows.
        eps: radius of a neighbourhood, as a Euclidean distance; between unit vectors for "cosine".
        min_samples: neighbours of a core row, itself included.
        valid: (n,) bool, False for rows to exclude.

    Raises:
        ValueError: no cluster was found, because all rows are noise.
    """
    ids, rows = _usable(x, metric, valid)
    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(rows)
    if labels.max() < 0:
        raise ValueError(f"dbscan found no cluster at eps={eps}, min_samples={min_samples}: raise eps")
    return _tree(len(x), ids, rows, labels, metric)


def agglomerative(
    x: Matrix,
    n_clusters: int,
    *,
    linkage: str = "ward",
    metric: str = "l2",
    valid: np.ndarray | None = None,
) -> ClusterTree:
    """Agglomerative clustering: merge the closest pair of clusters until `n_clusters` are left.

    Args:
        x: (n, d) rows.
        linkage: "ward", "average", "complete" or "single", on Euclidean distances; between unit vectors for
            "cosine".
        valid: (n,) bool, False for rows to exclude.

    Raises:
        ValueError: more clusters than rows.
    """
    ids, rows = _usable(x, metric, valid)
    if not 1 <= n_clusters <= len(rows):
        raise ValueError(f"n_clusters={n_clusters}: needs 1..{len(rows)}, the number of usable rows")
    labels = (
        AgglomerativeClustering(n_clusters, linkage=linkage).fit_predict(rows)
        if len(rows) > 1
        else np.zeros(1, int)
    )
    return _tree(len(x), ids, rows, labels, metric)


def _usable(x: Matrix, metric: str, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the finite, valid rows, and these rows, (m, d) float64; of unit norm for "cosine"."""
    rows = prepare(x, metric=metric, device="cpu", valid=valid, nonfinite="exclude", max_memory=None)
    ids = np.arange(len(x)) if rows.ids is None else rows.ids
    values = rows.block(0, len(rows)).numpy().astype(np.float64) * rows.frame.scale
    return ids, values if rows.frame.mean is None else values + rows.frame.mean


def _tree(n: int, ids: np.ndarray, rows: np.ndarray, labels: np.ndarray, metric: str) -> ClusterTree:
    k = int(labels.max()) + 1
    inside = labels >= 0
    sums = np.zeros((k, rows.shape[1]))
    np.add.at(sums, labels[inside], rows[inside])
    centroids = sums / np.bincount(labels[inside], minlength=k)[:, None]
    if metric == "cosine":
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    parent = np.full(n, EXCLUDED, np.int64)
    parent[ids] = labels
    distance = np.full(n, np.nan, np.float32)
    distance[ids[inside]] = np.linalg.norm(rows[inside] - centroids[labels[inside]], axis=1)
    return ClusterTree({1: centroids}, {1: parent}, distance, metric=metric)
