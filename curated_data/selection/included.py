"""Samples that are selected whatever the draw says, within the quotas of their clusters."""

import numpy as np

from curated_data.clustering.tree import EXCLUDED, ClusterTree


def with_included(
    tree: ClusterTree, ids: np.ndarray, included: np.ndarray, target_size: int, *, seed: int = 0
) -> np.ndarray:
    """A selection of the same size that holds certain samples.

    Each takes the place of a random selected sample of its lowest cluster, or, where that has none left, of
    the smallest cluster above that has one, or of any.

    Args:
        tree: of the pool.
        ids: (m,) int64, the selection, which may have repeats.
        included: (k,) int64, ascending and unique, at most `target_size`.
        target_size: up to which a selection may grow if nothing is left to be replaced.
        seed: for the draw of those replaced.

    Returns:
        Ascending ids.
    """
    waiting = np.setdiff1d(included, ids)
    if not len(waiting):
        return ids
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0x1C)))
    ids = rng.permutation(ids)
    is_free = ~np.isin(ids, included)
    for level in range(1, tree.n_levels + 2):
        free = np.flatnonzero(is_free)
        top = level > tree.n_levels
        of_waiting = np.zeros(len(waiting), np.int64) if top else tree.assignment(level, waiting)
        of_free = np.zeros(len(free), np.int64) if top else tree.assignment(level, ids[free])
        first, second = _pairs(of_waiting, of_free)
        ids[free[second]] = waiting[first]
        is_free[free[second]] = False
        waiting = np.delete(waiting, first)
    return np.sort(np.concatenate([ids, waiting[: max(0, target_size - len(ids))]]))


def _pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in both of members of the same clusters, as many as there are of each; none of `EXCLUDED`."""
    place_of: dict[tuple[int, int, int], int] = {}
    ranked: list[list[tuple[int, int]]] = []
    for number, clusters in enumerate((first, second)):
        order = np.argsort(clusters, kind="stable")
        of = clusters[order]
        rank = np.arange(len(of)) - np.searchsorted(of, of)  # within its cluster
        ranked.append(list(zip(of.tolist(), rank.tolist(), strict=True)))
        place_of |= {(number, *pair): place for pair, place in zip(ranked[-1], order.tolist(), strict=True)}
    both = [pair for pair in ranked[0] if pair[0] != EXCLUDED and (1, *pair) in place_of]
    mine, theirs = (np.array([place_of[number, *pair] for pair in both], np.int64) for number in (0, 1))
    return mine, theirs
