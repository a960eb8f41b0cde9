"""Lloyd's iterations: the nearest centroid of every row, the mean of every cluster, until nothing changes."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from curated_data import distributed
from curated_data.clustering.nearest import Centroids, nearest, nearest_columns, squared_distances, step
from curated_data.clustering.rows import Rows, blocks, parallel_map

MANY = 1024  # from so many clusters on, the first iterations look at a part of the centroids only
_CANDIDATES = 256  # so many


@dataclass
class Fit:
    """A finished run, over all ranks' rows, on every rank; centroids in the rows' own (centred) terms."""

    centroids: torch.Tensor
    assignment: np.ndarray
    squared: np.ndarray
    inertia: float
    n_iter: int
    n_repaired: int


class Lloyd:
    """Lloyd's iterations over this rank's rows.

    Exact, without computing every distance again: for each row the score of its own centroid is kept, and a
    lower bound on the score of any other. When some centroids moved, a row needs comparing with those alone,
    unless its own score rose above the bound: then with all.
    """

    def __init__(self, rows: Rows, centroids: torch.Tensor, world: int) -> None:
        self.rows, self.centroids, self.world = rows, centroids.clone(), world
        self.k = len(centroids)
        n = len(rows)
        self.assignment = np.full(n, -1, np.int64)
        self.own = np.empty(n, np.float32)
        self.other = np.empty(n, np.float32)
        self.sums = np.zeros((self.k, rows.dimension))
        self.counts = np.zeros(self.k, np.int64)
        norms = parallel_map(lambda a, b: rows.block(a, b).square().sum(1).cpu().numpy(), list(blocks(n)))
        self.norms = np.concatenate([np.empty(0, np.float32), *norms])
        self.n_repaired = 0

    def run(self, n_iter: int, tol: float, rough: bool, note: Callable[[str], None]) -> Fit:
        """Iterate until the inertia falls by less than a share `tol`; `rough` lets neighbourhoods begin."""
        done, inertia = self._approach(n_iter, tol, note) if rough else (0, np.inf)
        before, inertia = inertia, self._assign(np.ones(self.k, bool))
        while done < n_iter and (before - inertia > tol * before or before == np.inf):
            moved = self._update()
            if not moved.any():
                break
            done += 1
            before, inertia = inertia, self._assign(moved)
            note(f"iteration {done}, inertia {inertia:.5g}")
        squared = squared_distances(self.rows, self.centroids, self.assignment)
        assignment = np.concatenate(self._gather(self.assignment))
        squared = np.concatenate(self._gather(squared))
        inertia = float(squared.sum())
        return Fit(self.centroids, assignment, squared.astype(np.float32), inertia, done, self.n_repaired)

    def _approach(self, n_iter: int, tol: float, note: Callable[[str], None]) -> tuple[int, float]:
        """Iterations that compare each row with the centroids around its neighbourhood alone.

        Neighbourhoods are cells around a few centres, found once; each looks at its `_CANDIDATES` nearest
        centroids. Returns how many iterations were made, and the inertia so far; the exact ones that follow
        mend what it missed.
        """
        centres = _coarse(self.centroids)
        cell_of = nearest(self.rows, centres)
        order = np.argsort(cell_of, kind="stable")
        edges = np.concatenate([[0], np.cumsum(np.bincount(cell_of, minlength=len(centres)))])
        cells = [(c, a, b) for c, (a, b) in enumerate(pairwise(edges)) if b > a]
        sorted_rows = self.rows.subset(order)
        seen = np.full((len(centres), min(_CANDIDATES, self.k)), -1)
        moved, inertia, done = np.ones(self.k, bool), np.inf, 0
        while True:
            near = nearest_columns(centres, self.centroids, seen.shape[1]).sort(1).values.cpu().numpy()
            stale = moved[near].any(1) | (near != seen).any(1)
            seen = near
            before = self.assignment.copy()

            def look(c: int, a: int, b: int, near: np.ndarray = near) -> None:
                ids = near[c]
                some = Centroids(self.centroids[torch.from_numpy(ids).to(self.centroids.device)], padded=True)
                index, best = some.two_nearest(sorted_rows.block(a, b))[:2]
                self.assignment[order[a:b]], self.own[order[a:b]] = ids[index], best

            parallel_map(look, [cell for cell in cells if stale[cell[0]]])
            self._move_sums(before)
            last, inertia = inertia, self._inertia()
            if done + 1 >= n_iter or last - inertia <= tol * last < np.inf:
                return done, inertia
            moved = self._update()
            done += 1
            note(f"iteration {done}, inertia {inertia:.5g}")

    def _assign(self, moved: np.ndarray) -> float:
        """Give every row its nearest centroid, after some moved; returns the inertia."""
        before = self.assignment.copy()
        pieces = list(blocks(len(self.rows), step(self.rows)))
        everything = Centroids(self.centroids)
        if moved.sum() > 0.5 * self.k:
            parallel_map(
                lambda a, b: self._look_at_all(np.arange(a, b), self.rows.block(a, b), everything), pieces
            )
        else:
            ids = np.flatnonzero(moved)
            some = Centroids(self.centroids[torch.from_numpy(ids).to(self.centroids.device)])
            column = np.full(self.k, -1)
            column[ids] = np.arange(len(ids))
            parallel_map(lambda a, b: self._look_at_moved(a, b, some, ids, column, everything), pieces)
        self._move_sums(before)
        return self._inertia()

    def _inertia(self) -> float:
        return float(self._sum(np.array([(self.own.astype(np.float64) + self.norms).sum()]))[0])

    def _look_at_all(self, at: np.ndarray, rows: torch.Tensor, ready: Centroids) -> None:
        self.assignment[at], self.own[at], self.other[at] = ready.two_nearest(rows)

    def _look_at_moved(
        self,
        start: int,
        stop: int,
        some: Centroids,
        ids: np.ndarray,
        column: np.ndarray,
        everything: Centroids,
    ) -> None:
        rows = self.rows.block(start, stop)
        assignment, own, other = (a[start:stop] for a in (self.assignment, self.own, self.other))
        index, best, second, mine = some.two_nearest(rows, skip=column[assignment])
        np.copyto(own, mine, where=~np.isnan(mine))
        change = best < own
        other[:] = np.minimum(other, np.where(change, np.minimum(own, second), best))
        assignment[change] = ids[index[change]]
        own[change] = best[change]
        # The bound now counts the moved ones; where it lies below, one that stayed may be nearer.
        unsure = np.flatnonzero(own > other)
        if len(unsure):
            self._look_at_all(unsure + start, rows[torch.from_numpy(unsure).to(rows.device)], everything)

    def _move_sums(self, before: np.ndarray) -> None:
        """Bring the sums and counts of all ranks' rows up to the new assignment, by the rows that changed."""
        changed = np.flatnonzero(before != self.assignment)
        sums, counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        for clusters, sign in ((self.assignment[changed], 1), (before[changed], -1)):
            inside = clusters >= 0
            _add_segments(sums, self.rows, changed[inside], clusters[inside], sign)
            counts += sign * np.bincount(clusters[inside], minlength=self.k)
        self.sums += self._sum(sums)
        self.counts += self._sum(counts)

    def _update(self) -> np.ndarray:
        """Move centroids to the means, empty clusters to far rows; returns which moved, (k,) bool."""
        means = self.sums / np.maximum(self.counts, 1)[:, None]
        if self.rows.normalise:
            length = np.linalg.norm(means, axis=1, keepdims=True)
            means = np.divide(means, length, out=means, where=length > 0)
        new = torch.from_numpy(means.astype(np.float32)).to(self.centroids.device)
        still = self.counts == 0
        if self.rows.normalise:
            still |= length[:, 0] == 0  # unit rows that cancel out have no direction
        still = torch.from_numpy(still).to(new.device)
        new[still] = self.centroids[still]
        self._repair(new)
        moved = (new != self.centroids).any(1).cpu().numpy()
        self.centroids = new
        return moved

    def _repair(self, new: torch.Tensor) -> None:
        """Give each empty cluster the row farthest from its centroid; the next assignment does the rest."""
        empty = np.flatnonzero(self.counts == 0)
        if not len(empty):
            return
        squared = self.own + self.norms
        far = np.argsort(-squared, kind="stable")[: len(empty)]
        far = far[squared[far] > 1e-5 * self.norms[far]]  # what remains at distance zero would be a duplicate
        gap = np.concatenate(self._gather(squared[far]))
        found = np.concatenate(self._gather(self.rows.take(far).cpu().numpy()))
        order = np.argsort(-gap, kind="stable")[: len(empty)]
        filled = torch.from_numpy(empty[: len(order)]).to(new.device)
        new[filled] = torch.from_numpy(found[order]).to(new.device)
        self.n_repaired += len(order)

    def _sum(self, array: np.ndarray) -> np.ndarray:
        return array if self.world == 1 else distributed.all_reduce(array)

    def _gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array] if self.world == 1 else distributed.all_gather(array)


def _add_segments(sums: np.ndarray, rows: Rows, at: np.ndarray, clusters: np.ndarray, sign: int) -> None:
    """Add `sign` times the rows at `at` to the sums of their clusters, in float64, by sorted segments."""
    order = np.argsort(clusters, kind="stable")
    at, clusters = at[order], clusters[order]

    def one(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        part = clusters[start:stop]
        first = np.flatnonzero(np.concatenate([[True], part[1:] != part[:-1]]))
        values = rows.take(at[start:stop]).cpu().numpy()
        return part[first], np.add.reduceat(values, first, axis=0, dtype=np.float64)

    for ids, partial in parallel_map(one, list(blocks(len(at)))):
        sums[ids] += sign * partial


def _coarse(centroids: torch.Tensor) -> torch.Tensor:
    """About k / 32 centres for neighbourhoods: a rough k-means of the centroids, the same on every rank."""
    centres = centroids[::32]
    for _ in range(3):
        norms = centres.square().sum(1)
        parts = [(norms - 2 * centroids[a:b] @ centres.T).argmin(1) for a, b in blocks(len(centroids))]
        index = torch.cat(parts)
        sums = torch.zeros_like(centres).index_add_(0, index, centroids)
        counts = torch.bincount(index, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
