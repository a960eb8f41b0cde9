"""Approximate nearest centroids: each row is only compared with the centroids in its neighbourhood.

Rows are divided into cells around a few centres, about one for every 24 centroids, and each cell is compared
with the centroids nearest to its centre, less those that the triangle inequality excludes. For rows with
cluster structure this finds the nearest centroids with a fraction of the products (all of 20,000 rows of a
mixture in 256 dimensions, k = 2500); without structure it may miss a third (a normal cloud in 64 dimensions).
So an exact pass follows, or a sample measures the loss.
"""

from itertools import pairwise

import numpy as np
import torch

from curated_data import parallel
from curated_data.clustering.bounds import WIDTH, Bounds, widened
from curated_data.clustering.nearest import Centroids, map_into, nearest, nearest_columns, squared_distances
from curated_data.clustering.rows import Rows, blocks, rows_at
from curated_data.threads import parallel_map

MANY = 1024  # centroids from which neighbourhoods save more than they cost
FEW = 256  # centroids, to compare with which takes no longer than to look around cells
_CANDIDATES = 256  # centroids in a neighbourhood
_COMPLETE = 0.1  # share of cells with complete neighbourhoods, from which to tell them apart is worth it
_SAMPLE = 1024  # rows on which the loss is measured


class Neighbourhoods:
    """Rows in cells around fixed centres, to be compared with the centroids near each cell.

    Args:
        rows: a copy is held in the order of their cells, if it fits the budget.
        centres: (c, d) from `coarse_centres`; fixed while centroids move.
        seen: the attribute of a former object, which this one replaces.
        world: how many ranks make this together, each with its own rows; neighbourhoods are the same on all.

    Attributes:
        seen: (c, m) int64, the centroids of each neighbourhood when it was last looked at, and -1.
    """

    def __init__(
        self, rows: Rows, centres: torch.Tensor, seen: np.ndarray | None = None, world: int = 1
    ) -> None:
        self.centres = centres
        cell_of, distance = _nearest_centres(rows, centres)
        self.order = np.argsort(cell_of, kind="stable")
        edges = np.concatenate([[0], np.cumsum(np.bincount(cell_of, minlength=len(centres)))])
        self.cells = [(c, a, b) for c, (a, b) in enumerate(pairwise(edges)) if b > a]
        radii = np.zeros(len(centres), np.float32)
        np.maximum.at(radii, cell_of, distance)
        self.radii = radii if world == 1 else parallel.all_reduce(radii, "max")
        self.rows = rows.subset(self.order)
        self.seen = seen

    def look(self, centroids: torch.Tensor, moved: np.ndarray | None, bounds: Bounds) -> None:
        """Update each row's nearest centroid and the bound on the others in its neighbourhood.

        Args:
            moved: (k,) bool, which centroids have moved since `bounds` were updated last; None for all. A
                cell is compared with those near it, or with its whole neighbourhood if they are most of it.
        """
        near, _ = self._neighbours(centroids)
        fresh = within = near >= 0
        if moved is not None:
            fresh = moved[near] & within
            if self.seen is not None:
                for c, _, _ in self.cells:
                    fresh[c] |= within[c] & ~np.isin(near[c], self.seen[c], kind="table")
        self.seen = near

        def prepared(ids: np.ndarray) -> Centroids:
            return Centroids(rows_at(centroids, ids), small=True)

        def one(c: int, a: int, b: int) -> None:
            at, rows = self.order[a:b], self.rows.block(a, b)
            ids, new = near[c, within[c]], fresh[c, within[c]]
            if moved is None or new.sum() > len(ids) // 2:
                bounds.compare(at, rows, ids, prepared(ids))
                return
            # The score of a centroid outside the neighbourhood may be an old one.
            unsure = np.flatnonzero(~np.isin(bounds.assignment[at], ids))
            if new.any():
                some = ids[widened(new)]
                unsure = np.union1d(unsure, bounds.compare_moved(at, rows, some, prepared(some)))
            if len(unsure):
                bounds.compare(at[unsure], rows_at(rows, unsure), ids, prepared(ids))

        def stale(c: int, a: int, b: int) -> bool:
            own_moved = moved is None or moved[bounds.assignment[self.order[a:b]]].any()
            return bool(own_moved or fresh[c].any())

        parallel_map(one, [cell for cell in self.cells if stale(*cell)])

    def look_exactly(self, centroids: torch.Tensor, bounds: Bounds) -> bool:
        """Update each row's nearest of all centroids and the bound on all others.

        Rows of a cell that reaches no farther than its neighbourhood are compared with that, others with all.

        Returns:
            False, with nothing done, if such cells are too few to save time; the same on all ranks.
        """
        seen, complete = self._neighbours(centroids)
        if complete.mean() < _COMPLETE:
            return False
        self.seen = seen
        every, everything = np.arange(len(centroids)), Centroids(centroids)

        def one(c: int, a: int, b: int) -> None:
            ids = seen[c, seen[c] >= 0]
            some = Centroids(rows_at(centroids, ids), small=True)
            bounds.compare(self.order[a:b], self.rows.block(a, b), ids, some)

        def others(start: int, stop: int, block: torch.Tensor) -> None:
            bounds.compare(self.order[rest[start:stop]], block, every, everything)

        parallel_map(one, [cell for cell in self.cells if complete[cell[0]]])
        parts = [np.arange(a, b) for c, a, b in self.cells if not complete[c]]
        rest = np.concatenate([np.empty(0, np.int64), *parts])
        self.rows.map(others, positions=rest)
        return True

    def _neighbours(self, centroids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The centroids nearest to each centre, (c, m) int64, in ascending order, -1 for those out of reach;
        and whether these are all that are within reach, (c,) bool.

        From a row at distance r from a centre, the two centroids nearest to the centre, the farther of them
        at distance d, are at most r + d away, and one at distance e is at least e - r away. So none with e
        beyond d + 2 r is among the two nearest of any row. Those within are filled up to a whole width.
        """
        near, scores = nearest_columns(self.centres, centroids, min(_CANDIDATES, len(centroids)))
        distance = _distances(scores.numpy(), self.centres.square().sum(1)[:, None].numpy())
        ascending = np.sort(distance, axis=1)
        reach = ascending[:, min(1, distance.shape[1] - 1)] + 2 * self.radii
        width = (ascending <= reach[:, None]).sum(1)
        complete = (width < distance.shape[1]) | (distance.shape[1] == len(centroids))
        width += -width % WIDTH
        limit = np.take_along_axis(ascending, np.minimum(width, distance.shape[1])[:, None] - 1, axis=1)
        return np.where(distance <= limit, near.numpy(), -1), complete


def _nearest_centres(rows: Rows, centres: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each row, (n,) int64, and its distance, (n,) float32."""
    ready = Centroids(centres)
    distance = np.empty(len(rows), np.float32)

    def one(start: int, stop: int, block: torch.Tensor) -> np.ndarray:
        index, score = ready.nearest_scored(block)
        distance[start:stop] = _distances(score, block.square().sum(1).numpy())
        return index

    return map_into(rows, np.empty(len(rows), np.int64), one), distance


def _distances(scores: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Distances from scores and squared norms, at least as large as without rounding."""
    return np.sqrt(np.maximum(scores + norms, 0) + 1e-5 * norms)


def nearest_nearby(rows: Rows, centroids: torch.Tensor, world: int = 1) -> np.ndarray:
    """The nearest centroid in each row's neighbourhood, (n,) int64; see `sampled_loss`."""
    bounds = Bounds(len(rows))
    Neighbourhoods(rows, coarse_centres(centroids), world=world).look(centroids, None, bounds)
    return bounds.assignment


def nearest_of_all(rows: Rows, centroids: torch.Tensor, world: int = 1) -> np.ndarray:
    """The nearest centroid of each row, (n,) int64, without looking beyond its neighbourhood where that is
    known to hold it.
    """
    if len(centroids) >= MANY and rows.device.type == "cpu":
        near, bounds = Neighbourhoods(rows, coarse_centres(centroids), world=world), Bounds(len(rows))
        if near.look_exactly(centroids, bounds):
            return bounds.assignment
    return nearest(rows, centroids)


def sampled_loss(
    rows: Rows, centroids: torch.Tensor, assignment: np.ndarray, *, first: int, n: int
) -> np.ndarray:
    """The loss of an approximate assignment, on about a thousand of the n rows of all ranks.

    Args:
        rows: this rank's rows, which start at row `first` of the n.

    Returns:
        (4,) float64, to be summed over ranks: the number of sampled rows, of those assigned to their nearest
        centroid, the excess squared distance of the others, and the squared distance of all to the nearest.
    """
    every = max(1, n // _SAMPLE)
    at = np.arange(-first % every, len(rows), every)
    index = Centroids(centroids).two_nearest(rows.take(at))[0]
    some = rows.subset(at)
    least, own = (squared_distances(some, centroids, ids) for ids in (index, assignment[at]))
    return np.array([len(at), (index == assignment[at]).sum(), (own - least).sum(), least.sum()])


def loses_little(loss: np.ndarray) -> bool:
    """Whether a `sampled_loss`, summed over ranks, is harmless for an assignment that will be replaced."""
    looked_at, right, lost, least = loss
    return bool(right >= 0.99 * looked_at and lost <= 0.01 * least)


def coarse_centres(centroids: torch.Tensor) -> torch.Tensor:
    """About k / 24 centres for neighbourhoods, from a rough k-means of the centroids; equal on all ranks.

    It starts with the first centroids. If these are still in the order in which greedy k-means++ chose them,
    they cover the data. From a sample, which can omit a group of clusters, a centre of many groups remains
    that attracts all that were omitted, and is nearest to more centroids than a neighbourhood has.
    """
    values = centroids.cpu().numpy()
    centres = centroids[: -(-len(centroids) // 24)].clone()
    for _ in range(3):
        norms = centres.square().sum(1)
        parts = [(norms - 2 * centroids[a:b] @ centres.T).argmin(1) for a, b in blocks(len(centroids))]
        index = torch.cat(parts).cpu().numpy()
        # By sorted segments: on an accelerator, sums by index are not repeatable.
        order = np.argsort(index, kind="stable")
        filled, first = np.unique(index[order], return_index=True)
        sums = np.add.reduceat(values[order], first, axis=0, dtype=np.float64)
        centres[torch.from_numpy(filled).to(centres.device)] = torch.from_numpy(
            (sums / np.bincount(index)[filled][:, None]).astype(np.float32)
        ).to(centres.device)
    return centres
