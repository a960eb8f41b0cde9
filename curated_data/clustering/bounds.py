"""Rows' nearest centroids, kept up to date by comparing rows only with the centroids that have moved."""

import numpy as np
import torch

from curated_data.clustering.nearest import Centroids

WIDTH = 64  # to a multiple of which moved centroids are filled up: each width of a product costs a set-up


class Bounds:
    """For each row its nearest centroid, the score of that, and a lower bound on the scores of all others.

    "All" are those that a row is compared with: every centroid, or those of its neighbourhood. Scores are
    |c|² - 2 x.c, see `curated_data.clustering.nearest`.

    Attributes:
        assignment: (n,) int64 index of the nearest centroid; -1 before the first comparison.
        own: (n,) float32, its score.
        other: (n,) float32, the bound.
    """

    def __init__(self, n: int) -> None:
        self.assignment = np.full(n, -1, np.int64)
        self.own = np.zeros(n, np.float32)
        self.other = np.zeros(n, np.float32)

    def compare(self, at: slice | np.ndarray, rows: torch.Tensor, ids: np.ndarray, ready: Centroids) -> None:
        """Compare some rows with all centroids.

        Args:
            at: which rows.
            rows: (m, d), these rows.
            ids: (c,) all centroids.
            ready: prepared from these.
        """
        index, self.own[at], self.other[at] = ready.two_nearest(rows)
        self.assignment[at] = ids[index]

    def compare_moved(
        self, at: slice | np.ndarray, rows: torch.Tensor, moved: np.ndarray, some: Centroids
    ) -> np.ndarray:
        """Compare some rows with the centroids that have moved since the last time.

        Args:
            moved: (c,) these centroids, ascending, and maybe others.
            some: prepared from these.

        Returns:
            Which of the rows are unsure, (u,) int64: their own score has risen above the bound, so they must
            be compared with all.
        """
        assignment, own, other = self.assignment[at], self.own[at], self.other[at]
        place = np.minimum(moved.searchsorted(assignment), len(moved) - 1)
        index, best, second, mine = some.two_nearest(
            rows, skip=np.where(moved[place] == assignment, place, -1)
        )
        own = np.where(np.isnan(mine), own, mine)
        change = best < own
        other = np.minimum(other, np.where(change, np.minimum(own, second), best))
        own = np.where(change, best, own)
        self.assignment[at] = np.where(change, moved[index], assignment)
        self.own[at], self.other[at] = own, other
        # The bound now includes the moved centroids; if it is lower, one that stayed may be nearer.
        return np.flatnonzero(own > other)


def widened(moved: np.ndarray) -> np.ndarray:
    """Which of some centroids to compare, of which some have moved: these, and others up to a whole width.

    Args:
        moved: (c,) bool.

    Returns:
        Their places, ascending.
    """
    count = int(moved.sum())
    more = np.flatnonzero(~moved)[: -count % WIDTH]
    return np.sort(np.concatenate([np.flatnonzero(moved), more]))
