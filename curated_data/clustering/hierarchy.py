"""Hierarchical k-means with resampling: balanced clusters of a long-tailed pool (arXiv 2405.15613)."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data import parallel
from curated_data.cache.artifacts import fingerprint
from curated_data.checks import check_choice, whole_number
from curated_data.clustering.checkpoint import Arrays, Checkpoint, Running
from curated_data.clustering.kmeans import check_settings, fit_rows, full_precision, prepare
from curated_data.clustering.lloyd import Fit
from curated_data.clustering.nearest import squared_distances
from curated_data.clustering.neighbourhoods import loses_little, nearest_nearby, nearest_of_all, sampled_loss
from curated_data.clustering.rows import Rows, describe_memory, peak_memory, rank_range
from curated_data.clustering.splits import split_level
from curated_data.clustering.survey import warn_unresolved
from curated_data.clustering.tree import ClusterTree
from curated_data.levels import (
    Level,
    TooManyClusters,
    checked_levels,
    choose_levels,
    resampled_size,
    shrunk_levels,
)
from curated_data.matrix import Matrix, read_rows
from curated_data.progress import progress

log = logging.getLogger(__name__)

RESAMPLES = ("closest", "random")


@full_precision()
def hierarchical_kmeans(
    x: Matrix,
    levels: Sequence[Level] | str,
    *,
    resample: str = "closest",
    init: str = "k-means++",
    metric: str = "l2",
    n_iter: int = 50,
    resample_n_iter: int | None = None,
    tol: float = 1e-4,
    n_init: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 300.0,
    valid: np.ndarray | None = None,
    nonfinite: str = "exclude",
    seeding_rows: int | None = None,
    max_memory: int | None = None,
    target_size: int | None = None,
    shrink: bool = False,
) -> ClusterTree:
    """Cluster rows, then their centroids, and so on, resampling each level towards a uniform density.

    Level l clusters the centroids of level l - 1 (level 1 the rows) into k_l clusters. Each resampling takes
    the r_l members nearest to the centroid from every cluster, runs k-means with a new seeding on these
    alone, and assigns every point of the level to the nearest new centroid.

    In an initialised `torch.distributed` group every rank calls this with the same arguments and all of `x`
    (most cheaply as one memory map); each works on its slice, and all return the whole tree.

    Args:
        x: (n, d) numpy array, memory map or tensor, any float dtype.
        levels: settings bottom up, or "auto" for `choose_levels(n, target_size)`.
        resample: whether a resampling takes the "closest" members of a cluster or "random" ones.
        init, metric, n_iter, tol, n_init, device, valid, nonfinite, seeding_rows, max_memory: as in `kmeans`.
        resample_n_iter: Lloyd iterations of a resampling's k-means; None uses `n_iter`, as published. 0 uses
            the seeding as centroids; `benchmarks/history/settings.md` shows what that changes.
        seed: the same seed gives the same tree.
        checkpoint: a folder for this run only, to which each finished k-means is saved. A killed run
            continues from the last one and gives the same tree. The folder is kept; remove it once the tree
            is saved.
        checkpoint_seconds: a k-means in progress is saved too, after an iteration, if this many seconds have
            passed since it was last saved (or ten times as long as writing took, if that is more). Its state
            takes 16 bytes per row and 12 bytes per dimension of a centroid.
        target_size: the intended size of the selection; only for `levels="auto"`.
        shrink: make a level smaller, or leave it out, where rows repeat so often that fewer clusters below
            hold one than the level asks for; always so with "auto".

    Returns:
        A tree with `distance`. Invalid rows, and clusters that stayed empty because of repeated rows, have
        parent -1. Its centroids are float32: a warning says so where that blurs them (see `KMeansResult`).

    Raises:
        ValueError: settings that are out of range or contradict the data, or rows beyond float32's range.
        TooManyClusters: (a ValueError) a level asks for more clusters than there are rows or clusters below.
        CacheError: (a ValueError) the checkpoint belongs to another run, or is damaged.

    Examples:
        >>> import numpy as np
        >>> from curated_data import Level, hierarchical_kmeans
        >>> rows = np.random.default_rng(0).normal(size=(2000, 16))
        >>> tree = hierarchical_kmeans(rows, [Level(100, n_resamples=3, sample_size=8), Level(10)])
        >>> tree.n_clusters
        {1: 100, 2: 10}
    """
    check_choice("resample", resample, RESAMPLES)
    resample_n_iter = (
        n_iter if resample_n_iter is None else whole_number("resample_n_iter", resample_n_iter, 0)
    )
    if isinstance(checkpoint_seconds, str) or not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds needs a number of at least 0, got {checkpoint_seconds!r}")
    check_settings(
        init=init, metric=metric, n_iter=n_iter, tol=tol, n_init=n_init, seed=seed, seeding_rows=seeding_rows
    )
    rows = prepare(x, metric=metric, device=device, valid=valid, nonfinite=nonfinite, max_memory=max_memory)
    if isinstance(levels, str):
        if levels != "auto":
            raise ValueError(f'levels needs a sequence of Level or "auto", got {levels!r}')
        levels, shrink = choose_levels(len(rows), target_size), True
    levels = checked_levels(shrunk_levels(levels, len(rows)) if shrink else levels, len(rows))
    settings = {
        "resample": resample, "init": init, "metric": metric, "n_iter": n_iter, "tol": tol, "n_init": n_init,
        "seed": seed, "seeding_rows": seeding_rows,
    }  # fmt: skip
    if resample_n_iter != n_iter:
        settings["resample_n_iter"] = resample_n_iter
    run_kmeans = _Kmeans(n_iter, tol, init, n_init, seeding_rows)
    run = "" if checkpoint is None else _run_fingerprint(x, rows, levels, settings)
    saved = Checkpoint(checkpoint, run)
    log.info("clustering %s", describe_memory(rows))
    warn_unresolved(rows.sample, levels[0].n_clusters * levels[0].n_splits)
    _check_range(rows)

    centroids: dict[int, np.ndarray] = {}
    parent: dict[int, np.ndarray] = {}
    distance: np.ndarray | None = None
    source, n = rows, len(x)
    with progress("clustering", 100) as advance:
        work = _Work(
            resample, seed, run_kmeans, replace(run_kmeans, n_iter=resample_n_iter), saved,
            checkpoint_seconds, _Shares(levels, len(rows), advance),
        )  # fmt: skip
        number = 0
        while number < len(levels):
            number, level = number + 1, levels[number]
            name = f"level-{number}"
            done = saved.load(name)
            if done is None:
                done = _cluster_level(source, level, number, work)
                if parallel.rank() == 0:
                    saved.save(name, done)
            else:
                work.shares.finished(number, range(1 + level.n_resamples))
            for piece in saved.names():
                if piece.startswith(f"{name}.") and parallel.rank() == 0:
                    saved.drop(piece)
            centroids[number] = done["centroids"]
            parent[number] = np.full(n, -1, np.int64)
            kept = slice(None) if source.ids is None else source.ids
            parent[number][kept] = done["assignment"]
            if number == 1:
                distance = np.full(n, np.nan, np.float32)
                distance[kept] = np.sqrt(done["squared"]) * source.frame.scale
            filled = np.bincount(done["assignment"], minlength=len(done["centroids"])) > 0
            n = len(filled)
            if shrink:
                planned = levels
                levels = levels[:number] + shrunk_levels(levels[number:], int(filled.sum()))
                for left_out in range(len(levels), len(planned)):
                    work.shares.finished(left_out + 1, range(1 + planned[left_out].n_resamples))
            if number < len(levels):
                _check_filled(levels[number], number, filled)
                source = prepare(
                    centroids[number], metric=metric, device=device, valid=filled, nonfinite="raise",
                    max_memory=max_memory,
                )  # fmt: skip
    return ClusterTree(centroids, parent, distance, metric=metric)


@dataclass(frozen=True)
class _Kmeans:
    """k-means with this run's settings."""

    n_iter: int
    tol: float
    init: str
    n_init: int
    seeding_rows: int | None

    def __call__(self, rows: Rows, k: int, seeds: np.random.SeedSequence, **how: Any) -> Fit:
        return fit_rows(rows, k, seeds=seeds, **vars(self), **how)


class _Shares:
    """Progress in percent; each k-means counts by the products it may need, rows times clusters."""

    def __init__(self, levels: list[Level], n: int, advance: Callable[..., None]) -> None:
        self.advance = advance
        cost = {}
        for number, level in enumerate(levels, 1):
            k = level.n_clusters
            r = level.sample_size or n / k / 2
            for step in range(1 + level.n_resamples):
                cost[number, step] = k * (n if step == 0 else min(n, r * k)) + n * level.n_splits
            n = k * level.n_splits
        self.share = {step: 100 * c / sum(cost.values()) for step, c in cost.items()}

    def finished(self, number: int, steps: Iterable[int]) -> None:
        """Report steps of a level as done."""
        self.advance(sum(self.share[number, step] for step in steps))

    def note(self, number: int, what: str) -> None:
        """Show the state of a level."""
        self.advance(0, note=f"level {number} of {max(self.share)[0]}, {what}")


@dataclass(frozen=True)
class _Work:
    """What all levels share."""

    resample: str
    seed: int
    kmeans: _Kmeans
    resampled: _Kmeans
    saved: Checkpoint
    checkpoint_seconds: float
    shares: _Shares


def _cluster_level(rows: Rows, level: Level, number: int, work: _Work) -> Arrays:
    """Cluster one level: (k, d) centroids, (n,) assignment and (n,) squared distance of its usable rows."""
    began = time.monotonic()
    if level.n_splits > 1:
        found = split_level(
            rows, level, np.random.SeedSequence((work.seed, number)), work.kmeans, work.saved,
            f"level-{number}", work.checkpoint_seconds, lambda what: work.shares.note(number, what),
        )  # fmt: skip
        work.shares.finished(number, [0])
    else:
        found = _resampled(rows, level, number, work)
    _log_level(number, found, time.monotonic() - began, rows)
    return found


def _resampled(rows: Rows, level: Level, number: int, work: _Work) -> Arrays:
    """The first k-means of a level and its resamplings, continued after the last one saved."""
    saved, k = work.saved, level.n_clusters
    r = resampled_size(level, len(rows))
    n_steps = level.n_resamples if r > 1 else 0
    names = [f"level-{number}.step-{step}" for step in range(n_steps + 1)]
    kept = set(saved.names())
    last = max((step for step, name in enumerate(names) if name in kept), default=-1)
    state = saved.load(names[last]) if last >= 0 else None
    work.shares.finished(number, range(last + 1))
    for step in range(last + 1, n_steps + 1):
        running = Running(saved, f"{names[step]}.running", work.checkpoint_seconds)
        how: dict[str, Any] = {
            # An assignment that only decides which rows the next resampling takes may have a few errors.
            "exact": step == n_steps,
            "note": lambda text, step=step: work.shares.note(number, f"step {step} of {n_steps}, {text}"),
            "running": running,
        }
        seeds = np.random.SeedSequence((work.seed, number, step))
        if state is None:
            fit = work.kmeans(rows, k, seeds, **how)
            assignment, squared = fit.assignment, fit.squared
        else:
            rng = np.random.default_rng(np.random.SeedSequence((work.seed, number, step, 1)))
            picked = _balanced_sample(state["assignment"], state["squared"], k, r, work.resample, rng)
            fit = work.resampled(rows.subset(picked), k, seeds, **how)
            assignment, squared = _extend(rows, picked, fit)
        state = {"centroids": rows.frame.outside(fit.centroids), "assignment": assignment, "squared": squared}
        if parallel.rank() == 0:
            saved.save(names[step], state)
            if step:
                saved.drop(names[step - 1])
        running.clear()
        work.shares.finished(number, [step])
    work.shares.finished(number, range(n_steps + 1, level.n_resamples + 1))
    assert state is not None
    return state


def _balanced_sample(
    assignment: np.ndarray, squared: np.ndarray, k: int, r: int, resample: str, rng: np.random.Generator
) -> np.ndarray:
    """Positions of the r closest (or r random) rows of every cluster, ascending; at least k in all."""
    n = len(assignment)
    key = squared if resample == "closest" else rng.random(n)
    order = np.lexsort((key, assignment))
    start = np.concatenate([[0], np.cumsum(np.bincount(assignment, minlength=k))])
    place = np.arange(n)
    place -= start[assignment[order]]
    taken = order[place < r]
    if len(taken) < k:  # empty clusters, because of repeated rows: the next closest make up the number
        rest = order[place >= r][np.argsort(place[place >= r], kind="stable")]
        taken = np.concatenate([taken, rest[: k - len(taken)]])
    return np.sort(taken)


def _extend(rows: Rows, picked: np.ndarray, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Extend a fit on some rows to all: the others are assigned to their nearest centroid."""
    assignment, squared = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    assignment[picked], squared[picked] = fit.assignment, fit.squared
    is_left = np.ones(len(rows), bool)
    is_left[picked] = False
    rest = np.flatnonzero(is_left)
    world = parallel.world_size()
    first, last = rank_range(len(rest), parallel.rank(), world)
    mine = rows.subset(rest[first:last])
    own = None if fit.exact else nearest_nearby(mine, fit.centroids, world)
    if own is not None:
        loss = sampled_loss(mine, fit.centroids, own, first=first, n=len(rest))
        own = own if loses_little(parallel.all_reduce(loss)) else None
    if own is None:
        own = nearest_of_all(mine, fit.centroids, world)
    gaps = squared_distances(mine, fit.centroids, own).astype(np.float32)
    assignment[rest] = np.concatenate(parallel.all_gather(own))
    squared[rest] = np.concatenate(parallel.all_gather(gaps))
    return assignment, squared


def _check_filled(level: Level, below: int, filled: np.ndarray) -> None:
    """Check that enough clusters hold a row for the next level; repeated rows leave some empty."""
    if level.n_clusters > filled.sum():
        raise TooManyClusters(
            f"level {below + 1} asks for {level.n_clusters} clusters, but only {filled.sum()} of the "
            f"{len(filled)} clusters of level {below} hold a row, as rows repeat; lower n_clusters, or "
            "remove duplicates first"
        )


def _check_range(rows: Rows) -> None:
    """Check that float32, in which a tree is kept, can hold centroids; warn if it blurs them."""
    if rows.largest > np.finfo(np.float32).max and not rows.frame.normalise:
        raise ValueError(
            f"x has values up to {rows.largest:.3g}, and a tree keeps centroids as float32, up to 3.4e38: "
            "divide the rows by a constant"
        )
    if rows.frame.dtype == np.float64:
        log.warning(
            "rows lie so far from zero that the tree's centroids, float32, are blurred; clusters and "
            "distances are not. To have exact centroids, take the mean of the rows off first"
        )


def _run_fingerprint(x: Matrix, rows: Rows, levels: list[Level], settings: dict[str, Any]) -> str:
    """A name for data and settings; of the data: shape, which rows are used, their mean, and 4096 rows."""
    n = len(x)
    places = np.unique(np.linspace(0, n - 1, 4096).astype(np.int64))
    sample = read_rows(x, places).cpu().numpy()
    frame = rows.frame
    mean = np.zeros(0) if frame.mean is None else frame.mean  # over all the data
    ids = np.zeros(0, np.int64) if rows.ids is None else rows.ids
    return fingerprint(
        shape=list(x.shape), dtype=str(x.dtype), sample=sample, mean=mean, scale=frame.scale, ids=ids,
        levels=[asdict(level) for level in levels], settings=settings, version=7,
    )  # fmt: skip


def _log_level(number: int, found: Arrays, seconds: float, rows: Rows) -> None:
    k, n = len(found["centroids"]), len(found["assignment"])
    sizes = np.bincount(found["assignment"], minlength=k)
    share = sizes[sizes > 0] / n
    log.info(
        "level %d: %d clusters of %d rows, sizes %d/%d/%d (min/median/max), perplexity %.0f, %d empty, "
        "inertia %.6g, %.1f s, %.1f GiB of memory at most",
        number, k, n, sizes.min(), np.median(sizes), sizes.max(), math.exp(-(share * np.log(share)).sum()),
        (sizes == 0).sum(), found["squared"].sum(dtype=np.float64) * rows.frame.scale**2, seconds,
        peak_memory(rows.device) / 2**30,
    )  # fmt: skip
