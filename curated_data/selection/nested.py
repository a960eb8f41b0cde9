"""Smaller selections inside a larger one, with the quotas that they would have by themselves."""

import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.selection.quotas import Quotas, flat_quotas, tree_quotas
from curated_data.selection.sampling import Strategy, distances


def nested_sample(
    tree: ClusterTree,
    ids: np.ndarray,
    target_size: int,
    *,
    flat: bool = False,
    strategy: Strategy = "random",
    seed: int = 0,
    embeddings: np.ndarray | None = None,
    quotas: Quotas | None = None,
) -> np.ndarray:
    """Select from a selection of `hierarchical_sample` or `flat_sample`, by the same quotas.

    Args:
        tree: of the pool.
        ids: (l,) int64, ascending, the larger selection, with repeats.
        target_size: number of ids to return; if there are fewer, all are returned.
        flat: the selection is one of `flat_sample`, on the level of `quotas`, or the lowest.
        strategy, seed, embeddings, quotas: as for `hierarchical_sample`.

    Returns:
        int64 ids in ascending order, none more often than in `ids`.

    Examples:
        >>> import numpy as np
        >>> from curated_data import Level, hierarchical_kmeans, hierarchical_sample
        >>> from curated_data.selection.nested import nested_sample
        >>> rows = np.random.default_rng(0).normal(size=(1000, 4))
        >>> tree = hierarchical_kmeans(rows, [Level(20)])
        >>> large = hierarchical_sample(tree, 200)
        >>> small = nested_sample(tree, large, 40)
        >>> len(small), bool(np.isin(small, large).all())
        (40, True)
    """
    level = 1 if quotas is None or not flat else quotas.level
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0x4E, target_size)))
    cluster, sizes = tree.assignment(level, ids), tree.sizes(level)
    held = np.bincount(cluster, minlength=len(sizes))
    if flat:
        quota = flat_quotas(sizes, target_size, held, rng, quotas)
    else:
        quota = tree_quotas(tree, target_size, held, rng, quotas)
    # Of each cluster's ids those come first that no copy of theirs precedes.
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    copy = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
    if strategy == "random":
        key = rng.random(len(ids))
    else:
        key = distances(tree, level, embeddings)[ids]
        key = key if strategy == "closest" else -key
    order = np.lexsort((key, copy, cluster))
    place = np.arange(len(ids)) - (np.cumsum(held) - held)[cluster[order]]
    return np.sort(ids[order[place < quota[cluster[order]]]])
