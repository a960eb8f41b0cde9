"""Measures of how balanced a selection is and how well it covers its pool, which need no training.

Balance over clusters (perplexity, Gini coefficient, share covered), over classes if there are labels
(entropy, head-to-tail ratio), and over space (Kullback-Leibler divergence from the uniform density in low
dimension); and coverage, the distance of samples to the nearest selected one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import faiss
import numpy as np

from curated_data.clustering.tree import ClusterTree
from curated_data.errors import SampleError
from curated_data.matrix import unit
from curated_data.selection.links import stored_rows

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore
    from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

_MANY_CLASSES = 1 << 16  # up to so many, or as many as there are samples, an array may count every number
_SEARCHED_BYTES = 1 << 29  # of selected rows that are searched at once


def perplexity(counts: np.ndarray) -> float:
    """exp of the Shannon entropy of counts: the number of equal counts with the same entropy.

    Args:
        counts: (k,) non-negative, such as cluster sizes; all zero gives 0.
    """
    return float(np.exp(entropy(counts))) if np.any(counts) else 0.0


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy, in nats, of the shares of `counts` (k,) in their sum; 0 if all are zero."""
    counts = _checked_counts(counts)
    shares = counts[counts > 0] / counts.sum()
    return float(max(-(shares * np.log(shares)).sum(), 0.0))


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of counts (k,): 0 if all are equal, 1 - 1/k if one has everything.

    Half the mean absolute difference between two counts, divided by their mean.
    """
    counts = np.sort(_checked_counts(counts))
    if not counts.any():
        return 0.0
    place = np.arange(1, len(counts) + 1)
    return float((2 * place - len(counts) - 1) @ counts / (len(counts) * counts.sum()))


def head_to_tail(counts: np.ndarray) -> float:
    """The largest count divided by the smallest; infinite if one is zero."""
    counts = _checked_counts(counts)
    if not counts.any():
        return float("nan")
    return float(counts.max() / counts.min()) if counts.min() else float("inf")


@dataclass(frozen=True)
class LevelBalance:
    """The balance of one level of a cluster tree, for the pool and for a selection.

    Attributes:
        level: from 1, the lowest.
        n_clusters: clusters with at least one sample of the pool, to which the other numbers refer.
        n_empty: clusters without any.
        size_min, size_median, size_max: samples of the pool per cluster.
        perplexity, gini: of the pool's cluster sizes.
        selected_perplexity, selected_gini: of the numbers selected from each cluster, including repeats.
        covered: share of the clusters from which at least one sample was selected.
    """

    level: int
    n_clusters: int
    n_empty: int
    size_min: int
    size_median: float
    size_max: int
    perplexity: float
    gini: float
    selected_perplexity: float
    selected_gini: float
    covered: float


def cluster_balance(tree: ClusterTree, ids: np.ndarray) -> list[LevelBalance]:
    """The balance of clusters in the pool and in a selection, at each level from the lowest up.

    Args:
        tree: over n samples.
        ids: (m,) selected samples, including repeats.
    """
    return [
        _level_balance(level, tree.sizes(level), selected)
        for level, selected in selected_sizes(tree, ids).items()
    ]


def selected_sizes(tree: ClusterTree, ids: np.ndarray) -> dict[int, np.ndarray]:
    """For each level, (k_l,) the number of selected ids in each cluster, including repeats."""
    node = _checked_ids(ids, tree.n_samples)
    sizes = {}
    for level in range(1, tree.n_levels + 1):
        node = tree.parent[level][node]
        node = node[node >= 0]
        sizes[level] = np.bincount(node, minlength=len(tree.centroids[level]))
    return sizes


@dataclass(frozen=True)
class ClassBalance:
    """The classes of a pool before and after selection; samples without a label (-1) are ignored.

    Attributes:
        before, after: (n_classes,) int64 samples of each class in the pool and in the selection.
        entropy_before, entropy_after: in nats; at most log(n_classes).
        ratio_before, ratio_after: largest class divided by smallest, infinite if one is missing.
        classes: (n_classes,) int64, the class that each entry of `before` and `after` counts: 0, 1, … to the
            largest, or only those that occur if there are far fewer of them than the largest number.
    """

    before: np.ndarray
    after: np.ndarray
    entropy_before: float
    entropy_after: float
    ratio_before: float
    ratio_after: float
    classes: np.ndarray

    def names(self, class_names: Sequence[str] | None) -> list[str]:
        """The name of each entry, from the names of classes 0, 1, …; None gives the numbers of the classes.

        Raises:
            ValueError: there are too few names.
        """
        if class_names is None:
            return [str(number) for number in self.classes.tolist()]
        if len(class_names) <= self.classes[-1]:
            raise ValueError(f"{len(class_names)} class_names, but the labels go up to {self.classes[-1]}")
        return [class_names[number] for number in self.classes.tolist()]

    def places(self, labels: np.ndarray) -> np.ndarray:
        """(n,) int64, the entry of each sample's class; -1 for samples without one.

        Args:
            labels: (n,) the labels that were counted.
        """
        return np.where(labels >= 0, np.searchsorted(self.classes, labels), -1)


def class_balance(labels: np.ndarray, ids: np.ndarray) -> ClassBalance | None:
    """Class counts of a pool and of a selection; None if no sample has a label.

    Args:
        labels: (n,) integer class of each sample, -1 for none. Only classes that occur in the pool count;
            the arrays end with the largest of them.
        ids: (m,) selected samples.

    Raises:
        ValueError: labels that are not integers, or ids out of range.
    """
    labels = checked_labels(labels)
    chosen = labels[_checked_ids(ids, len(labels))]
    labels, chosen = labels[labels >= 0], chosen[chosen >= 0]
    if not len(labels):
        return None
    largest = int(labels.max())
    if largest < max(_MANY_CLASSES, len(labels)):
        classes = np.arange(largest + 1)
        before, after = (np.bincount(part, minlength=largest + 1) for part in (labels, chosen))
    else:  # such as hashes: an array up to the largest may exceed the memory
        classes, before = np.unique(labels, return_counts=True)
        after = np.bincount(np.searchsorted(classes, chosen), minlength=len(classes))
    occurs = before > 0
    return ClassBalance(
        before,
        after,
        entropy_before=entropy(before),
        entropy_after=entropy(after),
        ratio_before=head_to_tail(before[occurs]),
        ratio_after=head_to_tail(after[occurs]),
        classes=classes,
    )


def checked_labels(labels: np.ndarray) -> np.ndarray:
    """Labels as int64.

    Raises:
        ValueError: they are not integers.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels need to be integers, -1 for none, got {labels.dtype}; give .astype(int)")
    return labels.astype(np.int64, copy=False)


def read_labels(pool: "ShardPool", ids: np.ndarray | None = None) -> np.ndarray | None:
    """The classes of a pool, or of some of its samples, for figures about them; None if it has none, or, with
    a warning, if its `.cls` members are not integers, as those of a decoder's own need not be.
    """
    if not pool.has_labels:
        return None
    try:
        return pool.labels(np.arange(len(pool)) if ids is None else ids)
    except SampleError as error:
        log.warning("no figures about classes: %s", error)
        return None


def coverage_distance(
    embeddings: "np.ndarray | EmbeddingStore",
    ids: np.ndarray,
    *,
    queries: np.ndarray | None = None,
    metric: str = "l2",
    block: int = 16_384,
) -> np.ndarray:
    """The distance of samples to the nearest selected one; the largest is the coverage radius.

    An exact search in blocks of both, so memory does not grow with either. For a pool of 1e8 use a random
    subset as `queries`: ten thousand estimate the quantiles well.

    Args:
        embeddings: (n, d) array, memory map or store.
        ids: (m,) selected samples, at least one, with finite rows.
        queries: (q,) the samples to measure; None for all n.
        metric: `l2` for the Euclidean distance, `cosine` for 1 - cosine similarity.

    Returns:
        (q,) float32; NaN for samples whose row is not finite.
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r}: give 'l2' or 'cosine'")
    ids = np.unique(_checked_ids(ids, len(embeddings)))
    if not len(ids):
        raise ValueError("the coverage of an empty selection is not defined: give at least one id")
    queries = np.arange(len(embeddings)) if queries is None else _checked_ids(queries, len(embeddings))
    dimension = embeddings.shape[1]
    at_once = max(_SEARCHED_BYTES // (4 * dimension), 1)
    distance = np.full(len(queries), np.nan, np.float32)
    for begin in range(0, len(ids), at_once):
        kept = _rows(embeddings, ids[begin : begin + at_once], metric)
        # The search uses |x|² - 2xy + |y|², which suffers from cancellation: far from the origin, rows are
        # moved there, and the distance of what is found is computed again.
        origin = kept.mean(0) if metric == "l2" else np.zeros(dimension, np.float32)
        kept -= origin
        index = faiss.IndexFlatIP(dimension) if metric == "cosine" else faiss.IndexFlatL2(dimension)
        index.add(kept)
        for first in range(0, len(queries), block):
            rows = _rows(embeddings, queries[first : first + block], metric) - origin
            finite = np.flatnonzero(np.isfinite(rows).all(axis=1))
            nearest = index.search(rows[finite], 1)[1][:, 0]
            squared = ((rows[finite] - kept[nearest]) ** 2).sum(axis=1)
            if metric == "cosine":  # rows of zeros are at a right angle to all others
                zero = (rows[finite] == 0).all(axis=1) | (kept[nearest] == 0).all(axis=1)
                here = np.where(zero, 1, squared / 2)
            else:
                here = np.sqrt(squared)
            distance[first + finite] = np.fmin(distance[first + finite], here)
    return distance


def kl_to_uniform(
    points: np.ndarray, low: float, high: float, *, bandwidth: float = 0.5, step: float = 0.1
) -> float:
    """KL(density of points || uniform on the box [low, high]^d), the paper's measure in low dimension.

    The density is a Gaussian kernel estimate at the cell centres of a grid over the box, normalised to a sum
    of one: mass outside the box is ignored.

    Args:
        points: (n, d), with d from 1 to 3.
        bandwidth: standard deviation of the kernel, in the units of `points`.
        step: approximate cell size of the grid, of which a whole number fits the box's side.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or not 1 <= points.shape[1] <= 3 or not len(points):
        raise ValueError(f"points have shape {points.shape}: give (n, d) with n at least 1 and d of 1 to 3")
    n_cells = max(round((high - low) / step), 1)
    grid = low + (np.arange(n_cells) + 0.5) * (high - low) / n_cells
    axes = "abc"[: points.shape[1]]
    density = np.zeros((n_cells,) * points.shape[1])
    for first in range(0, len(points), 4096):
        # The kernel is a product over dimensions, so the sum over points is a product of matrices.
        kernels = np.exp(-0.5 * ((points[first : first + 4096, :, None] - grid) / bandwidth) ** 2)
        terms = ",".join(f"n{axis}" for axis in axes)
        density += np.einsum(f"{terms}->{axes}", *kernels.transpose(1, 0, 2), optimize=True)
    if not density.any():
        raise ValueError(f"no point is anywhere near the box [{low}, {high}]")
    shares = density[density > 0] / density.sum()
    return float((shares * np.log(shares * density.size)).sum())


def _level_balance(level: int, sizes: np.ndarray, selected: np.ndarray) -> LevelBalance:
    held = sizes > 0
    sizes, selected = sizes[held], selected[held]
    some = len(sizes) > 0
    return LevelBalance(
        level=level,
        n_clusters=len(sizes),
        n_empty=int((~held).sum()),
        size_min=int(sizes.min()) if some else 0,
        size_median=float(np.median(sizes)) if some else 0.0,
        size_max=int(sizes.max()) if some else 0,
        perplexity=perplexity(sizes),
        gini=gini(sizes),
        selected_perplexity=perplexity(selected),
        selected_gini=gini(selected),
        covered=float((selected > 0).mean()) if some else 0.0,
    )


def _rows(embeddings: "np.ndarray | EmbeddingStore", ids: np.ndarray, metric: str) -> np.ndarray:
    rows = np.ascontiguousarray(stored_rows(embeddings, ids), np.float32)
    return unit(rows) if metric == "cosine" else rows


def _checked_counts(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or (counts < 0).any() or not np.isfinite(counts).all():
        raise ValueError(
            f"counts need to be one-dimensional, finite and not negative, got shape {counts.shape}"
        )
    return counts


def _checked_ids(ids: np.ndarray, n: int) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"ids need to be one-dimensional integers, got {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= n):
        raise ValueError(f"ids need to be in 0..{n - 1}, found {ids.min()}..{ids.max()}")
    return ids.astype(np.int64, copy=False)
