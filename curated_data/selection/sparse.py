"""A selection that takes more of what lies alone, without a balance over clusters.

Each sample has a weight by the distance to its nearest neighbour: those that have one at the usual distance
or nearer weigh alike, those that lie alone weigh more. Clusters only bound the neighbourhoods, and keep small
outlying ones, which are junk more often than rare classes, from taking the selection over.
"""

import itertools
import logging
from collections.abc import Iterator

import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.matrix import Matrix, read_rows

log = logging.getLogger(__name__)

BOOST = 2.5
"""log of the weight of a sample whose log distance is one standard deviation above the median."""
LOG_MOST = 4.0
"""log of the largest weight."""
SHARE = 0.5
"""0: a cluster gives by the weights of its samples; 1: by its size alone."""
NEAREST = 0.01
"""Distances below this part of the median are those of copies, and all the same."""
BUDGET = 1 << 26
"""Bytes of rows that are read at once."""
CELL = 4096
"""Members of a cluster that are compared with each other at once; larger clusters are cut in halves."""


def neighbour_distances(x: Matrix, tree: ClusterTree, budget: int = BUDGET) -> np.ndarray:
    """(n,) float32: the distance of each sample to its nearest neighbour in its lowest cluster.

    Rows are brought to norm 1. A sample that is alone in its cluster has the largest distance of all, one
    that the tree excludes has NaN.

    Args:
        x: (n, d) the clustered rows.
        tree: its clusters of level 1 are the neighbourhoods; one of more than 4096 members is halved, along
            the coordinate of most variance, until the parts have no more.
        budget: bytes of float32 rows to read at once, though never less than a cluster; three copies of them
            are held.
    """
    cluster = np.asarray(tree.parent[1])
    distance = np.full(len(cluster), np.nan, np.float32)
    order = np.argsort(cluster, kind="stable")
    order = order[np.searchsorted(cluster[order], 0) :]
    ends = np.cumsum(np.bincount(cluster[order], minlength=len(tree.centroids[1])))
    most = max(1, budget // (4 * x.shape[1]))
    for first, last in _runs(ends, most):
        start = int(ends[first - 1]) if first else 0
        ids = np.sort(order[start : ends[last - 1]])
        rows = read_rows(x, ids).cpu().numpy().astype(np.float32, copy=False)  # a copy in any case
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        np.divide(rows, norms, out=rows, where=norms > 0)
        place = np.argsort(cluster[ids], kind="stable")
        bounds = np.searchsorted(cluster[ids][place], np.arange(first, last + 1))
        for low, high in itertools.pairwise(bounds):
            for cell in _cells(rows, place[low:high]):
                distance[ids[cell]] = _nearest_within(rows[cell])
    found = distance[np.isfinite(distance)]
    distance[np.isinf(distance)] = found.max() if len(found) else 0
    return distance


def sparse_weights(distance: np.ndarray, tree: ClusterTree) -> np.ndarray:
    """(n,) float64 weights of the samples from `neighbour_distances`; 0 for those that the tree excludes.

    The log distance above its median, in standard deviations of the pool, gives the log of a weight. The
    weights of a cluster are then divided by the root of their mean.
    """
    cluster = np.asarray(tree.parent[1])
    weight = np.zeros(len(cluster))
    kept = cluster >= 0
    apart = distance[kept][distance[kept] > 0]
    if not len(apart):
        weight[kept] = 1
        return weight
    level = np.log(np.maximum(distance[kept], NEAREST * np.median(apart)), dtype=np.float64)
    level -= np.median(level)
    deviation = level.std()
    steps = level / deviation if deviation > 0 else level
    found = np.exp(np.clip(BOOST * steps, 0, LOG_MOST))
    size = np.bincount(cluster[kept])
    mean = np.bincount(cluster[kept], weights=found) / np.maximum(size, 1)
    weight[kept] = found / mean[cluster[kept]] ** SHARE
    return weight


def sparse_sample(
    tree: ClusterTree, distance: np.ndarray, target_size: int, *, max_repeats: int = 1, seed: int = 0
) -> np.ndarray:
    """Select samples with probabilities by `sparse_weights`, spread evenly over the clusters.

    Args:
        tree: over n samples; excluded ones are never selected.
        distance: (n,) from `neighbour_distances`.
        target_size: number of ids to return. If the tree has fewer, all are returned and a warning is logged.
        max_repeats: how often a sample may be selected.
        seed: for the draw; equal arguments give equal ids.

    Returns:
        int64 ids in ascending order, with repeats; exactly min(target_size, max_repeats * samples in the
        tree) of them.
    """
    weight = sparse_weights(distance, tree)
    ids = np.flatnonzero(weight > 0)
    capacity = len(ids) * max_repeats
    if target_size > capacity:
        log.warning(
            "target_size=%d is more than the tree gives: %d samples, each at most %d times; selecting all %d",
            target_size, len(ids), max_repeats, capacity,
        )  # fmt: skip
    target_size = min(target_size, capacity)
    if not target_size:
        return np.empty(0, np.int64)
    expected = _expected(weight[ids], target_size, max_repeats)
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(ids)), tree.parent[1][ids]))
    # One systematic pass over the clusters: each gives its expected number, rounded up or down.
    steps = np.cumsum(expected[order])
    marks = np.floor(steps * (target_size / steps[-1]) + rng.random())
    times = np.diff(np.minimum(marks, target_size), prepend=0).astype(np.int64)
    times[-1] += target_size - times.sum()
    return np.sort(np.repeat(ids[order], times))


def _expected(weight: np.ndarray, total: int, most: int) -> np.ndarray:
    """How often each is drawn on average: in proportion to its weight, at most `most` times."""
    order = np.argsort(-weight, kind="stable")
    left = np.cumsum(weight[order][::-1])[::-1]  # of this and all lighter ones
    scale = (total - most * np.arange(len(order))) / left  # if all heavier ones are drawn `most` times
    is_full = scale * weight[order] > most
    n_full = len(order) if is_full.all() else int(np.argmin(is_full))
    share = np.full(len(order), float(most))
    if n_full < len(order):
        share[n_full:] = scale[n_full] * weight[order][n_full:]
    expected = np.empty(len(order))
    expected[order] = share
    return expected


def _runs(ends: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of clusters with at most `most` members together, or of one cluster."""
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield first, last
        first = last


def _cells(rows: np.ndarray, members: np.ndarray) -> Iterator[np.ndarray]:
    if len(members) <= CELL:
        if len(members):
            yield members
        return
    values = rows[members]
    values = values[:, np.argmax(values.var(axis=0))]
    order = np.argsort(values, kind="stable")
    for half in np.array_split(members[order], 2):
        yield from _cells(rows, half)


def _nearest_within(rows: np.ndarray, block: int = 1024) -> np.ndarray:
    """(m,) float32 distance of each row of norm 1 to its nearest other; infinite for a single row."""
    nearest = np.full(len(rows), -np.inf, np.float32)
    for first in range(0, len(rows), block):
        cosine = rows[first : first + block] @ rows.T
        cosine[np.arange(len(cosine)), first + np.arange(len(cosine))] = -np.inf
        nearest[first : first + block] = cosine.max(axis=1)
    return np.sqrt(np.maximum(2 - 2 * nearest, 0))
