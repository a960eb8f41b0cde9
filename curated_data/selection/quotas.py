"""How many samples each cluster gives: a target divided by water-filling, evenly or by weights, with caps.

A node that has to give t samples divides them among its children: every child gives the same number, the cut,
except those with fewer samples, which give all. With weights, a child gives the cut times its weight. A whole
level is filled at once, on arrays, so the cost is a few sorts of the clusters.
"""

from dataclasses import dataclass

import numpy as np

from curated_data.clustering.tree import ClusterTree

_ROUNDING = 1e-9  # more than a share can be wrong by, as a part of it


@dataclass(frozen=True)
class Quotas:
    """What a cluster's quota depends on besides its samples.

    Attributes:
        temperature: quotas are proportional to size ** temperature: 0 is even, 1 as in the pool; None is what
            the sampling does by itself.
        cap: the most samples of a cluster of `level`, repeats included; below 1, as a share of the target, at
            least one sample. None for no limit.
        weights: (k,) of the clusters of `level`, by which their quotas are multiplied; 0 gives none. None for
            1 each.
        level: of the tree, from 1, the lowest.
    """

    temperature: float | None = None
    cap: float | None = None
    weights: np.ndarray | None = None
    level: int = 1

    def limited(self, level: int, capacity: np.ndarray, target_size: int) -> np.ndarray:
        """The most that clusters of a level may give, (k,) int64, of what they could."""
        if level != self.level:
            return capacity
        if self.cap is not None:
            most = int(self.cap) if self.cap >= 1 else max(1, int(self.cap * target_size))
            capacity = np.minimum(capacity, most)
        return capacity if self.weights is None else np.where(self.weights > 0, capacity, 0)

    def weight(self, level: int, sizes: np.ndarray) -> np.ndarray | None:
        """(k,) of the clusters of a level; None if all are the same.

        Args:
            sizes: (k,) their samples in the pool.
        """
        own = None if self.weights is None or level != self.level else self.weights
        if not self.temperature:
            return own
        by_size = np.maximum(sizes, 1).astype(np.float64) ** self.temperature
        return by_size if own is None else by_size * own


def tree_quotas(
    tree: ClusterTree,
    target_size: int,
    capacity: np.ndarray,
    rng: np.random.Generator,
    quotas: Quotas | None = None,
) -> np.ndarray:
    """The quota of every lowest cluster: the clusters of each level share their parent's.

    Args:
        tree: a cluster tree.
        target_size: to be divided.
        capacity: (k_1,) int64, what each lowest cluster can give.
        rng: for remainders.
        quotas: None for even ones without a cap.

    Returns:
        (k_1,) int64, which add up to the target, or to all that capacities and caps allow.
    """
    rules = quotas or Quotas()
    limits: list[np.ndarray] = []
    for level in range(1, tree.n_levels + 1):
        if level > 1:
            capacity = _by_parent(tree.parent[level], limits[-1], len(tree.centroids[level]))
        limits.append(rules.limited(level, capacity, target_size))
    quota = np.array([min(target_size, int(limits[-1].sum()))], np.int64)
    for level in range(tree.n_levels, 0, -1):
        k = len(tree.centroids[level])
        parent = tree.parent[level + 1] if level < tree.n_levels else np.zeros(k, np.int64)
        quota = water_fill(quota, limits[level - 1], parent, rng, rules.weight(level, tree.sizes(level)))
    return quota


def flat_quotas(
    sizes: np.ndarray,
    target_size: int,
    capacity: np.ndarray,
    rng: np.random.Generator,
    quotas: Quotas | None = None,
    base: np.ndarray | None = None,
) -> np.ndarray:
    """The quotas of clusters that share a target without regard to a tree, (k,) int64.

    Args:
        sizes: (k,) their samples in the pool.
        target_size: to be divided.
        capacity: (k,) int64, what each can give.
        rng: for remainders.
        quotas: whose `level` is that of the clusters.
        base: (k,) what quotas are proportional to without a temperature; None for even ones.
    """
    rules = quotas or Quotas()
    limit = rules.limited(rules.level, capacity, target_size)
    weight = rules.weight(rules.level, sizes)
    if rules.temperature is None and base is not None:
        weight = base if weight is None else base * weight
    target = np.array([min(target_size, int(limit.sum()))], np.int64)
    return water_fill(target, limit, np.zeros(len(sizes), np.int64), rng, weight)


def water_fill(
    target: np.ndarray,
    capacity: np.ndarray,
    parent: np.ndarray,
    rng: np.random.Generator,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Divide every node's target among its children as evenly as their capacities allow.

    For a node with target t the cut c is the largest number with sum(min(c * weight, capacity)) <= t over its
    children. Each child gets min(c * weight, capacity), rounded down, and the rest of t goes, one each, to
    random children with more capacity, with probabilities by what was cut off in rounding (Pareto sampling,
    Rosén 1997). With equal weights c is an integer.

    `rng` draws as many numbers whatever the target, and with equal weights remainders go to the same children
    first: then a larger target gives no child less.

    Args:
        target: (k,) int64, the total of each node.
        capacity: (m,) int64, the maximum of each child.
        parent: (m,) the node of each child, -1 for none.
        rng: to distribute remainders.
        weight: (m,) finite and at least 0; a child of weight 0 gets nothing. None for equal ones.

    Returns:
        (m,) int64, the share of each child: 0 without a parent. The shares of a node add up to
        min(target, capacity of its children).
    """
    share = np.zeros(len(capacity), np.int64)
    if weight is not None:
        capacity = np.where(weight > 0, capacity, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = np.where(weight > 0, capacity / weight, 0)  # the cut at which a child is exhausted
        order = np.lexsort((unit, parent))
    else:
        order = np.lexsort((capacity, parent))
    order = order[np.searchsorted(parent[order], 0) :]
    group = parent[order]
    wanted = target[group]
    height = np.minimum(capacity[order], wanted)  # a child never gives more than its parent's target

    count = np.bincount(group, minlength=len(target))
    start = _exclusive_cumsum(count)
    below = _exclusive_cumsum(height)
    below -= below[start[group]]  # total height of the lower children of the same parent
    # Children are sorted by exhaustion within their parent, so those that are covered come first.
    if weight is None:
        above = (start + count)[group] - np.arange(len(group))  # children at least as high, itself included
        covered = below + height * above <= wanted
    else:
        own = np.where(height > 0, weight[order], 0.0)
        most = np.zeros(len(target))
        np.maximum.at(most, group, own)
        own /= np.where(most > 0, most, 1)[group]  # so that sums over all groups lose no group's digits
        lower = _exclusive_cumsum(own)
        above = np.bincount(group, own, len(target))[group] - (lower - lower[start[group]])
        with np.errstate(divide="ignore", invalid="ignore"):
            covered = (height == 0) | (below + height / own * above <= wanted)
        covered &= below + height <= wanted  # where weights differ too much for the sums above
    chance = rng.random(len(capacity))[order]
    n_open = count - np.bincount(group[covered], minlength=len(target))
    left = target - _sum_by(group[covered], height[covered], len(target))
    drawn = np.flatnonzero(~covered)
    if weight is None:
        cut, remainder = np.divmod(np.where(n_open > 0, left, 0), np.maximum(n_open, 1))
        height = np.where(covered, height, cut[group])
        key = chance[drawn]
    else:
        per_weight = left / np.maximum(np.bincount(group[drawn], own[drawn], len(target)), 1e-300)
        exact = per_weight[group[drawn]] * own[drawn]
        whole = np.minimum((exact * (1 - _ROUNDING)).astype(np.int64), height[drawn] - 1)
        height[drawn] = whole
        remainder = np.where(n_open > 0, left - _sum_by(group[drawn], whole, len(target)), 0)
        part = np.clip(exact - whole, 1e-12, 1 - 1e-12)
        key = chance[drawn] / (1 - chance[drawn]) * (1 - part) / part
    drawn = drawn[np.lexsort((key, group[drawn]))]
    place = np.arange(len(drawn)) - _exclusive_cumsum(n_open)[group[drawn]]
    height[drawn[place < remainder[group[drawn]]]] += 1
    share[order] = height
    if weight is not None:  # what rounding has kept of a cut between weights that differ too much
        missing = np.minimum(target, _by_parent(parent, capacity, len(target)))
        missing -= _by_parent(parent, share, len(target))
        if missing.any():
            share += water_fill(missing, capacity - share, parent, rng)
    return share


def _by_parent(parent: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """(n,) int64 sums of the values of nodes by their parents."""
    inside = parent >= 0
    return _sum_by(parent[inside], values[inside], n)


def _exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    return np.cumsum(values) - values


def _sum_by(group: np.ndarray, values: np.ndarray, n_groups: int) -> np.ndarray:
    """(n_groups,) int64 sums of `values` by group; exact, unlike `bincount` with its float64 weights."""
    total = np.zeros(n_groups, np.int64)
    np.add.at(total, group, values)
    return total
