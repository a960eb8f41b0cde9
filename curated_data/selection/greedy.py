"""A selection that every sample has something near in: greedy facility location in cells of a tree.

The value of a selection is the sum over all samples of 1 + the cosine to the nearest selected one of their
cell. Samples are taken by how much they add to it, which gives at least 1 - 1/e of the most possible
(Nemhauser et al. 1978). Cells share nothing, so each is put in order by itself, and the gains are merged.
"""

import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.matrix import Matrix, unit
from curated_data.selection.sparse import cells, mean_direction


def greedy_order(x: Matrix, tree: ClusterTree, most: int) -> np.ndarray:
    """The first `most` samples by what they add, (m,) int64; those of a smaller selection come first.

    Args:
        x: (n, d) the clustered rows, which are brought to norm 1 and compared about their mean.
        tree: cells are made of its clusters of level 1, as for `find_neighbours`.
        most: samples; if the tree has fewer, all are returned.

    Examples:
        >>> import numpy as np
        >>> from curated_data import Level, hierarchical_kmeans
        >>> from curated_data.selection.greedy import greedy_order
        >>> rows = np.repeat(np.eye(3), [50, 30, 20], axis=0)
        >>> tree = hierarchical_kmeans(rows, [Level(1)], metric="cosine")
        >>> greedy_order(rows, tree, 3).tolist()  # one of each kind, the most frequent first
        [0, 50, 80]
    """
    ids, gains = [np.empty(0, np.int64)], [np.empty(0)]
    mean = mean_direction(x, tree)
    for cell, rows in cells(x, tree):
        rows = unit(rows - mean)
        order, gain = _order(rows @ rows.T, most)
        ids.append(cell[order])
        gains.append(gain)
    every = np.concatenate(ids)
    # Stable: gains of a cell fall, and its samples stay in their order.
    return every[np.argsort(-np.concatenate(gains), kind="stable")][:most]


def _order(cosine: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a cell, and what each adds to those before, which never rises; the first of equal ones.

    Gains only fall, so what was computed before is a bound, and most samples are not looked at again (Minoux
    1978).
    """
    n = len(cosine)
    nearest = np.full(n, -1.0, np.float32)
    bound = (cosine - nearest).sum(axis=1, dtype=np.float64)
    order, gains = np.empty(min(n, most), np.int64), np.empty(min(n, most))
    for place in range(len(order)):
        while True:
            best = int(bound.argmax())
            before = bound[best]
            bound[best] = np.maximum(cosine[best] - nearest, 0).sum(dtype=np.float64)
            if bound[best] == before:
                break
        order[place], gains[place] = best, bound[best]
        np.maximum(nearest, cosine[best], out=nearest)
        bound[best] = -1.0
    return order, np.minimum.accumulate(gains)
