"""What a configuration selects from a tree: its selection, and the smaller ones inside it."""

import logging
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig
from curated_data.matrix import Matrix
from curated_data.selection.greedy import greedy_order
from curated_data.selection.included import with_included
from curated_data.selection.nested import nested_sample
from curated_data.selection.quotas import Quotas
from curated_data.selection.retrieval import Retrieved
from curated_data.selection.retrieved import first_retrieved
from curated_data.selection.sampling import Strategy, flat_sample, hierarchical_sample
from curated_data.selection.sparse import find_neighbours, sparse_sample

log = logging.getLogger(__name__)

Draw = Callable[[int, np.ndarray | None], np.ndarray]
"""A number of ids, ascending, from the whole tree or from a larger selection of the same draw."""


def sizes_of(config: CurationConfig) -> list[int]:
    """The target size, then those of the nested selections, the largest first."""
    return [config.target_size, *sorted(set(config.nested_sizes), reverse=True)]


def first_of(config: CurationConfig, valid: np.ndarray, found: Retrieved | None = None) -> np.ndarray:
    """The samples that are selected in any case: those to include, then those retrieved, the best first.

    Args:
        config: with ids alone in `include`.
        valid: (n,) bool, the samples that have an embedding; others are not selected.
        found: what was retrieved, if anything.

    Returns:
        (k,) int64.
    """
    included = np.array(config.include, np.int64)
    first = included[valid[included]]
    if len(first) < len(included):
        n_lost = len(included) - len(first)
        log.warning("include: %d samples are not selected, since they could not be embedded", n_lost)
    if found is None:
        return first
    first = np.concatenate([first, found.ids[first_retrieved(found)]])
    first = first[np.sort(np.unique(first, return_index=True)[1])]
    if len(first) > config.target_size:
        log.warning(
            "retrieval: %d samples are more than target_size, %d; those of the lowest ranks stay",
            len(first), config.target_size,
        )  # fmt: skip
    return first


def draw_all(
    tree: ClusterTree, x: Matrix, config: CurationConfig, first: np.ndarray, quotas: Quotas | None
) -> list[np.ndarray]:
    """Draw a selection of each of `sizes_of`, inside the one before it.

    Args:
        tree: over n samples.
        x: (n, d) the clustered rows, for distances and neighbours.
        config: from `load_config`.
        first: from `first_of`; a smaller selection has the first of them.
        quotas: of the clusters; None lets the sampling decide.

    Returns:
        int64 ids in ascending order, with repeats if `max_repeats` > 1.
    """
    ways = {"sparse": sparse_draw, "greedy": greedy_draw, "flat": tree_draw, "hierarchical": tree_draw}
    assert config.sampling is not None, "set by `load_config`"
    draw = ways[config.sampling](tree, x, config, quotas)
    drawn: list[np.ndarray] = []
    for size in sizes_of(config):
        ids = draw(size, drawn[-1] if drawn else None)
        drawn.append(with_included(tree, ids, np.sort(first[:size]), size, seed=config.seed))
    return drawn


def sparse_draw(tree: ClusterTree, x: Matrix, config: CurationConfig, quotas: Quotas | None) -> Draw:
    """`sparse_sample` with the neighbours found once."""
    near = find_neighbours(x, tree)
    how: dict[str, Any] = {"max_repeats": config.max_repeats, "seed": config.seed, "quotas": quotas}
    return lambda size, within: sparse_sample(tree, near, size, within=within, **how)


def greedy_draw(tree: ClusterTree, x: Matrix, config: CurationConfig, quotas: Quotas | None) -> Draw:
    """The first of `greedy_order`, which is found once; it takes no quotas."""
    order = greedy_order(x, tree, config.target_size)

    def draw(size: int, within: np.ndarray | None) -> np.ndarray:
        if within is None:
            return np.sort(order[:size])
        # What is in the larger selection for another reason comes last.
        ranked = np.concatenate([order[np.isin(order, within)], np.setdiff1d(within, order)])
        return np.sort(ranked[:size])

    return draw


def tree_draw(tree: ClusterTree, x: Matrix, config: CurationConfig, quotas: Quotas | None) -> Draw:
    """`hierarchical_sample` or `flat_sample`, and `nested_sample` inside it."""
    is_flat = config.sampling == "flat"
    strategy = cast(Strategy, config.strategy)  # one of them, by `load_config`
    how: dict[str, Any] = {"seed": config.seed, "quotas": quotas, "strategy": strategy}
    if is_flat and quotas is not None and quotas.level > 1:
        how["embeddings"] = x  # the tree has no distances to the centroids of that level
    sample = flat_sample if is_flat else hierarchical_sample

    def draw(size: int, within: np.ndarray | None) -> np.ndarray:
        if within is None:
            return sample(tree, size, max_repeats=config.max_repeats, **how)
        return nested_sample(tree, within, size, flat=is_flat, **how)

    return draw
