"""A selection that takes more of what lies alone, without a balance over clusters.

Three figures of a sample say how alone it is: the distance to its nearest neighbour, how many others have it
among their 16 nearest, and how many of its own 16 nearest return that. The distance follows the spread of a
concept as well as its size; the two counts compare a sample with its surroundings, whatever their scale.
Clusters only bound the neighbourhoods and spread the draw.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.matrix import Matrix, read_rows, unit
from curated_data.selection.quotas import Quotas, flat_quotas
from curated_data.selection.sampling import attainable, warn_of_limits

NEIGHBOURS = 16
"""How many nearest rows a row lists."""
LOG_LEAST, LOG_MOST = -3.0, 4.0
"""Bounds of the log of a weight; that of a sample one standard deviation above the median is 1."""
FURTHEST = 4.0
"""Standard deviations at which a single figure is cut off."""
NEAREST = 0.01
"""Distances below this part of the median are those of copies, and all the same."""
CELL = 2048
"""Rows compared with each other at once: those of clusters that lie together, or a part of one cluster."""
BLOCK = 8192
"""Rows that are read at once for their mean."""
_EQUAL = 1e-5  # cosines that differ by less are ties, which are listed all


@dataclass(frozen=True)
class Neighbours:
    """Figures of n samples; NaN for those that the tree excludes.

    Attributes:
        distance: (n,) float32, to the nearest neighbour, of rows of norm 1; alone in its cell: the largest.
        listed: (n,) float32, how many others of the cell have it among their 16 nearest.
        mutual: (n,) float32, how many of them it has among its own.
    """

    distance: np.ndarray
    listed: np.ndarray
    mutual: np.ndarray


def find_neighbours(x: Matrix, tree: ClusterTree) -> Neighbours:
    """`Neighbours` of each sample in its cell: clusters that lie together, of at most 2048 samples.

    Rows are brought to norm 1. The counts are by the cosine about the mean of these rows. A larger cluster is
    halved, along the coordinate of most variance, until the parts have no more than 2048.

    Args:
        x: (n, d) the clustered rows. One cluster, or 2048 rows, are held at once.
        tree: its clusters of level 1 are what cells are made of.
    """
    mean = mean_direction(x, tree)
    distance, listed, mutual = np.full((3, tree.n_samples), np.nan, np.float32)
    for ids, rows in cells(x, tree):
        distance[ids] = _nearest(rows)
        listed[ids], mutual[ids] = _counts(unit(rows - mean))
    found = distance[np.isfinite(distance)]
    distance[np.isinf(distance)] = found.max() if len(found) else 0
    return Neighbours(distance, listed, mutual)


def cells(x: Matrix, tree: ClusterTree) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The samples of each cell, and their rows, brought to norm 1; arguments as for
    `find_neighbours`.
    """
    cluster = np.asarray(tree.parent[1])
    size = np.bincount(cluster[cluster >= 0], minlength=len(tree.centroids[1]))
    order = np.argsort(cluster, kind="stable")[-size.sum() :] if size.any() else np.empty(0, np.int64)
    ends = np.cumsum(size)
    for group in _groups(np.asarray(tree.centroids[1], np.float32), np.arange(len(size)), size):
        ids = np.sort(np.concatenate([order[ends[c] - size[c] : ends[c]] for c in group]))
        rows = unit(read_rows(x, ids).cpu().numpy().astype(np.float32))
        for cell in _cells(rows, np.arange(len(ids))):
            yield ids[cell], rows[cell]


def mean_direction(x: Matrix, tree: ClusterTree) -> np.ndarray:
    """(d,) float32 mean of the rows of a tree, each of norm 1."""
    ids = np.flatnonzero(np.asarray(tree.parent[1]) >= 0)
    total = np.zeros(x.shape[1])
    for first in range(0, len(ids), BLOCK):
        rows = read_rows(x, ids[first : first + BLOCK]).cpu().numpy().astype(np.float32)
        total += unit(rows).sum(axis=0, dtype=np.float64)
    return (total / max(1, len(ids))).astype(np.float32)


def sparse_weights(neighbours: Neighbours, tree: ClusterTree) -> np.ndarray:
    """(n,) float64 weights of the samples; 0 for those that the tree excludes.

    The log of a weight is twice the log of the distance, less the log of 1 + `listed`, less `mutual`. Each of
    the three is in standard deviations of the pool above its median, and so is the sum, which is cut off at
    -3 and 4.
    """
    kept = np.asarray(tree.parent[1]) >= 0
    weight = np.zeros(len(kept))
    if kept.any():
        distance = neighbours.distance[kept].astype(np.float64)
        apart = distance[distance > 0]
        distance = np.log(np.maximum(distance, NEAREST * np.median(apart))) if len(apart) else distance
        counts = (
            np.log1p(neighbours.listed[kept], dtype=np.float64),
            neighbours.mutual[kept].astype(np.float64),
        )
        figures = [np.clip(_standard(figure), -FURTHEST, FURTHEST) for figure in (distance, *counts)]
        alone = _standard(2 * figures[0] - figures[1] - figures[2])
        weight[kept] = np.exp(np.clip(alone, LOG_LEAST, LOG_MOST))
    return weight


def sparse_sample(
    tree: ClusterTree,
    neighbours: Neighbours,
    target_size: int,
    *,
    max_repeats: int = 1,
    seed: int = 0,
    quotas: Quotas | None = None,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Select samples with probabilities by `sparse_weights`, spread evenly over the clusters.

    Args:
        tree: over n samples; excluded ones are never selected.
        neighbours: from `find_neighbours`.
        target_size: number of ids to return. If the tree has fewer, all are returned and a warning is logged.
        max_repeats: how often a sample may be selected.
        seed: for the draw; equal arguments give equal ids.
        quotas: of the clusters of its level; None lets them give what the weights of their samples say.
        within: (l,) int64, ascending, an earlier selection with the same arguments but a larger target, from
            which this one is drawn. A sample is then as likely as if this were drawn alone.

    Returns:
        int64 ids in ascending order, with repeats; exactly min(target_size, max_repeats * samples in the
        tree) of them, or as many as caps allow.
    """
    weight = sparse_weights(neighbours, tree)
    ids = np.flatnonzero(weight > 0)
    target_size = attainable(target_size, len(ids), max_repeats)
    if within is not None:
        target_size = min(target_size, len(within))
    if not target_size:
        return np.empty(0, np.int64)
    rng = np.random.default_rng(seed)
    # Without quotas all clusters are one group.
    group, k, quota = np.zeros(len(weight), np.int64), 1, np.array([target_size])
    if quotas is not None:
        group, k = tree.assignment(quotas.level), len(tree.centroids[quotas.level])
    sizes = np.bincount(group[ids], minlength=k)
    held = sizes * max_repeats if within is None else np.bincount(group[within], minlength=k)
    if quotas is not None:
        base = np.bincount(group[ids], weight[ids], k)
        quota = flat_quotas(sizes, target_size, held, rng, quotas, base)
        warn_of_limits(quota, target_size)
    chosen = [np.empty(0, np.int64)]
    members = _by_group(ids, group, k)
    earlier = None if within is None else _by_group(within, group, k)
    for number in np.flatnonzero(quota):
        own, total = members(number), int(quota[number])
        expected = _expected(weight[own], total, max_repeats)
        if earlier is not None:
            again = earlier(number)
            place = np.searchsorted(own, again)
            before = _expected(weight[own], int(held[number]), max_repeats)
            own, expected = again, _expected((expected / before)[place], total, 1)
        chosen.append(_systematic(own, expected, total, tree.parent[1][own], rng))
    return np.sort(np.concatenate(chosen))


def _systematic(
    ids: np.ndarray, expected: np.ndarray, total: int, cluster: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Ids that are drawn as often as expected, rounded up or down, and so are the sums of clusters."""
    order = np.lexsort((rng.random(len(ids)), cluster))
    steps = np.cumsum(expected[order])
    marks = np.floor(steps * (total / steps[-1]) + rng.random())
    times = np.diff(np.minimum(marks, total), prepend=0).astype(np.int64)
    times[-1] += total - times.sum()
    return np.repeat(ids[order], times)


def _by_group(ids: np.ndarray, group: np.ndarray, k: int) -> Callable[[int], np.ndarray]:
    """The ids of each group, in their order; `group` is of each sample."""
    order = np.argsort(group[ids], kind="stable")
    ends = np.cumsum(np.bincount(group[ids], minlength=k))
    return lambda number: ids[order[ends[number - 1] if number else 0 : ends[number]]]


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


def _groups(centroids: np.ndarray, clusters: np.ndarray, size: np.ndarray) -> Iterator[np.ndarray]:
    """Clusters that lie together, with at most `CELL` members, or one cluster; empty ones are left out."""
    clusters = clusters[size[clusters] > 0]
    if len(clusters) < 2 or size[clusters].sum() <= CELL:
        if len(clusters):
            yield clusters
        return
    values = centroids[clusters]
    clusters = clusters[np.argsort(values[:, np.argmax(values.var(axis=0))], kind="stable")]
    steps = np.cumsum(size[clusters])
    middle = int(np.clip(np.searchsorted(steps, steps[-1] / 2), 1, len(clusters) - 1))
    yield from _groups(centroids, clusters[:middle], size)
    yield from _groups(centroids, clusters[middle:], size)


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


def _standard(values: np.ndarray) -> np.ndarray:
    values = values - np.median(values)
    deviation = values.std()
    return values / deviation if deviation > 0 else values


def _nearest(rows: np.ndarray) -> np.ndarray:
    """(m,) distance of each row of norm 1 to its nearest other; infinite for a single row."""
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    return np.sqrt(np.maximum(2 - 2 * cosine.max(axis=1), 0))


def _counts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m,) how many list each row, and how many of those it lists; of ties for the last place all count."""
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -np.inf)
    if len(rows) <= NEIGHBOURS:
        every = np.full(len(rows), len(rows) - 1)
        return every, every
    last = -np.partition(-cosine, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]
    lists = cosine >= last[:, None] - _EQUAL
    return lists.sum(axis=0), (lists & lists.T).sum(axis=0)
