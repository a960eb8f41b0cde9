"""A balanced selection from a cluster tree: hierarchical and flat sampling (arXiv 2405.15613).

The target is divided among clusters by water-filling (`curated_data.selection.quotas`), and each lowest
cluster gives its quota. The cost is a few sorts of the pool for any number of clusters.
"""

import logging
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from curated_data.checks import check_choice, whole_number
from curated_data.clustering.tree import ClusterTree
from curated_data.matrix import unit
from curated_data.selection.quotas import Quotas, flat_quotas, tree_quotas

log = logging.getLogger(__name__)

Strategy = Literal["random", "closest", "furthest"]
Keys = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Ids of some samples, their clusters, and their keys; block by block, in the order of ids."""
_BLOCK = 1 << 21  # samples processed at once


def hierarchical_sample(
    tree: ClusterTree,
    target_size: int,
    *,
    strategy: Strategy = "random",
    max_repeats: int = 1,
    seed: int = 0,
    embeddings: np.ndarray | None = None,
    quotas: Quotas | None = None,
) -> np.ndarray:
    """Select samples top down: the clusters of each level share their parent's target by water-filling.

    Args:
        tree: a cluster tree over n samples; excluded ones (parent -1) are never selected.
        target_size: number of ids to return. If the tree has fewer, all are returned and a warning is logged.
        strategy: which members to take from a lowest cluster: `random` ones, or those `closest` to or
            `furthest` from its centroid.
        max_repeats: how often a sample may be selected. A cluster that must give more samples than it has is
            taken as a whole as often as possible, and the rest by the strategy (the paper's multiplier).
        seed: for the draws; equal arguments give equal ids.
        embeddings: (n, d) the clustered rows, for a tree by cosine normalised or not; only needed by
            `closest` and `furthest` if the tree has no `distance`.
        quotas: how clusters share, if not evenly.

    Returns:
        int64 ids in ascending order, with repeats; exactly min(target_size, max_repeats * samples in the
        tree) of them, or as many as caps allow.

    Raises:
        ValueError: an argument is out of range, or distances are needed but not available.

    Examples:
        >>> import numpy as np
        >>> from curated_data import Level, hierarchical_kmeans, hierarchical_sample
        >>> rows = np.concatenate([np.zeros((900, 2)), np.full((100, 2), 8.0)])
        >>> rows += np.random.default_rng(0).normal(size=rows.shape)
        >>> tree = hierarchical_kmeans(rows, [Level(2)])
        >>> ids = hierarchical_sample(tree, 150)
        >>> int((ids < 900).sum()), int((ids >= 900).sum())
        (75, 75)
    """
    _check(target_size, strategy, max_repeats, seed)
    sizes = tree.sizes(1)
    target_size = attainable(target_size, int(tree.sizes(tree.n_levels).sum()), max_repeats)
    # More repeats are of no use, and the products below must fit int64.
    max_repeats = max(min(max_repeats, target_size), 1)
    rng = np.random.default_rng(seed)
    quota = tree_quotas(tree, target_size, sizes * max_repeats, rng, quotas)
    warn_of_limits(quota, target_size)
    distance = None if strategy == "random" else distances(tree, 1, embeddings)
    return _draw(tree.parent[1], quota, sizes, strategy, distance, rng)


def flat_sample(
    tree: ClusterTree,
    target_size: int,
    *,
    level: int | None = None,
    strategy: Strategy = "random",
    max_repeats: int = 1,
    seed: int = 0,
    embeddings: np.ndarray | None = None,
    quotas: Quotas | None = None,
) -> np.ndarray:
    """Select the same number of samples from every cluster of one level; smaller clusters give all they have.

    Args:
        level: whose clusters share the target; None for that of `quotas`, or the lowest, 1. `closest` and
            `furthest` use distances to the centroids of this level: `tree.distance` for level 1, `embeddings`
            for others.

    The other arguments, the result and the errors are as for `hierarchical_sample`.

    Examples:
        >>> import numpy as np
        >>> from curated_data import Level, hierarchical_kmeans, flat_sample
        >>> rows = np.concatenate([np.zeros((900, 2)), np.full((100, 2), 8.0)])
        >>> rows += np.random.default_rng(0).normal(size=rows.shape)
        >>> tree = hierarchical_kmeans(rows, [Level(2)])
        >>> ids = flat_sample(tree, 150)
        >>> int((ids < 900).sum()), int((ids >= 900).sum())
        (75, 75)
    """
    _check(target_size, strategy, max_repeats, seed)
    level = (1 if quotas is None else quotas.level) if level is None else level
    if level not in tree.centroids:
        raise ValueError(f"level={level!r}: the tree has levels 1 to {tree.n_levels}")
    sizes = tree.sizes(level)
    target_size = attainable(target_size, int(sizes.sum()), max_repeats)
    max_repeats = max(min(max_repeats, target_size), 1)
    rng = np.random.default_rng(seed)

    quota = flat_quotas(sizes, target_size, sizes * max_repeats, rng, quotas)
    warn_of_limits(quota, target_size)
    distance = None if strategy == "random" else distances(tree, level, embeddings)
    return _draw(tree.assignment(level), quota, sizes, strategy, distance, rng)


def _draw(
    cluster: np.ndarray,
    quota: np.ndarray,
    sizes: np.ndarray,
    strategy: Strategy,
    distance: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Ids that fill each cluster's quota: whole copies of the cluster, then the rest by the strategy.

    cluster: (n,) of each sample, -1 for none; quota, sizes: (k,).
    """
    whole, rest = np.divmod(quota, np.maximum(sizes, 1))
    taken = [np.empty(0, np.int64)]
    if whole.any():
        taken += [np.repeat(held, whole[group]) for held, group in _blocks(cluster)]
    # From a cluster taken in part, take the members with the smallest 32-bit keys.
    if distance is None:
        taken.append(_smallest(_random_keys(cluster, rest, sizes, rng), rest))
    else:
        for low, high in _bands(np.where(rest > 0, sizes, 0)):
            taken.append(_smallest(_distance_keys(cluster, rest, low, high, distance, strategy), rest))
    ids = np.sort(np.concatenate(taken))
    if len(ids) < quota.sum():
        raise RuntimeError("a random draw beyond ten standard deviations: sample with another seed")
    return ids


def _random_keys(cluster: np.ndarray, rest: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> Keys:
    """Random keys, of those samples alone that may have the smallest: enough by ten standard deviations."""
    likely = (rest + 10 * np.sqrt(rest) + 30) / np.maximum(sizes, 1)
    for held, group in _blocks(cluster):
        key = rng.integers(1 << 32, size=len(held), dtype=np.uint32)
        tried = (rest[group] > 0) & (key < likely[group] * 2.0**32)
        yield held[tried], group[tried], key[tried]


def _distance_keys(
    cluster: np.ndarray, rest: np.ndarray, low: int, high: int, distance: np.ndarray, strategy: Strategy
) -> Keys:
    """Keys that sort like distances, or like their reverse, of clusters `low` to `high`."""
    for held, group in _blocks(cluster, low, high):
        tried = rest[group] > 0
        held, group = held[tried], group[tried]
        # The bit patterns of non-negative floats sort like the floats.
        key = np.maximum(distance[held], 0, dtype=np.float32).view(np.uint32)
        yield held, group, key if strategy == "closest" else ~key


def _smallest(parts: Keys, rest: np.ndarray) -> np.ndarray:
    """The ids with the smallest keys of each cluster, `rest` (k,) of them, in no order; the first on ties."""
    found = [(held, group.astype(np.uint64) << np.uint64(32) | key) for held, group, key in parts]
    if not found:
        return np.empty(0, np.int64)
    ids, keys = (np.concatenate(column) for column in zip(*found))
    del found
    order = np.argsort(keys, kind="stable")
    group = (keys[order] >> np.uint64(32)).astype(np.int64)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    place = np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))
    return ids[order[place < rest[group]]]


def _blocks(cluster: np.ndarray, low: int = 0, high: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """The samples in clusters from `low` up to `high`, all by default, and their clusters; in blocks."""
    for first in range(0, len(cluster), _BLOCK):
        part = cluster[first : first + _BLOCK]
        held = np.flatnonzero(part >= low if high is None else (part >= low) & (part < high))
        yield held + first, part[held]


def _bands(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of clusters with a few blocks of samples each, or a sixteenth of all: each is a pass over the
    pool, and what is sorted at once.
    """
    most = max(2 * _BLOCK, int(sizes.sum()) // 16)
    ends = np.cumsum(sizes)
    low = 0
    while low < len(sizes) and ends[-1] > (ends[low - 1] if low else 0):
        high = int(np.searchsorted(ends, (ends[low - 1] if low else 0) + most, side="right"))
        yield low, max(high, low + 1)
        low = max(high, low + 1)


def distances(
    tree: ClusterTree, level: int, embeddings: np.ndarray | None, block: int = 65_536
) -> np.ndarray:
    """(n,) float32 distance of each sample to its centroid of `level`, or its square, which sorts alike."""
    if embeddings is None:
        if level == 1 and tree.distance is not None:
            return tree.distance
        raise ValueError(
            f"this strategy needs distances to the centroids of level {level}, which the tree does not hold: "
            "give embeddings=, or use strategy='random'"
        )
    cluster = tree.assignment(level)
    if len(embeddings) != len(cluster):
        raise ValueError(f"embeddings have {len(embeddings)} rows, the tree {len(cluster)} samples")
    centroids = np.asarray(tree.centroids[level], np.float32)
    distance = np.full(len(cluster), np.inf, np.float32)
    is_cosine = np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-3)  # then all centroids are unit
    for first in range(0, len(cluster), block):
        part = np.s_[first : first + block]
        held = cluster[part] >= 0
        rows = np.asarray(embeddings[part])[held].astype(np.float32)
        if is_cosine:
            rows = unit(rows)
        rows -= centroids[cluster[part][held]]
        distance[part][held] = np.einsum("nd,nd->n", rows, rows)
    return distance


def warn_of_limits(quota: np.ndarray, target_size: int) -> None:
    """Log if caps and weights leave less than the target."""
    if quota.sum() < target_size:
        log.warning(
            "target_size=%d is more than the quotas allow; selecting %d samples: raise `cap`, or the weights "
            "that are 0",
            target_size, quota.sum(),
        )  # fmt: skip


def attainable(target_size: int, n_samples: int, max_repeats: int) -> int:
    """The target, or what so many samples give if that is less, with a warning."""
    capacity = n_samples * max_repeats
    if target_size > capacity:
        log.warning(
            "target_size=%d is more than the tree gives: %d samples, each at most %d times; selecting all %d",
            target_size, n_samples, max_repeats, capacity,
        )  # fmt: skip
    return min(target_size, capacity)


def _check(target_size: int, strategy: str, max_repeats: int, seed: int) -> None:
    whole_number("target_size", target_size, 0)
    whole_number("max_repeats", max_repeats, 1)
    whole_number("seed", seed, 0)
    check_choice("strategy", strategy, get_args(Strategy))
