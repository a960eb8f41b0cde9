"""k-means: greedy k-means++ seeding, then Lloyd's iterations that only recompute what moved."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curated_data import parallel
from curated_data.checks import check_choice, whole_number
from curated_data.clustering.checkpoint import Arrays, Running
from curated_data.clustering.lloyd import Fit, Lloyd
from curated_data.clustering.nearest import nearest, squared_distances
from curated_data.clustering.neighbourhoods import MANY
from curated_data.clustering.rows import METRICS as METRICS
from curated_data.clustering.rows import Rows, memory_budget, rank_range
from curated_data.clustering.seeding import seed_rows
from curated_data.clustering.survey import survey, warn_unresolved
from curated_data.devices import resolve_device
from curated_data.matrix import Matrix

log = logging.getLogger(__name__)

INITS = ("k-means++", "random")


@dataclass(frozen=True)
class KMeansResult:
    """The result of `kmeans`.

    Attributes:
        centroids: (k, d) float32, of unit norm under the cosine metric. float64 where float32 would blur
            them: for rows a thousand times as far from zero as they are apart, or outside its range.
        assignment: (n,) int64, each row's nearest centroid; -1 for excluded rows.
        inertia: sum of squared distances of the rows to their centroids (of normalised rows under cosine).
        n_iter: Lloyd iterations of the best run.
        distance: (n,) Euclidean distance to the centroid, float32, or float64 outside its range; NaN for
            excluded rows.
        n_empty: clusters without a row, which only occur if rows repeat or iterations were cut short.
        n_repaired: how often an empty cluster was given the row farthest from its centroid.
        metric: by which rows were assigned.
    """

    centroids: np.ndarray
    assignment: np.ndarray
    inertia: float
    n_iter: int
    distance: np.ndarray
    n_empty: int
    n_repaired: int
    metric: str = "l2"

    def assign(self, rows: Matrix, *, device: str | torch.device = "auto") -> np.ndarray:
        """The nearest centroid of other rows, (m,) int64; -1 for rows that cannot be placed, see
        `nearest_centroids`.

        Args:
            rows: (m, d) array, memory map or tensor, any float dtype.
            device: of the computation.

        Raises:
            ValueError: rows of another length.
        """
        return nearest_centroids(rows, self.centroids, metric=self.metric, device=device)[0]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute products of float32 in float32, whatever the surrounding training has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def kmeans(
    x: Matrix,
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
    sample_weight: np.ndarray | None = None,
    nonfinite: str = "exclude",
    max_memory: int | None = None,
) -> KMeansResult:
    """Partition rows into k clusters of minimal inertia.

    The result depends only on the data and the seed, not on threads or ranks. In an initialised
    `torch.distributed` group every rank calls this with the same arguments and all of `x` (most cheaply as
    one memory map); each works on its slice of the rows, and all get the whole result. It equals that of one
    process up to the order of float64 sums.

    Rows are centred in their own precision and scaled to float32's range; products are float32. So rows that
    are nearer to each other than about 1/500 of their distance from the mean of all may be taken for copies.
    Where that blurs clusters of the size that is asked for, a warning says so.

    Args:
        x: (n, d) numpy array, memory map or tensor, any float dtype. Never modified.
        n_clusters: k, at most the number of valid rows.
        n_iter: maximum number of Lloyd iterations.
        tol: stop when an iteration lowers the inertia by less than this share; 0 runs until nothing moves.
        init: "k-means++", greedy with 2 + ln k candidates per step, or "random" rows (for comparisons: it
            breaks resampling).
        metric: "l2", or "cosine", which normalises the rows, and the centroids after each update.
        seed: any non-negative integer.
        device: "cpu", "cuda", …, or "auto" for a CUDA device if there is one.
        n_init: number of runs with different seedings; the one with the lowest inertia is kept.
        seeding_rows: seed on at most this many random rows; None takes 20 * k.
        valid: (n,) bool, rows to use; None for all.
        sample_weight: (n,) how much each row counts in seeding, means and inertia, at least 0, as if it were
            there that often; None: all the same.
        nonfinite: what to do with NaN or infinite rows (and zero rows under cosine): "exclude" them with a
            warning, or "raise".
        max_memory: bytes for rows held as float32, of which there are up to three arrays; if one would take
            more than a third, rows are read from `x` in blocks at every pass. That takes longer, and changes
            nothing else. None takes a quarter of the machine's memory, or of the CUDA device's. Not counted:
            about 70 bytes per row, 20 bytes per dimension of a centroid, and up to 350 MiB of blocks and
            scores in use.

    Raises:
        ValueError: arguments or weights out of range, more clusters than valid rows, non-finite rows under
            "raise", or rows to seed on that must be held and exceed a third of `max_memory`: a few clusters
            of many `seeding_rows`, or any on an accelerator.

    Examples:
        >>> import numpy as np
        >>> from curated_data import kmeans
        >>> rows = np.concatenate([np.zeros((30, 2)), np.full((10, 2), 8.0)])
        >>> result = kmeans(rows, 2)
        >>> sorted(np.bincount(result.assignment).tolist()), result.inertia
        ([10, 30], 0.0)
    """
    whole_number("n_clusters", n_clusters, 1)
    check_settings(
        init=init, metric=metric, n_iter=n_iter, tol=tol, n_init=n_init, seed=seed, seeding_rows=seeding_rows
    )
    rows = prepare(x, metric=metric, device=device, valid=valid, nonfinite=nonfinite, max_memory=max_memory)
    warn_unresolved(rows.sample, n_clusters)
    weight = None if sample_weight is None else _checked_weight(sample_weight, rows, len(x))
    fit = fit_rows(
        rows,
        n_clusters,
        n_iter=n_iter,
        tol=tol,
        init=init,
        seeds=np.random.SeedSequence(seed),
        n_init=n_init,
        seeding_rows=seeding_rows,
        weight=weight,
    )
    return dataclasses.replace(as_result(fit, rows, len(x)), metric=metric)


def _checked_weight(weight: np.ndarray, rows: Rows, n: int) -> np.ndarray:
    """The weights of the usable rows, (m,) float64.

    Raises:
        ValueError: they do not fit the rows, one is negative or not finite, or all are zero.
    """
    found = np.asarray(weight)
    if found.shape != (n,) or found.dtype.kind not in "iuf":
        raise ValueError(f"sample_weight needs shape ({n},) of numbers, got {found.dtype} {found.shape}")
    found = found.astype(np.float64)
    if not np.isfinite(found).all() or (found < 0).any():
        row = int(np.flatnonzero(~(found >= 0) | ~np.isfinite(found))[0])
        raise ValueError(f"sample_weight[{row}] is {found[row]}, expected a finite number of at least 0")
    found = found if rows.ids is None else found[rows.ids]
    if not found.any():
        raise ValueError("sample_weight: all usable rows have weight 0; give some a weight")
    return found


@full_precision()
def nearest_centroids(
    x: Matrix, centroids: np.ndarray, *, metric: str, device: str | torch.device = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's nearest centroid, (n,) int64, and its distance to it, (n,) float32.

    Rows that are not finite, or zero under cosine, are placed nowhere: -1 and NaN.

    Raises:
        ValueError: rows of another length than the centroids, or no floating-point matrix.
    """
    assignment = np.full(len(x), -1, np.int64)
    distance = np.full(len(x), np.nan, np.float32)
    if not len(x):
        return assignment, distance
    if tuple(x.shape)[1:] != centroids.shape[1:]:
        raise ValueError(f"rows have shape {tuple(x.shape)}, expected (m, {centroids.shape[1]})")
    if not survey(x, None, metric == "cosine").usable.any():
        return assignment, distance
    rows = prepare(x, metric=metric, device=device, valid=None, nonfinite="exclude", max_memory=None)
    inside = rows.frame.inside(torch.from_numpy(np.asarray(centroids)).to(rows.device)).float()
    own = nearest(rows, inside)
    kept = slice(None) if rows.ids is None else rows.ids
    assignment[kept] = own
    distance[kept] = np.sqrt(squared_distances(rows, inside, own)) * rows.frame.scale
    return assignment, distance


def check_settings(
    *, init: Any, metric: Any, n_iter: Any, tol: Any, n_init: Any, seed: Any, seeding_rows: Any
) -> None:
    """Raise a ValueError that names a setting if it is out of range."""
    check_choice("init", init, INITS)
    check_choice("metric", metric, METRICS)
    for name, value, least in (("n_iter", n_iter, 0), ("n_init", n_init, 1), ("seed", seed, 0)):
        whole_number(name, value, least)
    if seeding_rows is not None:
        whole_number("seeding_rows", seeding_rows, 1)
    if isinstance(tol, str) or not tol >= 0:
        raise ValueError(f"tol needs a number of at least 0, got {tol!r}")


def prepare(
    x: Matrix,
    *,
    metric: str,
    device: str | torch.device,
    valid: np.ndarray | None,
    nonfinite: str,
    max_memory: int | None,
) -> Rows:
    """Check an input array, and return its usable rows, on which all later steps work."""
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
    found = survey(x, valid, metric == "cosine")
    usable = found.usable
    bad = ~usable if valid is None else valid & ~usable
    if bad.any():
        ids = np.flatnonzero(bad)
        shown = ", ".join(str(i) for i in ids[:10]) + (", ..." if len(ids) > 10 else "")
        what = "non-finite or zero" if metric == "cosine" else "non-finite"
        if nonfinite == "raise":
            raise ValueError(f'x has {len(ids)} {what} rows: {shown}; fix them, or pass nonfinite="exclude"')
        log.warning("excluded %d of %d rows that are %s: %s", len(ids), n, what, shown)
    kept = usable if valid is None else usable & valid
    if not kept.any():
        need = "valid, finite and not zero" if metric == "cosine" else "valid and finite"
        raise ValueError(f"x has no usable row among {n}: none is {need}")
    device = resolve_device(device)
    return Rows(
        x,
        None if kept.all() else np.flatnonzero(kept),
        frame=found.frame,
        device=device,
        budget=int(parallel.broadcast(np.array([memory_budget(max_memory, device)]))[0]),
        sample=found.sample,
        largest=found.largest,
    )


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
    exact: bool = True,
    alone: bool = False,
    note: Callable[[str], None] = lambda text: None,
    running: Running | None = None,
    weight: np.ndarray | None = None,
) -> Fit:
    """The best of `n_init` runs.

    Args:
        exact: False allows one row in a hundred to miss its nearest centroid if k is large, which saves much
            time; for an assignment that will be replaced.
        alone: this process works by itself, even in a group.
        note: called with a status after each iteration.
        running: saves the state, and restores that of a killed process, which then gives the same result.
        weight: (n,) float64, of each row; not together with `running`.
    """
    if k > len(rows):
        raise ValueError(f"{k} clusters need at least as many usable rows, got {len(rows)}; lower n_clusters")
    rank, world = (0, 1) if alone else (parallel.rank(), parallel.world_size())
    first, last = rank_range(len(rows), rank, world)
    mine = rows.part(first, last).hold()
    limit = max(k, seeding_rows) if seeding_rows else 20 * k
    # On an accelerator to start the product of one neighbourhood takes longer than the product of many.
    rough = k >= MANY and rows.device.type == "cpu"

    state = (running.load() if running else None) or {}
    best = Fit.from_state(_under("best", state), rows.device) if "best.numbers" in state else None
    for number, child in enumerate(seeds.spawn(n_init)):
        if state and number < state["run"][0]:
            continue
        seeds_at = state.get("seeds")
        if seeds_at is None:
            seeds_at = seed_rows(
                rows, k, init, np.random.default_rng(child), max_rows=limit, rank=rank, world=world,
                weight=weight,
            )  # fmt: skip
            if world > 1:
                seeds_at = parallel.broadcast(seeds_at)
        own = None if weight is None else weight[first:last]
        run = Lloyd(mine, rows.take(seeds_at), world, first, own)
        if "lloyd.progress" in state:
            run.restore(_under("lloyd", state))
        state = {}
        so_far = {"run": np.array([number]), "seeds": seeds_at} | _over("best", best.state() if best else {})

        def keep(lloyd: Callable[[], Arrays], so_far: Arrays = so_far) -> None:
            if running:
                running.offer(lambda: so_far | _over("lloyd", lloyd()))

        keep(dict)  # only the seeding
        fit = run.run(n_iter, tol, rough=rough, exact=exact, note=note, keep=keep)
        if best is None or fit.inertia < best.inertia:
            best = fit
    assert best is not None
    return best


def _over(name: str, arrays: Arrays) -> Arrays:
    return {f"{name}.{key}": array for key, array in arrays.items()}


def _under(name: str, arrays: Arrays) -> Arrays:
    return {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{name}.")}


def as_result(fit: Fit, rows: Rows, n: int) -> KMeansResult:
    """A fit as a result for the user: in the input's coordinates, over all n rows."""
    scale = rows.frame.scale
    within = 2.0**-100 < scale < 2.0**100
    assignment = np.full(n, -1, np.int64)
    distance = np.full(n, np.nan, np.float32 if within else np.float64)
    kept = slice(None) if rows.ids is None else rows.ids
    assignment[kept] = fit.assignment
    distance[kept] = np.sqrt(fit.squared) if scale == 1 else np.sqrt(fit.squared.astype(np.float64)) * scale
    counts = np.bincount(fit.assignment, minlength=len(fit.centroids))
    return KMeansResult(
        rows.frame.outside(fit.centroids),
        assignment,
        fit.inertia * scale * scale,
        fit.n_iter,
        distance,
        int((counts == 0).sum()),
        fit.n_repaired,
    )
