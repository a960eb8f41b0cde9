"""k-means: greedy k-means++ seeding, then Lloyd's iterations that look only at what moved."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from curated_data import distributed
from curated_data.clustering.nearest import Centroids, nearest, squared_distances, step
from curated_data.clustering.rows import (
    BLOCK,
    Rows,
    blocks,
    memory_budget,
    parallel_map,
    rank_range,
    read_rows,
)
from curated_data.clustering.seeding import seed_rows

log = logging.getLogger(__name__)

METRICS = ("l2", "cosine")
INITS = ("k-means++", "random")

_LARGEST = 1e36  # squared norms beyond it would overflow float32 on the way
_MANY = 1024  # from so many clusters on, the first iterations look at a part of the centroids
_CANDIDATES = 256  # so many


@dataclass(frozen=True)
class KMeansResult:
    """What `kmeans` found.

    Attributes:
        centroids: (k, d) float32; of unit norm under the cosine metric.
        assignment: (n,) int64, each row's nearest centroid; -1 for excluded rows.
        inertia: sum of squared distances of the rows to their centroids (of normalised rows under cosine).
        n_iter: Lloyd iterations done in the best run.
        distance: (n,) float32 Euclidean distance to the centroid; NaN for excluded rows.
        n_empty: clusters that ended without a row: only where rows repeat, or the iterations were cut short.
        n_repaired: how often an emptied cluster was given the row farthest from its centroid.
    """

    centroids: np.ndarray
    assignment: np.ndarray
    inertia: float
    n_iter: int
    distance: np.ndarray
    n_empty: int
    n_repaired: int


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, whatever a training around us chose: bfloat16 blurs assignments."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def kmeans(
    x: Any,
    n_clusters: int,
    *,
    n_iter: int = 50,
    tol: float = 1e-4,
    init: str = "k-means++",
    metric: str = "l2",
    seed: int = 0,
    device: str | torch.device = "auto",
    n_init: int = 1,
    seeding_rows: int | None = None,
    valid: np.ndarray | None = None,
    nonfinite: str = "exclude",
    max_memory: int | None = None,
) -> KMeansResult:
    """Cluster rows into k groups of least inertia.

    The result depends on the data and the seed alone, not on threads or ranks. Under an initialised
    `torch.distributed` group every rank calls this with the same arguments, `x` whole on each (most cheaply
    one memory map); each works on its slice of the rows, and all get the whole result. It equals one
    process's up to the order of float64 sums.

    Args:
        x: (n, d) numpy array, memory map or tensor, any float dtype. Never changed.
        n_clusters: k, at most the number of valid rows.
        n_iter: at most so many Lloyd iterations.
        tol: stop when an iteration lowers the inertia by less than this share; 0 runs until nothing moves.
        init: "k-means++", greedy with 2 + ln k candidates a step, or "random" rows (for comparisons: it
            breaks resampling).
        metric: "l2", or "cosine": rows are normalised, centroids after each update.
        seed: any non-negative integer.
        device: "cpu", "cuda", ..., or "auto": a CUDA device if there is one.
        n_init: runs from fresh seedings; the one of least inertia is kept.
        seeding_rows: seed on at most so many random rows; None means 20 * k, fewer where
            they would not fit `max_memory`. Seeding computes on the CPU.
        valid: (n,) bool, rows to use; None for all.
        nonfinite: what to do with NaN or infinite rows (and zero rows under cosine): "exclude" them with a
            warning, or "raise".
        max_memory: bytes for rows held as float32, three arrays of them at most; where one would take more
            than a third, rows are read in blocks from `x` at every pass. None means a quarter of the
            machine's memory. What is kept per row besides, 40 bytes or so, and 12 bytes a centroid's
            dimension, are not counted.

    Raises:
        ValueError: arguments out of range, more clusters than valid rows, or non-finite rows under "raise".
    """
    if metric not in METRICS:
        raise ValueError(f"metric needs one of {METRICS}, got {metric!r}")
    if init not in INITS:
        raise ValueError(f"init needs one of {INITS}, got {init!r}")
    for name, value, least in (("n_clusters", n_clusters, 1), ("n_init", n_init, 1), ("n_iter", n_iter, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
            raise ValueError(f"{name} needs an integer of at least {least}, got {value!r}")
    rows = prepare(x, metric=metric, device=device, valid=valid, nonfinite=nonfinite, max_memory=max_memory)
    fit = fit_rows(
        rows,
        n_clusters,
        n_iter=n_iter,
        tol=tol,
        init=init,
        seeds=np.random.SeedSequence(seed),
        n_init=n_init,
        seeding_rows=seeding_rows,
    )
    return spread(fit, rows, len(x))


def prepare(
    x: Any,
    *,
    metric: str,
    device: str | torch.device,
    valid: np.ndarray | None,
    nonfinite: str,
    max_memory: int | None,
) -> Rows:
    """Check an input array once, and give its usable rows; every later step works on those."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"x needs shape (n, d) with n, d >= 1, got {shape or type(x).__name__}")
    floating = x.is_floating_point() if isinstance(x, torch.Tensor) else np.issubdtype(x.dtype, np.floating)
    if not floating:
        raise ValueError(f"x needs a floating-point dtype, got {x.dtype}")
    if nonfinite not in ("exclude", "raise"):
        raise ValueError(f'nonfinite needs "exclude" or "raise", got {nonfinite!r}')
    n = shape[0]
    if valid is not None:
        valid = np.asarray(valid)
        if valid.dtype != bool or valid.shape != (n,):
            raise ValueError(f"valid needs shape ({n},) of bool, got {valid.shape} of {valid.dtype}")
    usable, mean = _survey(x, valid, metric == "cosine")
    bad = ~usable if valid is None else valid & ~usable
    if bad.any():
        ids = np.flatnonzero(bad)
        shown = ", ".join(str(i) for i in ids[:10]) + (", ..." if len(ids) > 10 else "")
        what = "non-finite or zero" if metric == "cosine" else "non-finite"
        if nonfinite == "raise":
            raise ValueError(f'x has {len(ids)} {what} rows: {shown}; mend them, or pass nonfinite="exclude"')
        log.warning("excluded %d of %d rows that are %s: %s", len(ids), n, what, shown)
    kept = usable if valid is None else usable & valid
    if not kept.any():
        raise ValueError(f"x has no usable row among {n}")
    return Rows(
        x,
        None if kept.all() else np.flatnonzero(kept),
        normalise=metric == "cosine",
        mean=None if metric == "cosine" else mean,
        device=resolve_device(device),
        budget=int(distributed.broadcast(np.array([memory_budget(max_memory)]))[0]),
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by "auto", or the one named."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _survey(x: Any, valid: np.ndarray | None, cosine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are usable, and the mean of those, each rank looking at its share."""
    n, d = x.shape
    first, last = rank_range(n, distributed.rank(), distributed.world_size())

    def look(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = read_rows(x, slice(first + start, first + stop)).cpu().double().numpy()
        size = np.square(rows).sum(1)
        good = np.isfinite(size) & (size > 0) if cosine else size < _LARGEST
        used = good if valid is None else good & valid[first + start : first + stop]
        return good, rows[used].sum(0)

    parts = parallel_map(look, list(blocks(last - first, BLOCK * 8)))
    good = np.concatenate([p[0] for p in parts]) if parts else np.empty(0, bool)
    good = np.concatenate(distributed.all_gather(good))
    total = distributed.all_reduce(np.sum([p[1] for p in parts], axis=0) if parts else np.zeros(d))
    used = good if valid is None else good & valid
    # To float32 and back: every process must subtract the same number.
    return good, (total / max(1, int(used.sum()))).astype(np.float32).astype(np.float64)


@dataclass
class Fit:
    """A finished run, over all ranks' rows, on every rank; centroids in the rows' own (centred) terms."""

    centroids: torch.Tensor
    assignment: np.ndarray
    squared: np.ndarray
    inertia: float
    n_iter: int
    n_repaired: int


def fit_rows(
    rows: Rows,
    k: int,
    *,
    n_iter: int,
    tol: float,
    init: str,
    seeds: np.random.SeedSequence,
    n_init: int = 1,
    seeding_rows: int | None = None,
    alone: bool = False,
    note: Callable[[str], None] | None = None,
) -> Fit:
    """The best of `n_init` runs; with `alone` this process works by itself, whatever group it is in."""
    if k > len(rows):
        raise ValueError(f"{k} clusters need at least as many usable rows, got {len(rows)}; lower n_clusters")
    rank, world = (0, 1) if alone else (distributed.rank(), distributed.world_size())
    first, last = rank_range(len(rows), rank, world)
    mine = rows.part(first, last).hold()
    within = rows.budget // (4 * rows.dimension)
    limit = max(k, seeding_rows) if seeding_rows else max(5 * k, min(20 * k, within))
    best: Fit | None = None
    for child in seeds.spawn(n_init):
        seeds_at = seed_rows(rows, k, init, np.random.default_rng(child), max_rows=limit)
        if world > 1:
            seeds_at = distributed.broadcast(seeds_at)
        run = _Lloyd(mine, rows.take(seeds_at), world)
        # Rows on disk are better read in order; all ranks must decide alike, so not by what fits on one.
        rough = k >= _MANY and rows.fits()
        fit = run.run(n_iter, tol, rough, note or (lambda text: None))
        if best is None or fit.inertia < best.inertia:
            best = fit
    assert best is not None
    return best


def spread(fit: Fit, rows: Rows, n: int) -> KMeansResult:
    """A fit as its user sees it: in the input's coordinates, over all n rows."""
    assignment, distance = np.full(n, -1, np.int64), np.full(n, np.nan, np.float32)
    kept = slice(None) if rows.ids is None else rows.ids
    assignment[kept], distance[kept] = fit.assignment, np.sqrt(fit.squared)
    counts = np.bincount(fit.assignment, minlength=len(fit.centroids))
    return KMeansResult(
        uncentred(fit.centroids, rows),
        assignment,
        fit.inertia,
        fit.n_iter,
        distance,
        int((counts == 0).sum()),
        fit.n_repaired,
    )


def uncentred(centroids: torch.Tensor, rows: Rows) -> np.ndarray:
    """Centroids in the input's coordinates, float32."""
    wide = centroids.cpu().double().numpy()
    return (wide if rows.mean is None else wide + rows.mean).astype(np.float32)


class _Lloyd:
    """Lloyd's iterations over this rank's rows.

    Exact, without computing every distance again: for each row the score of its own centroid is kept, and a
    lower bound on the score of any other. When some centroids moved, a row needs comparing with those alone,
    unless its own
    score rose above the bound: then with all.
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
            gaps = torch.addmm(self.centroids.square().sum(1), centres, self.centroids.T, alpha=-2)
            near = gaps.topk(seen.shape[1], largest=False).indices.sort(1).values.cpu().numpy()
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
        new[torch.from_numpy(empty[: len(order)]).to(new.device)] = torch.from_numpy(found[order]).to(
            new.device
        )
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
