"""Greedy k-means++ seeding (Arthur and Vassilvitskii 2007), made fast without changing its distribution.

k-means++ draws each new centre with probability proportional to D², the squared distance to the nearest
centre so far. The greedy form draws 2 + ln k candidates and keeps the one that lowers the sum of D² most.
That is what makes it good in high dimension, and takes most of the time if every candidate is compared with
every row, one step after the other. Two observations avoid most of this:

* A candidate drawn from an *older* D² and accepted with probability D²(now) / D²(then) is a draw from the
  present D². So the candidates of many steps can be drawn, and their distances computed, in one round of
  large products.
* Once there are some dozens of centres, a candidate gains nothing for rows far from it. Rows are divided into
  cells, and a candidate is only compared with the cells nearest to it.

Where rows have weights, D² is taken times the weight in draws and gains, as if each row were there that
often.

The first is exact. The second ignores gains that are too small to matter between candidates: inertia and
balance of the trees equal those of the plain form (`benchmarks/RESULTS.md`).

Ranks share the work by cells: each holds the rows of its own cells and computes candidates' scores there. A
step sums one small matrix of gains over all ranks, in which every entry is nonzero on one rank only, so the
choice is the same, bit for bit, on any number of ranks. On an accelerator the plain form is fast enough
(`curated_data.clustering.greedy`): a step is one pass over memory.
"""

import math
from itertools import pairwise

import numpy as np
import torch

from curated_data import parallel
from curated_data.clustering.greedy import TINY, complete_at_random, draw, plain_greedy
from curated_data.clustering.nearest import TILE, nearest_columns
from curated_data.clustering.rows import Rows, new_matrix, rank_range
from curated_data.threads import parallel_map

PROBES = 48  # cells that a candidate is compared with; by 24, small separate blobs are seeded 3 % worse
CELL = 128  # rows in a cell; down to a quarter of that for few rows, to have many more cells than probes
_WIDTH = 16  # of which cells are multiples: products of other widths take up to 1.4 times as long
_MANY_FIRST = 2048  # first centres, from which these are found by cells too
SCORES_BYTES = 256 << 20  # of scores of candidates


def seed_rows(
    rows: Rows,
    n_clusters: int,
    init: str,
    generator: np.random.Generator,
    *,
    max_rows: int,
    rank: int = 0,
    world: int = 1,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Positions of the rows with which k-means starts, (k,) int64, all different.

    Args:
        rows: to choose from.
        n_clusters: how many; at most the number of rows.
        init: "k-means++" (greedy), or "random".
        generator: for all draws; in the same state on every rank.
        max_rows: choose from this many random rows if there are more; not for "random".
        rank, world: of this process, among those that call this together.
        weight: (n,) float64, how often each row counts; those to choose from are then drawn by it.
    """
    n = len(rows)
    if init == "random":
        return generator.choice(n, n_clusters, replace=False)
    if n_clusters == n:
        return np.arange(n)
    if n <= max_rows:
        return greedy_kmeans_plus_plus(rows, n_clusters, generator, weight=weight, rank=rank, world=world)
    if weight is None:
        sample, times = np.sort(generator.choice(n, max_rows, replace=False)), None
    else:
        sample, times = _sample(weight, n_clusters, max_rows, generator)
    some = rows.subset(sample, hold=world == 1)  # several ranks each read only their share
    return sample[greedy_kmeans_plus_plus(some, n_clusters, generator, weight=times, rank=rank, world=world)]


def _sample(
    weight: np.ndarray, k: int, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The rows drawn in proportion to their weight, ascending, and how often each was; at least k rows, for
    which the heaviest of the others are added as if drawn once.
    """
    times = np.bincount(generator.choice(len(weight), draws, p=weight / weight.sum()), minlength=len(weight))
    heaviest = np.lexsort((-weight, times > 0))  # first those that were not drawn
    times[heaviest[: max(k - np.count_nonzero(times), 0)]] = 1
    sample = np.flatnonzero(times)
    return sample, times[sample].astype(np.float64)


def greedy_kmeans_plus_plus(
    rows: Rows,
    k: int,
    generator: np.random.Generator,
    *,
    cell: int | None = None,
    probes: int = PROBES,
    weight: np.ndarray | None = None,
    rank: int = 0,
    world: int = 1,
) -> np.ndarray:
    """Positions of k different rows, chosen by greedy k-means++, with weights (n,) float64 or without."""
    n = len(rows)
    trials = 2 + int(math.log(k))
    cell = cell or min(max(n // (6 * PROBES) // _WIDTH * _WIDTH, CELL // 4), CELL)
    n_first = n // (2 * cell)
    if n_first < 2 * probes or k <= 2 * n_first or rows.device.type != "cpu":
        _check_memory(rows, probes, cell)
        return plain_greedy(rows.block(0, n), k, generator, trials, weight)
    # The first centres, one for every other cell, from a sample: with so few, it has many rows for each.
    some = min(n, 16 * n_first)
    if weight is None:
        sample, own = np.sort(generator.choice(n, some, replace=False)), None
    else:
        sample, own = _sample(weight, n_first, some, generator)
    if n_first > _MANY_FIRST:
        first = sample[greedy_kmeans_plus_plus(rows.subset(sample), n_first, generator, weight=own)]
    else:
        first = sample[plain_greedy(rows.take(sample), n_first, generator, trials, own)]
    return _Cells(rows, first, cell, probes, rank, world, weight).choose(k, trials, generator)


class _Cells:
    """Rows in cells of equal size around the first centres, with the score of each row's nearest centre.

    The score of row x and centre c is |c|² - 2 x.c, so D² is score + |x|². Every rank has all scores and
    norms, but only the rows of its own cells, for which it computes the products.
    """

    def __init__(
        self,
        rows: Rows,
        first: np.ndarray,
        cell: int,
        probes: int,
        rank: int = 0,
        world: int = 1,
        weight: np.ndarray | None = None,
    ) -> None:
        self.rows, self.chosen, self.probes = rows, first, probes
        self.rank, self.world = rank, world
        centres = rows.take(first)
        self.norms, centre_of, second, score = self._assign(centres)
        # The rows of each centre fill separate cells, of which the last is padded. Those with the same second
        # nearest centre lie together, so that a small blob without a centre of its own is not torn apart.
        order = np.lexsort((score + self.norms, second, centre_of))
        sizes = np.bincount(centre_of, minlength=len(first))
        n_cells = -(-sizes // cell)
        shift = (np.cumsum(n_cells) - n_cells) * cell - (np.cumsum(sizes) - sizes)
        slot = np.arange(len(rows)) + np.repeat(shift, sizes)
        self.row = np.full((int(n_cells.sum()), cell), -1)
        self.row.reshape(-1)[slot] = order
        self.score = np.full(self.row.shape, -np.inf, np.float32)  # padding never gains
        self.score.reshape(-1)[slot] = score[order]
        self.norm = np.zeros(self.row.shape, np.float32)
        self.norm.reshape(-1)[slot] = self.norms[order]
        self.weight = None  # of each row, as its score
        if weight is not None:
            self.weight = np.zeros(self.row.shape, np.float32)
            self.weight.reshape(-1)[slot] = (weight / weight.max())[order]
        slot_of = np.empty(len(rows), np.int64)
        slot_of[order] = slot
        self.score.reshape(-1)[slot_of[first]] = -self.norms[first]
        # This rank's cells.
        self.begin, self.end = (len(self.row) * r // world for r in (rank, rank + 1))
        mine = self.row[self.begin : self.end]
        # Made for each use if they may not be held.
        self.weights = new_matrix(len(mine), rows.dimension + 1, cell) if rows.fits() else None
        centres, radius = torch.empty(len(mine), rows.dimension), torch.zeros(len(mine), cell)
        for i, members in enumerate(mine):
            inside = rows.take(members[members >= 0])
            centres[i] = inside.mean(0)
            radius[i, : len(inside)] = (inside - centres[i]).square_().sum(1).sqrt_()
            if self.weights is not None:
                _as_weights(inside, self.weights[i])
        self.centres = torch.from_numpy(np.concatenate(self._gather(centres.numpy())))
        self.radius = np.concatenate(self._gather(radius.numpy()))  # of rows around the centres

    def choose(self, k: int, trials: int, generator: np.random.Generator) -> np.ndarray:
        chosen = np.empty(k, np.int64)
        done = len(self.chosen)
        chosen[:done] = self.chosen
        most = max(1, SCORES_BYTES // (4 * trials * self.probes * self.score.shape[1]))
        self._make_room(most * trials)
        while done < k:
            gap = self._gap()
            self.reach = (self.radius + np.sqrt(gap)).max(1)
            gap = gap.reshape(-1)
            weighted = gap if self.weight is None else gap * self.weight.reshape(-1)
            cumulative = weighted.cumsum(dtype=np.float64)
            if cumulative[-1] <= 0:
                return complete_at_random(chosen, done, len(self.rows), generator)
            steps = min(k - done, max(1, done // 2), most)
            drawn = draw(cumulative, steps * trials, generator)
            luck = generator.random(len(drawn)) * gap[drawn]
            done += self._round(self.row.reshape(-1)[drawn], drawn, luck, trials, chosen[done:])
            if self.world > 1:
                self.score = np.concatenate(self._gather(self.score[self.begin : self.end]))
        return chosen

    def _round(
        self, rows: np.ndarray, slots: np.ndarray, luck: np.ndarray, trials: int, chosen: np.ndarray
    ) -> int:
        """Greedy steps with the candidates of one round, until they run out; returns the number of steps."""
        at = self._known(rows)
        near, place, scores = self.near[at], self.place[at], self.scores
        score, norm = self.score.reshape(-1), self.norm.reshape(-1)
        made = begin = 0
        while made < len(chosen):
            # As many candidates as the plain form has, however few of them are accepted: with fewer, a step
            # would choose worse.
            accepted, gained = np.empty(0, np.int64), np.empty(0)
            while len(accepted) < trials and begin < len(rows):
                ahead = np.arange(begin, min(begin + 2 * trials, len(rows)))
                now, gains = self._look_ahead(ahead, slots, near, place, scores)
                at = np.flatnonzero((now > luck[ahead]) & (now > TINY * norm[slots[ahead]]))
                at = at[: trials - len(accepted)]
                begin = int(ahead[at[-1]] if len(accepted) + len(at) == trials else ahead[-1]) + 1
                gains = self._gains(ahead[at], near, place, scores) if gains is None else gains[at]
                accepted = np.concatenate([accepted, ahead[at]])
                gained = np.concatenate([gained, gains.sum(1)])
            if len(accepted) < trials and made:
                break  # too few are left for a step; the next round draws more
            if not len(accepted):
                break
            best = accepted[gained.argmax()]
            known = place[best] >= 0
            cells = near[best, known]
            self.score[cells] = np.minimum(self.score[cells], scores[place[best, known]])
            score[slots[best]] = -norm[slots[best]]
            chosen[made] = rows[best]
            made += 1
        return made

    def _look_ahead(
        self, ahead: np.ndarray, slots: np.ndarray, near: np.ndarray, place: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The present D² of some candidates; with several ranks also their gains, in the same exchange."""
        at = slots[ahead]
        now = self.score.reshape(-1)[at] + self.norm.reshape(-1)[at]
        if self.world == 1:
            return now, None
        now[~self._own(at // self.score.shape[1])] = 0
        both = np.concatenate([now[:, None], self._gains(ahead, near, place, scores)], axis=1)
        both = parallel.all_reduce(both)
        return both[:, 0], both[:, 1:]

    def _gains(
        self, candidates: np.ndarray, near: np.ndarray, place: np.ndarray, scores: np.ndarray
    ) -> np.ndarray:
        """How much each candidate lowers the sum of D² in each of its cells, (m, probes) float64; 0 in cells
        of other ranks.
        """
        cells, places = near[candidates], place[candidates]
        gains, known = np.zeros(cells.shape), places >= 0
        gain = self.score.take(cells[known], axis=0)
        gain -= scores.take(places[known], axis=0)
        gain = np.maximum(gain, 0, out=gain)
        if self.weight is not None:
            gain *= self.weight.take(cells[known], axis=0)
        gains[known] = gain.sum(-1)
        return gains

    def _make_room(self, capacity: int) -> None:
        """Make room for the scores of a number of candidates, of which none is known yet.

        For all rounds: memory that is new in each would cost as much as the products.
        """
        n, self.capacity = len(self.rows), capacity
        some = min(n, capacity)
        self.known = np.full(n, -1)
        self.near, self.place = (np.empty((some, self.probes), np.int64) for _ in range(2))
        self.scores = new_matrix(some * self.probes, self.score.shape[1]).numpy()
        self.n_known = self.n_places = 0

    def _known(self, rows: np.ndarray) -> np.ndarray:
        """Where candidates are among those whose scores are known, after these have been computed.

        Candidate i of these has the nearest cells `near[i]`, with the scores of their rows in
        `scores[place[i]]`; place is -1 for a cell on another rank, and for one so far away that no row of it
        is nearer to the candidate than to its own centre. Gaps only shrink, so that remains true, and a row
        that is drawn again, as two in five are in a resampling, costs nothing.
        """
        new = np.unique(rows[self.known[rows] < 0])
        if self.n_known + len(new) > self.capacity:
            self.known[:] = -1
            self.n_known = self.n_places = 0
            new = np.unique(rows)
        if len(new):
            self._compute(new)
        return self.known[rows]

    def _compute(self, rows: np.ndarray) -> None:
        """Add the scores of m different candidates."""
        candidates = self.rows.take(rows)
        near, squared = self._nearest_cells(candidates)
        squared += self.norms[rows, None]
        within = np.sqrt(np.maximum(squared, 0)) <= self.reach[near]
        mine = np.flatnonzero((self._own(near) & within).reshape(-1))
        order = mine[np.argsort(near.reshape(-1)[mine], kind="stable")]
        place = np.full(near.size, -1)  # ordered by cell, so that products are written in place
        place[order] = self.n_places + np.arange(len(order))
        cells, start = np.unique(near.reshape(-1)[order], return_index=True)
        sizes = np.diff(start, append=len(order)).tolist()
        with_norms = torch.cat([candidates, torch.from_numpy(self.norms[rows])[:, None]], dim=1)
        who = torch.from_numpy(order // self.probes).split(sizes)
        out = torch.from_numpy(self.scores[self.n_places : self.n_places + len(order)]).split(sizes)

        def multiply(first: int, last: int) -> None:
            for i in range(first, last):
                torch.mm(with_norms.index_select(0, who[i]), self._weights(cells[i]), out=out[i])

        edges = np.linspace(0, len(cells), 4 * torch.get_num_threads() + 1).astype(int)
        parallel_map(multiply, list(pairwise(edges)))
        self.known[rows] = self.n_known + np.arange(len(rows))
        added = slice(self.n_known, self.n_known + len(rows))
        self.near[added], self.place[added] = near, place.reshape(near.shape)
        self.n_known += len(rows)
        self.n_places += len(order)

    def _weights(self, cell: int) -> torch.Tensor:
        """(d + 1, width), by which candidates, with their norms, are multiplied for the scores of a cell."""
        if self.weights is not None:
            return self.weights[cell - self.begin]
        members = self.row[cell]
        weights = new_matrix(self.rows.dimension + 1, len(members))
        return _as_weights(self.rows.take(members[members >= 0]), weights)

    def _nearest_cells(self, candidates: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The nearest cells of each candidate; every rank finds those for its share of the candidates."""
        tiles = -(-len(candidates) // TILE)  # whole tiles, for the same result on any rank
        edges = [min(TILE * (tiles * r // self.world), len(candidates)) for r in range(self.world + 1)]
        first, last = edges[self.rank], edges[self.rank + 1]
        found = nearest_columns(candidates[first:last], self.centres, self.probes)
        near, score = (np.concatenate(self._gather(part.numpy())) for part in found)
        return near, score

    def _assign(self, centres: torch.Tensor) -> tuple[np.ndarray, ...]:
        """For all rows: squared norm, nearest and second nearest first centre, and the score of the nearest;
        each rank computes a part.
        """
        weight, bias = -2 * centres.T, centres.square().sum(1)
        start, end = rank_range(len(self.rows), self.rank, self.world)

        def one(a: int, b: int, x: torch.Tensor) -> tuple[np.ndarray, ...]:
            tile = torch.addmm(bias, x, weight).numpy()
            every, at = np.arange(len(tile)), tile.argmin(1)
            score = tile[every, at]
            tile[every, at] = np.inf
            return x.square().sum(1).numpy(), at, tile.argmin(1), score

        none = (np.empty(0, np.float32), *(np.empty(0, np.int64),) * 2, np.empty(0, np.float32))
        parts = [none, *self.rows.map(one, positions=np.arange(start, end))]
        norms, centre_of, second, score = (
            np.concatenate(self._gather(np.concatenate(part))) for part in zip(*parts, strict=True)
        )
        return norms, centre_of, second, score

    def _own(self, cells: np.ndarray) -> np.ndarray:
        return (cells >= self.begin) & (cells < self.end)

    def _gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array] if self.world == 1 else parallel.all_gather(array)

    def _gap(self) -> np.ndarray:
        """D² of every slot; 0 for padding and for rows that repeat a centre."""
        gap = self.score + self.norm
        return np.where(gap > TINY * self.norm, gap, 0)


def _as_weights(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The weights of a cell's rows, written to `out`; zero for padding."""
    out.zero_()
    out[-1] = 1  # times |c|²
    torch.mul(rows.T, -2, out=out[:-1, : len(rows)])
    return out


def _check_memory(rows: Rows, probes: int, cell: int) -> None:
    """Check that the plain form, which holds all rows, may do so; the few of the default always may."""
    if rows.fits() or (rows.device.type == "cpu" and len(rows) < 4 * probes * cell):
        return
    need = 3 * 4 * len(rows) * rows.dimension
    raise ValueError(
        f"max_memory={3 * rows.budget} bytes are too few to seed on {len(rows)} rows of {rows.dimension} "
        f"numbers, which takes {need}; allow that, or seed on fewer with seeding_rows"
    )
