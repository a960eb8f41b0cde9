"""Choose which rows stay, so that each one left out is linked to one that stays, and no two that stay are.

In the terms of graphs: a maximal independent set, which is a cover too, found greedily.
"""

import numpy as np

from curated_data.selection.links import LinkSearch


class Cover:
    """Decides for the rows of one pool, some of which may be known to stay.

    Args:
        search: finds links.
        size: (n,) how many samples a row stands for.
        prefer: (n,) numbers; of linked rows, the one with the larger stays. None decides by connections.

    Attributes:
        near: (n,) int64, for rows left out one that stays and is linked to it, -1 for all others.
    """

    def __init__(self, search: LinkSearch, size: np.ndarray, prefer: np.ndarray | None) -> None:
        self.search = search
        self.size = size
        self.prefer = prefer
        self.near = np.full(len(size), -1, np.int64)

    def decide(self, ids: np.ndarray, stay: np.ndarray) -> np.ndarray:
        """Decide for some rows, with others known to stay; fills in `near`.

        Lists of links are of limited length, and cells may hide some. So what would stay is searched once
        more, without all that is left out, until no link is found among it. A row whose link to what stays
        was lost on the way is decided again.

        Args:
            ids: (m,) ascending.
            stay: (s,).

        Returns:
            Those of the ids that stay, ascending.
        """
        found = np.empty(0, np.int64)
        ids = self._not_near(ids, stay)
        while len(ids):
            pairs, cosine, is_complete = self.search(ids, ids)
            chosen = ids[self._independent(ids, pairs)]
            if len(pairs) and not is_complete:  # fewer rows, as each link leaves one out
                chosen = self.decide(chosen, np.concatenate([stay, found]))
            found = np.concatenate([found, chosen])
            ids = ids[(self.near[ids] < 0) & ~np.isin(ids, chosen)]
            self._leave_out(ids, chosen, pairs, cosine)
            ids = self._not_near(ids[self.near[ids] < 0], chosen)
        return np.sort(found)

    def _not_near(self, ids: np.ndarray, stay: np.ndarray) -> np.ndarray:
        """Those of the ids that are linked to none that stays; fills in `near` for the others."""
        if len(ids) and len(stay):
            self._leave_out(ids, stay, *self.search(ids, stay, n_neighbours=1)[:2])
        return ids[self.near[ids] < 0]

    def _leave_out(self, ids: np.ndarray, stay: np.ndarray, pairs: np.ndarray, cosine: np.ndarray) -> None:
        """Fill in `near` for those of the ids that are linked to one that stays, by the nearest of these."""
        both = np.concatenate([pairs, pairs[:, ::-1]])
        cosine = np.concatenate([cosine, cosine])
        linked = np.isin(both[:, 0], ids) & np.isin(both[:, 1], stay)
        out, by = both[linked].T
        order = np.lexsort((by, -cosine[linked], out))
        first = order[np.diff(out[order], prepend=-1) != 0]
        self.near[out[first]] = by[first]

    def _independent(self, ids: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        edges = np.searchsorted(ids, pairs)  # ids are ascending
        ends = np.concatenate([edges, edges[:, ::-1]])
        connections = np.bincount(ends[:, 0], self.size[ids][ends[:, 1]], len(ids)) + self.size[ids]
        keys = [ids, -connections]
        if self.prefer is not None:
            keys.append(-self.prefer[ids].astype(np.float64))
        rank = np.empty(len(ids), np.int64)
        rank[np.lexsort(keys)] = np.arange(len(ids))
        return independent_set(edges, rank)


def independent_set(edges: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The set that taking vertices in the order of their rank gives, each unless a neighbour was taken.

    A vertex is decided as soon as its neighbours of lower rank are, so that many are at once. Each edge is
    looked at a few times, whatever the graph.

    Args:
        edges: (e, 2) vertices, each edge once and none from a vertex to itself.
        rank: (n,) a permutation.

    Returns:
        (n,) bool.
    """
    n = len(rank)
    swapped = rank[edges[:, 0]] > rank[edges[:, 1]]
    earlier = np.where(swapped, edges[:, 1], edges[:, 0])
    later = np.where(swapped, edges[:, 0], edges[:, 1])
    order = np.argsort(earlier, kind="stable")
    later = later[order]
    starts = np.searchsorted(earlier[order], np.arange(n + 1))
    waits_for = np.bincount(later, minlength=n)  # earlier neighbours that may be taken yet
    taken, dropped = np.zeros(n, bool), np.zeros(n, bool)
    ready = np.flatnonzero(waits_for == 0)
    while len(ready):
        taken[ready] = True
        out = np.unique(_followers(later, starts, ready))
        out = out[~dropped[out]]
        dropped[out] = True
        freed, times = np.unique(_followers(later, starts, out), return_counts=True)
        waits_for[freed] -= times
        ready = freed[(waits_for[freed] == 0) & ~dropped[freed]]
    return taken


def _followers(later: np.ndarray, starts: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """The later neighbours of vertices, one after the other."""
    count = starts[vertices + 1] - starts[vertices]
    offset = np.repeat(starts[vertices] - np.concatenate([[0], np.cumsum(count)[:-1]]), count)
    return later[offset + np.arange(len(offset))]
