"""Retrieve samples of a pool by examples: seed sets, of which each has a name and (m, d) embeddings.

`retrieve` takes the pool samples nearest to every seed, `retrieve_clusters` samples of the clusters that many
seeds fall into, and `target_weights` says how much of each cluster a mixture of the seed sets asks for.
"""

import logging
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from curated_data.checks import check_choice, whole_number
from curated_data.clustering.kmeans import METRICS, nearest_centroids
from curated_data.clustering.tree import ClusterTree
from curated_data.errors import ConfigError
from curated_data.matrix import Matrix, read_rows
from curated_data.selection.links import cosines, unit

log = logging.getLogger(__name__)

_DIGITS = 12  # of a cosine: equal directions of other lengths differ in later ones
TILE = 1 << 22  # products looked at at once
BLOCK = 8192  # rows of the pool read at once
_MANY = 32  # candidates for each place, from which a product of float64 is worth its time


@dataclass(frozen=True)
class Retrieved:
    """Samples of a pool, and why each was retrieved.

    Attributes:
        ids: (k,) int64, ascending, none twice.
        names: of the seed sets, in the order given.
        seed_set: (k,) int64, the number in `names` of the set that the sample was retrieved for.
        seed: (k,) int64, the row in that set of the seed that is nearest to the sample; -1 for samples that
            a cluster gave.
        cluster: (k,) int64, the cluster that gave the sample; -1 for samples that a seed retrieved.
        cosine: (k,) float64, with that seed; NaN for samples that a cluster gave.
        rank: (k,) int64 from 0, among what that seed retrieved, or in the order in which the cluster gave.
    """

    ids: np.ndarray
    names: tuple[str, ...]
    seed_set: np.ndarray
    seed: np.ndarray
    cluster: np.ndarray
    cosine: np.ndarray
    rank: np.ndarray


def retrieve(
    embeddings: Matrix,
    seeds: Mapping[str, Matrix],
    n: int = 4,
    *,
    least: float | None = None,
    valid: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    block: int = BLOCK,
) -> Retrieved:
    """Retrieve the n samples of a pool that are nearest to each seed by cosine.

    The result is the union over all seeds of all sets. A sample near to several seeds is in it once, with the
    nearest of them as the reason (on ties the first), so there may be fewer than n per seed. The search is
    exact: cosines are computed in float64 and rounded to 12 digits, and of equal ones the smaller id comes
    first. The pool is read once, in blocks, and the result does not depend on their size.

    Args:
        embeddings: (n, d) rows of any scale. Zero and non-finite rows are never retrieved.
        seeds: by name, (m, d) rows each; kept in memory.
        n: how many samples a seed retrieves.
        least: cosine that a sample needs at least, in [-1, 1]; None for no limit.
        valid: (n,) bool, False for samples to leave out.
        exclude: ids of further samples to leave out.
        block: rows to read at once.

    Raises:
        ConfigError: an argument of the wrong shape, or a number out of range.

    Examples:
        >>> import numpy as np
        >>> from curated_data import retrieve
        >>> pool = np.random.default_rng(0).normal(size=(1000, 8))
        >>> found = retrieve(pool, {"mine": pool[[3, 700]]}, n=1)
        >>> found.ids.tolist(), found.seed.tolist()
        ([3, 700], [0, 1])
    """
    size, dimension = _shape("embeddings", embeddings)
    for name, value in (("n", n), ("block", block)):
        whole_number(name, value, 1)
    if least is not None and not (isinstance(least, numbers.Real) and -1 <= least <= 1):
        raise ConfigError(f"least: expected a cosine in -1..1, found {least!r}")
    allowed = _allowed(size, valid, exclude)
    sets = _checked_seeds(seeds, dimension, directed=True)
    rows = np.concatenate(list(sets.values()))
    best = _Nearest(rows, min(n, size), -math.inf if least is None else float(least))
    n_without = 0
    for start in range(0, size, block):
        inside = np.flatnonzero(allowed[start : start + block])
        if not len(inside):
            continue
        part = read_rows(embeddings, slice(start, min(start + block, size))).cpu().numpy()[inside]
        usable = np.isfinite(part).all(axis=1) & part.any(axis=1)
        n_without += int((~usable).sum())
        best.offer(part[usable], start + inside[usable])
    if n_without:
        log.warning("retrieval: %d of %d rows are zero or not finite, and never retrieved", n_without, size)
    seed, rank = np.nonzero(best.ids >= 0)
    ids, cosine = best.ids[seed, rank], best.cosine[seed, rank]
    order = np.lexsort((seed, -cosine, ids))
    first = order[np.diff(ids[order], prepend=-1) != 0]
    ends = np.cumsum([len(given) for given in sets.values()])
    seed_set = np.searchsorted(ends, seed[first], side="right")
    of_set = seed[first] - np.concatenate([[0], ends])[seed_set]
    log.info("retrieval: %d samples for %d seeds in %d sets", len(first), len(rows), len(sets))
    return Retrieved(
        ids[first], tuple(sets), seed_set, of_set, np.full(len(first), -1), cosine[first], rank[first]
    )


def retrieve_clusters(
    tree: ClusterTree,
    seeds: Mapping[str, Matrix],
    *,
    metric: str,
    per_cluster: int,
    least_seeds: int = 1,
    level: int = 1,
    limit: int | Mapping[str, int] | None = None,
    valid: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    seed: int = 0,
) -> Retrieved:
    """Retrieve random samples of the clusters that many seeds of a set fall into.

    A seed falls into the clusters that the tree would put it into as a sample: that of the nearest centroid
    of level 1, and those above it. The sets are served in their order, and each takes from its clusters in
    the order of their seeds, most first, until its limit. A cluster gives in a random order of its own, which
    depends on `seed` and the samples allowed alone; what it gave to one set no other gets.

    Args:
        tree: of the pool.
        seeds: by name, (m, d) rows each, of the embeddings that the tree was made of.
        metric: of the tree, "l2" or "cosine".
        per_cluster: the most samples that a cluster gives to all sets together.
        least_seeds: how many seeds of a set need to fall into a cluster.
        level: of the clusters.
        limit: the most samples for each set, or for each of those named; None for no limit.
        valid: (n,) bool, False for samples to leave out.
        exclude: ids of further samples to leave out.
        seed: for the draw; equal arguments give equal ids.

    Raises:
        ConfigError: an argument of the wrong shape, or a number out of range.
    """
    for name, value in (("per_cluster", per_cluster), ("least_seeds", least_seeds)):
        whole_number(name, value, 1)
    whole_number("seed", seed, 0)
    counts = _counts(tree, seeds, level, metric)
    limits = (
        dict(limit) if isinstance(limit, Mapping) else {} if limit is None else dict.fromkeys(seeds, limit)
    )
    for name, value in limits.items():
        if name not in seeds:
            raise ConfigError(f"limit: no seed set has the name {name!r}; there are {', '.join(seeds)}")
        whole_number(f"limit of {name!r}", value, 0)
    allowed = _allowed(tree.n_samples, valid, exclude)
    draws: dict[int, np.ndarray] = {}
    n_given: dict[int, int] = {}
    found: list[tuple[np.ndarray, int, int, int]] = []
    for number, name in enumerate(seeds):
        left = limits.get(name, tree.n_samples)
        for cluster in np.argsort(-counts[number], kind="stable").tolist():
            if counts[number, cluster] < least_seeds or not left:
                break
            if cluster not in draws:
                members = tree.members(level, cluster)
                members = members[allowed[members]]
                draw = np.random.default_rng([seed, cluster]).permutation(members)
                draws[cluster] = draw[:per_cluster]
            before = n_given.get(cluster, 0)
            taken = draws[cluster][before : before + left]
            found.append((taken, number, cluster, before))
            n_given[cluster] = before + len(taken)
            left -= len(taken)
    each = [len(taken) for taken, *_ in found]
    ids = np.concatenate([np.empty(0, np.int64), *(taken for taken, *_ in found)])
    order = np.argsort(ids)
    seed_set, cluster_of, first = np.repeat(
        np.array([rest for _, *rest in found], np.int64).reshape(-1, 3), each, axis=0
    )[order].T
    place = np.concatenate([np.empty(0, np.int64), *(np.arange(length) for length in each)])[order]
    none = np.full(len(ids), -1)
    log.info("retrieval: %d samples of %d clusters for %d sets", len(ids), len(draws), len(seeds))
    return Retrieved(
        ids[order], tuple(seeds), seed_set, none, cluster_of, np.full(len(ids), np.nan), first + place
    )


def target_weights(
    tree: ClusterTree,
    seeds: Mapping[str, Matrix],
    weights: Mapping[str, float] | None = None,
    *,
    metric: str,
    level: int = 1,
) -> np.ndarray:
    """The weight of every cluster in a mixture of the seed sets.

    w_c = Σ_d w_d N_dc / N_d, where N_dc of the N_d seeds of set d fall into cluster c, as in
    `retrieve_clusters`: V-JEPA 2 (Assran et al. 2025, appendix).

    Args:
        tree: of the pool.
        seeds: by name, (m, d) rows each, of the embeddings that the tree was made of.
        weights: w_d by name, for each set; None for 1 / D each, with D sets.
        metric: of the tree, "l2" or "cosine".
        level: of the clusters.

    Returns:
        (k,) float64, with the same sum as the w_d.

    Raises:
        ConfigError: an argument of the wrong shape, or a number out of range.
    """
    counts = _counts(tree, seeds, level, metric)
    if weights is None:
        weights = dict.fromkeys(seeds, 1 / len(seeds))
    if set(weights) != set(seeds):
        raise ConfigError(f"weights: expected one for each of {', '.join(seeds)}, found {', '.join(weights)}")
    for name, value in weights.items():
        if not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
            raise ConfigError(f"weights: that of {name!r} is {value!r}, expected a number of at least 0")
    share = counts / counts.sum(axis=1, keepdims=True)
    return np.array([float(weights[name]) for name in seeds]) @ share


class _Nearest:
    """The n nearest of all rows offered so far, for each seed.

    Products of float32 find what may be among them, and float64 decides, so that neither the shape of a
    product nor the library that makes it shows in the result.

    Args:
        seeds: (m, d).
        n: how many.
        least: cosine.

    Attributes:
        ids: (m, n) int64, nearest first; -1 where there are fewer.
        cosine: (m, n) float64, -inf where there are fewer.
    """

    def __init__(self, seeds: np.ndarray, n: int, least: float) -> None:
        self.seeds, self.n, self.least = seeds, n, least
        self.units = unit(seeds)
        self.ids = np.full((len(seeds), n), -1, np.int64)
        self.cosine = np.full((len(seeds), n), -np.inf)
        self.slack = (seeds.shape[1] + 8) * 2.0**-23  # more than float32 can be wrong by

    def offer(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Look at rows (b, d), finite and not zero, whose ids are above those of all rows before."""
        if not len(rows):
            return
        units = unit(rows)
        at_once = max(1, TILE // len(rows))
        for first in range(0, len(self.seeds), at_once):
            seed, column = self._candidates(slice(first, first + at_once), rows, units)
            seed += first
            cosine = np.round(cosines(self.seeds, seed, rows, column), _DIGITS)
            # A tie with the last one is lost, as its id is smaller.
            nearer = (cosine > self.cosine[seed, -1]) & (cosine >= self.least)
            self._merge(seed[nearer], ids[column[nearer]], cosine[nearer])

    def _candidates(self, seeds: slice, rows: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of seeds, counted from the slice's first, and rows that may be among the nearest."""
        close = self._close(self.units[seeds] @ units.T, seeds, self.slack)
        if np.count_nonzero(close) > _MANY * self.n * len(close):  # too like for float32 to tell apart
            scores = unit(self.seeds[seeds], np.float64) @ unit(rows, np.float64).T
            close = self._close(scores, seeds, 10.0**-_DIGITS + self.slack * 2.0**-29)
        seed, column = np.nonzero(close)
        return seed, column

    def _close(self, scores: np.ndarray, seeds: slice, slack: float) -> np.ndarray:
        """(s, b) bool: products that come within the slack of what is needed."""
        floor = np.maximum(self.cosine[seeds, -1], self.least) - slack
        close = scores >= floor.astype(scores.dtype)[:, None]
        place = scores.shape[1] - self.n
        if place > 0 and np.count_nonzero(close) > 4 * self.n * len(scores):  # as in the first block
            last = np.partition(scores, place, axis=1)[:, place] - 2 * slack
            close &= scores >= last.astype(scores.dtype)[:, None]
        return close

    def _merge(self, seed: np.ndarray, ids: np.ndarray, cosine: np.ndarray) -> None:
        touched, place = np.unique(seed, return_inverse=True)
        place = np.concatenate([np.repeat(np.arange(len(touched)), self.n), place])
        ids = np.concatenate([self.ids[touched].ravel(), ids])
        cosine = np.concatenate([self.cosine[touched].ravel(), cosine])
        order = np.lexsort((ids, -cosine, place))
        starts = np.searchsorted(place[order], np.arange(len(touched)))
        kept = order[starts[:, None] + np.arange(self.n)]
        self.ids[touched], self.cosine[touched] = ids[kept], cosine[kept]


def _counts(tree: ClusterTree, seeds: Mapping[str, Matrix], level: int, metric: str) -> np.ndarray:
    """(D, k) int64: how many seeds of each set fall into each cluster of a level."""
    check_choice("metric", metric, METRICS)
    whole_number("level", level, 1)
    if level not in tree.centroids:
        raise ConfigError(f"level: the tree has 1..{tree.n_levels}, found {level!r}")
    sets = _checked_seeds(seeds, tree.centroids[1].shape[1], directed=metric == "cosine")
    filled = np.flatnonzero(tree.sizes(1))  # others have no place in the levels above, and nothing to give
    if not len(filled):
        raise ConfigError("tree: it has no samples, so no seed falls into a cluster of it")
    found = np.zeros((len(sets), len(tree.centroids[level])), np.int64)
    for counts, rows in zip(found, sets.values(), strict=True):
        cluster = filled[nearest_centroids(rows, tree.centroids[1][filled], metric=metric, device="cpu")[0]]
        for above in range(2, level + 1):
            cluster = tree.parent[above][cluster]
        counts += np.bincount(cluster, minlength=len(counts))
    return found


def _checked_seeds(seeds: Mapping[str, Matrix], dimension: int, directed: bool) -> dict[str, np.ndarray]:
    """The rows of each set, (m, dimension), all finite, and none zero if they need a direction."""
    if not isinstance(seeds, Mapping) or not seeds:
        raise ConfigError(f"seeds: expected seed sets by name, found {_kind(seeds)}")
    found = {}
    for name, given in seeds.items():
        if _shape(f"seeds[{name!r}]", given)[1] != dimension:
            raise ConfigError(
                f"seeds[{name!r}]: rows of {given.shape[1]} numbers, expected {dimension} as in the pool; "
                "embed both with the same embedder"
            )
        rows = read_rows(given, slice(0, len(given))).cpu().numpy()
        usable = np.isfinite(rows).all(axis=1)
        if directed:
            usable &= rows.any(axis=1)
        if not usable.all():
            raise ConfigError(
                f"seeds[{name!r}]: row {int(usable.argmin())} is {'zero or ' if directed else ''}not finite "
                f"({int((~usable).sum())} such rows); leave these out"
            )
        found[name] = rows
    return found


def _allowed(size: int, valid: np.ndarray | None, exclude: np.ndarray | None) -> np.ndarray:
    """(n,) bool, a new array."""
    mask = np.ones(size, bool) if valid is None else np.array(valid)
    if mask.shape != (size,) or mask.dtype != bool:
        raise ConfigError(
            f"valid: expected ({size},) of bool, as the pool, found {mask.shape} of {mask.dtype}"
        )
    if exclude is not None and np.size(exclude):
        ids = np.asarray(exclude)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ConfigError(f"exclude: expected a list of ids, found {ids.dtype} of shape {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ConfigError(f"exclude: id {bad} is not in the pool, whose ids go from 0 to {size - 1}")
        mask[ids] = False
    return mask


def _shape(name: str, matrix: Matrix) -> tuple[int, int]:
    shape = tuple(getattr(matrix, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ConfigError(f"{name}: expected rows (n, d), at least one, found {_kind(matrix)}")
    if not any(kind in str(matrix.dtype) for kind in ("float", "int")):
        raise ConfigError(f"{name}: expected numbers, found {matrix.dtype}")
    return int(shape[0]), int(shape[1])


def _kind(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{'' if shape is None else f' of shape {tuple(shape)}'}"
