"""Greedy k-means++ seeding (Arthur and Vassilvitskii 2007), made fast without changing what it chooses from.

k-means++ draws each new centre with probability proportional to D², the squared distance to the nearest
centre so far; the greedy form draws 2 + ln k candidates and keeps the one that lowers the sum of D² most.
That carries the quality in high dimension, and takes most of the time if every candidate is compared with
every row, one step after the other. Two observations remove most of it:

* A candidate drawn from an *older* D² and kept with probability D²(now) / D²(then) is a draw from the present
  D². So candidates of many steps can be drawn, and their distances computed, in one round of large products.
* Once there are some dozens of centres, a candidate brings nothing to rows far from it. Rows are cut into
  cells, and a candidate is compared with the cells nearest to it alone.

The first is exact; the second leaves out gains that are too small to tell candidates apart, as measured:
inertia and balance of the trees equal those of the plain form (`benchmarks/RESULTS.md`).
"""

import math
from itertools import pairwise

import numpy as np
import torch

from curated_data.clustering.nearest import nearest_columns
from curated_data.clustering.rows import Rows, parallel_map

PROBES = 24  # cells that a candidate is compared with
CELL = 128  # rows in a cell; down to a quarter where there are few, so that cells stay many more than probes
_ROUND_BYTES = 128 << 20  # of scores kept in a round
_TINY = 3e-6  # D² below this share of |x|² is rounding: the row repeats a centre


def seed_rows(
    rows: Rows, n_clusters: int, init: str, generator: np.random.Generator, *, max_rows: int
) -> np.ndarray:
    """Positions of the rows that k-means starts from, (k,) int64, all different.

    Args:
        rows: rows to choose among.
        n_clusters: how many, at most as many as there are rows.
        init: "k-means++" (greedy), or "random".
        generator: of all choices.
        max_rows: choose among so many random rows, if there are more; not for "random".
    """
    n = len(rows)
    if init == "random":
        return generator.choice(n, n_clusters, replace=False)
    if n_clusters == n:
        return np.arange(n)
    if n <= max_rows:
        return greedy_kmeans_plus_plus(rows.block(0, n).cpu(), n_clusters, generator)
    sample = np.sort(generator.choice(n, max_rows, replace=False))
    return sample[greedy_kmeans_plus_plus(rows.take(sample).cpu(), n_clusters, generator)]


def greedy_kmeans_plus_plus(
    x: torch.Tensor, k: int, generator: np.random.Generator, *, cell: int | None = None, probes: int = PROBES
) -> np.ndarray:
    """k different rows of x (n, d) float32, chosen by greedy k-means++."""
    trials = 2 + int(math.log(k))
    cell = cell or min(max(len(x) // (12 * PROBES), CELL // 4), CELL)
    n_first = len(x) // (2 * cell)
    if n_first < 2 * probes or k <= 2 * n_first:
        return plain_greedy(x, k, generator, trials)
    # The first centres, one for every other cell, on a sample: with so few, many rows speak for each.
    sample = np.sort(generator.choice(len(x), min(len(x), 32 * n_first), replace=False))
    first = sample[plain_greedy(x[torch.from_numpy(sample)], n_first, generator, trials)]
    return _Cells(x, first, cell, probes).choose(k, trials, generator)


def plain_greedy(x: torch.Tensor, k: int, generator: np.random.Generator, trials: int) -> np.ndarray:
    """Greedy k-means++ as it is defined: step by step, every candidate against every row."""
    n = len(x)
    norms = x.square().sum(1)
    chosen = np.empty(k, np.int64)
    chosen[0] = generator.integers(n)
    gap = _gaps(x, norms, chosen[:1])[0]
    for i in range(1, k):
        cumulative = gap.numpy().cumsum(dtype=np.float64)
        if cumulative[-1] <= 0:
            return _fill(chosen, i, n, generator)
        candidates = _draw(cumulative, trials, generator)
        lower = torch.minimum(_gaps(x, norms, candidates), gap)
        best = int(lower.sum(1).argmin())
        chosen[i], gap = candidates[best], lower[best]
    return chosen


def _gaps(x: torch.Tensor, norms: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """Squared distances of some rows to all, (len(ids), n); 0 where a row meets itself or its copy."""
    gap = torch.addmm(norms[ids][:, None] + norms, x[ids], x.T, alpha=-2)
    return torch.where(gap < _TINY * norms, 0, gap)


def _draw(cumulative: np.ndarray, m: int, generator: np.random.Generator) -> np.ndarray:
    """m places, each with probability in proportion to its step in a cumulative sum."""
    found = cumulative.searchsorted(generator.random(m) * cumulative[-1], side="right")
    last = cumulative.searchsorted(cumulative[-1])
    return np.minimum(found, last)  # where the product was rounded up to the very end


def _fill(chosen: np.ndarray, done: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """Where rows have fewer distinct values than k, any others make up the number."""
    chosen[done:] = generator.choice(
        np.setdiff1d(np.arange(n), chosen[:done]), len(chosen) - done, replace=False
    )
    return chosen


class _Cells:
    """Rows in cells of equal size around the first centres, and for each row the score of its nearest centre.

    The score of row x and centre c is |c|² - 2 x.c, so that D² is score + |x|².
    """

    def __init__(self, x: torch.Tensor, first: np.ndarray, cell: int, probes: int) -> None:
        self.x, self.chosen, self.probes = x, first, probes
        self.norms = x.square().sum(1).numpy()
        weight, bias = -2 * x[first].T, torch.from_numpy(self.norms[first])
        centre_of, score = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
        for start in range(0, len(x), 4096):
            tile = torch.addmm(bias, x[start : start + 4096], weight).numpy()
            centre_of[start : start + 4096] = at = tile.argmin(1)
            score[start : start + 4096] = tile[np.arange(len(tile)), at]
        # Each centre's rows fill cells of their own; the last of them is padded.
        order = np.lexsort((score + self.norms, centre_of))
        sizes = np.bincount(centre_of, minlength=len(first))
        n_cells = -(-sizes // cell)
        shift = (np.cumsum(n_cells) - n_cells) * cell - (np.cumsum(sizes) - sizes)
        slot = np.arange(len(x)) + np.repeat(shift, sizes)
        self.row = np.full((int(n_cells.sum()), cell), -1)
        self.row.reshape(-1)[slot] = order
        self.slot = np.empty(len(x), np.int64)
        self.slot[order] = slot
        self.score = np.full(self.row.shape, -np.inf, np.float32)  # padding never gains
        self.score.reshape(-1)[slot] = score[order]
        self.score.reshape(-1)[self.slot[first]] = -self.norms[first]
        self.norm = np.zeros(self.row.shape, np.float32)
        self.norm.reshape(-1)[slot] = self.norms[order]
        padded = torch.zeros(*self.row.shape, x.shape[1])
        padded.view(-1, x.shape[1])[torch.from_numpy(slot)] = x[torch.from_numpy(order)]
        filled = torch.from_numpy((self.row >= 0).sum(1, keepdims=True))
        self.centres = padded.sum(1) / filled
        self.weights = padded.mul_(-2).transpose(1, 2)

    def choose(self, k: int, trials: int, generator: np.random.Generator) -> np.ndarray:
        chosen = np.empty(k, np.int64)
        done = len(self.chosen)
        chosen[:done] = self.chosen
        most = max(1, _ROUND_BYTES // (4 * trials * self.probes * self.score.shape[1]))
        while done < k:
            gap = self._gap().reshape(-1)
            cumulative = gap.cumsum(dtype=np.float64)
            if cumulative[-1] <= 0:
                return _fill(chosen, done, len(self.x), generator)
            steps = min(k - done, max(1, done // 4), most)
            drawn = _draw(cumulative, steps * trials, generator)
            luck = generator.random(len(drawn)) * gap[drawn]
            done += self._round(self.row.reshape(-1)[drawn], drawn, luck, trials, chosen[done:])
        return chosen

    def _round(
        self, rows: np.ndarray, slots: np.ndarray, luck: np.ndarray, trials: int, chosen: np.ndarray
    ) -> int:
        """Greedy steps with the candidates of one round, while they last; returns how many were made."""
        near, place, scores = self._scores(rows)
        score, norm = self.score.reshape(-1), self.norm.reshape(-1)
        made = begin = 0
        while made < len(chosen) and begin < len(rows):
            ahead = np.arange(begin, min(begin + 2 * trials, len(rows)))
            now = score[slots[ahead]] + norm[slots[ahead]]
            kept = ahead[(now > luck[ahead]) & (now > _TINY * norm[slots[ahead]])][:trials]
            begin = int(kept[-1] if len(kept) == trials else ahead[-1]) + 1
            if len(kept) < trials and begin == len(rows) and made:
                break  # too few are left for a step: a new round draws more
            if not len(kept):
                continue
            gain = self.score[near[kept]]
            gain -= scores[place[kept]]
            np.maximum(gain, 0, out=gain)
            best = kept[gain.reshape(len(kept), -1).sum(1).argmax()]
            at = near[best]
            self.score[at] = np.minimum(self.score[at], scores[place[best]])
            score[slots[best]] = -norm[slots[best]]
            chosen[made] = rows[best]
            made += 1
        return made

    def _scores(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The (m, probes) nearest cells of m candidates, each one's place in the third, and the scores of the
        cells' rows, (m * probes, cell).
        """
        candidates = self.x[torch.from_numpy(rows)]
        near = nearest_columns(candidates, self.centres, self.probes).numpy()
        order = np.argsort(near, axis=None, kind="stable")
        place = np.empty(len(order), np.int64)  # products are kept by cell: each is written where it stays
        place[order] = np.arange(len(order))
        cells, start = np.unique(near.reshape(-1)[order], return_index=True)
        stop = np.append(start[1:], len(order))
        who = torch.from_numpy(order // self.probes)
        bias = torch.from_numpy(self.norms[rows])[:, None]
        scores = torch.empty(len(order), self.score.shape[1])

        def fill(first: int, last: int) -> None:
            for i in range(first, last):
                some = who[start[i] : stop[i]]
                torch.addmm(
                    bias[some], candidates[some], self.weights[cells[i]], out=scores[start[i] : stop[i]]
                )

        edges = np.linspace(0, len(cells), 4 * torch.get_num_threads() + 1).astype(int)
        parallel_map(fill, list(pairwise(edges)))
        return near, place.reshape(near.shape), scores.numpy()

    def _gap(self) -> np.ndarray:
        """D² of every slot; 0 in the padding, and where a row repeats a centre."""
        gap = self.score + self.norm
        return np.where(gap > _TINY * self.norm, gap, 0)
