"""Hierarchical sampling by plain recursion, one call per cluster, and a check of any selection, node by node.

Written from the method's description alone: no array code is shared with the package.
"""

import random
from collections import Counter


class Nodes:
    """Children of every cluster as lists, from parent arrays {level: parent of each node of level - 1}."""

    def __init__(self, parent, n_clusters):
        self.top = max(parent)
        self.children = {level: [[] for _ in range(n_clusters[level])] for level in parent}
        for level in parent:
            for node, cluster in enumerate(parent[level]):
                if cluster >= 0:
                    self.children[level][cluster].append(node)

    def samples(self, level, cluster):
        if level == 0:
            return [cluster]
        return [s for child in self.children[level][cluster] for s in self.samples(level - 1, child)]


def shares(target, capacities):
    """Each child's share as (lowest, highest): they differ by one where the remainder is drawn."""
    cut = 0
    while cut < max(capacities, default=0) and sum(min(cut + 1, c) for c in capacities) <= target:
        cut += 1
    left = target - sum(min(cut, c) for c in capacities)
    above = sum(c > cut for c in capacities)
    return [(min(cut, c), min(cut, c) + (c > cut and left > 0)) for c in capacities], min(left, above)


def sample(nodes, target, *, max_repeats=1, distance=None, sign=1, seed=0):
    """Ids of a hierarchical sample; random without `distance`, else closest (sign 1) or furthest (-1)."""
    generator = random.Random(seed)
    chosen = []

    def descend(level, children, t):
        capacities = [len(nodes.samples(level, c)) * max_repeats for c in children]
        bounds, left = shares(t, capacities)
        open_ = [i for i, (low, high) in enumerate(bounds) if high > low]
        lucky = set(generator.sample(open_, left)) if left else set()
        for i, child in enumerate(children):
            give = bounds[i][0] + (i in lucky)
            if give == 0:
                continue
            if level > 1:
                descend(level - 1, nodes.children[level][child], give)
            else:
                members = nodes.children[1][child]
                whole, rest = divmod(give, len(members))
                chosen.extend(members * whole)
                if distance is None:
                    chosen.extend(generator.sample(members, rest))
                else:
                    chosen.extend(sorted(members, key=lambda s: (sign * distance[s], s))[:rest])

    top = list(range(len(nodes.children[nodes.top])))
    descend(nodes.top, top, min(target, sum(len(nodes.samples(nodes.top, c)) for c in top) * max_repeats))
    return sorted(chosen)


def check(nodes, ids, target, *, max_repeats=1, distance=None, sign=1):
    """Raise AssertionError unless `ids` is a result that hierarchical sampling could have given."""
    taken = Counter(int(i) for i in ids)
    total = len(ids)
    top = list(range(len(nodes.children[nodes.top])))
    capacity = sum(len(nodes.samples(nodes.top, c)) for c in top) * max_repeats
    assert total == min(target, capacity), f"{total} ids, expected {min(target, capacity)}"

    def descend(level, children, t):
        members = [nodes.samples(level, c) for c in children]
        given = [sum(taken[s] for s in m) for m in members]
        bounds, left = shares(t, [len(m) * max_repeats for m in members])
        assert sum(given) == t
        for number, (low, high) in zip(given, bounds):
            assert low <= number <= high, f"level {level}: gave {number}, water-filling gives {low}..{high}"
        assert sum(number > low for number, (low, _) in zip(given, bounds)) == left
        for child, number in zip(children, given):
            if level > 1:
                descend(level - 1, nodes.children[level][child], number)
            elif number:
                check_leaf(nodes.children[1][child], number)

    def check_leaf(members, number):
        whole, rest = divmod(number, len(members))
        extra = [s for s in members if taken[s] == whole + 1]
        assert all(taken[s] in (whole, whole + 1) for s in members)
        assert len(extra) == rest
        if distance is not None:
            assert sorted(extra) == sorted(sorted(members, key=lambda s: (sign * distance[s], s))[:rest])

    descend(nodes.top, top, total)
