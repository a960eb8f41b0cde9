"""The cluster tree: plain arrays for each level, and what is derived from them."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest, verify_once, write_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.publishing import atomic_path, atomic_save
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import TEMPORARY, remove, set_aside
from curated_data.clustering.rows import METRICS
from curated_data.errors import CacheError
from curated_data.matrix import Matrix

log = logging.getLogger(__name__)

EXCLUDED = -1
_BLOCK = 1 << 20  # nodes looked at at once


class Children(NamedTuple):
    """The nodes below every cluster of a level, as compressed rows.

    Attributes:
        nodes: (m,) int64, nodes of the level below (samples for level 1), grouped by cluster and ascending
            within each.
        start: (k + 1,) int64; cluster c has `nodes[start[c] : start[c + 1]]`.
    """

    nodes: np.ndarray
    start: np.ndarray


class ClusterTree:
    """Clusters of clusters of samples.

    Level 0 consists of the n samples, level l = 1..L of k_l clusters of the nodes of level l - 1. Everything
    else (member lists, sizes) is derived on first use.

    Args:
        centroids: for each level 1..L, (k_l, d) floating point; kept as float32.
        parent: for each level l, the cluster at level l of every node of level l - 1, (k_{l-1},) integers,
            (n,) for level 1; -1 for samples (or empty clusters) that belong to none. Kept as int64.
        distance: (n,) Euclidean distance of each sample to its level-1 centroid, NaN if excluded; "closest"
            and "furthest" sampling sort by it. Kept as float32.
        metric: by which samples belong to their nearest centroid, "l2" or "cosine".

    Raises:
        ValueError: levels other than 1..L in both, shapes or cluster ids that do not match, or another
            metric.

    Examples:
        >>> import numpy as np
        >>> from curated_data import ClusterTree
        >>> centroids = {1: np.array([[0.0], [1.0], [9.0]]), 2: np.array([[0.5], [9.0]])}
        >>> parent = {1: np.array([0, 0, 1, 2, -1]), 2: np.array([0, 0, 1])}
        >>> tree = ClusterTree(centroids, parent)
        >>> tree.sizes(2).tolist(), tree.members(2, 0).tolist()
        ([3, 1], [0, 1, 2])
    """

    def __init__(
        self,
        centroids: Mapping[int, ArrayLike],
        parent: Mapping[int, ArrayLike],
        distance: ArrayLike | None = None,
        *,
        metric: str = "l2",
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric needs to be one of {', '.join(METRICS)}, got {metric!r}")
        self.metric = metric
        levels = sorted(centroids)
        if not levels or levels != list(range(1, len(levels) + 1)) or sorted(parent) != levels:
            raise ValueError(
                f"centroids and parent need levels 1..L each, got {sorted(centroids)} and {sorted(parent)}"
            )
        self.centroids = {level: _checked_centroids(centroids[level], level) for level in levels}
        self.parent = {level: _checked_ids(parent[level], level) for level in levels}
        dimensions = {level: self.centroids[level].shape[1] for level in levels}
        if len(set(dimensions.values())) > 1:
            raise ValueError(f"centroids of all levels need the same dimension, got {dimensions} by level")
        for level in levels:
            k = len(self.centroids[level])
            ids = self.parent[level]
            if len(ids) and (ids.min() < EXCLUDED or ids.max() >= k):
                raise ValueError(
                    f"parent[{level}] needs cluster ids in -1..{k - 1}, found {ids.min()}..{ids.max()}"
                )
            if level > 1 and len(ids) != len(self.centroids[level - 1]):
                raise ValueError(
                    f"parent[{level}] needs one entry for each of {len(self.centroids[level - 1])} clusters "
                    f"of level {level - 1}, got {len(ids)}"
                )
        self.distance: np.ndarray | None = None
        if distance is not None:
            self.distance = np.asarray(distance, dtype=np.float32)
            if self.distance.shape != (self.n_samples,):
                raise ValueError(f"distance needs shape ({self.n_samples},), got {self.distance.shape}")
        self._children: dict[int, Children] = {}
        self._sizes: dict[int, np.ndarray] = {}

    @property
    def n_levels(self) -> int:
        """The number of levels of clusters, without the samples."""
        return len(self.centroids)

    @property
    def n_samples(self) -> int:
        """The number of samples, including excluded ones."""
        return len(self.parent[1])

    @property
    def n_clusters(self) -> dict[int, int]:
        """k_l by level."""
        return {level: len(c) for level, c in self.centroids.items()}

    def children(self, level: int) -> Children:
        """The nodes of the level below in every cluster of a level."""
        level = self._checked_level(level)
        if level not in self._children:
            self._children[level] = _group(self.parent[level], len(self.centroids[level]))
        return self._children[level]

    def members(self, level: int, cluster: int) -> np.ndarray:
        """Ids of the samples below one cluster of any level, ascending, int64."""
        level = self._checked_level(level)
        k = len(self.centroids[level])
        if not 0 <= cluster < k:
            raise ValueError(f"level {level} has clusters 0..{k - 1}, got {cluster}")
        nodes = np.array([cluster], dtype=np.int64)
        for below in range(level, 0, -1):
            nodes = take_groups(self.children(below), nodes)
        return np.sort(nodes)

    def sizes(self, level: int) -> np.ndarray:
        """The number of samples in each cluster of a level, (k_l,) int64."""
        level = self._checked_level(level)
        if level not in self._sizes:
            weights: np.ndarray | None = None
            for below in range(1, level + 1):
                weights = _counts(self.parent[below], weights, len(self.centroids[below]))
            assert weights is not None
            self._sizes[level] = weights.astype(np.int64)
        return self._sizes[level].copy()

    def assignment(self, level: int, ids: np.ndarray | None = None) -> np.ndarray:
        """The cluster of every sample at a level, (n,) int64; -1 if excluded.

        Args:
            ids: (m,) the samples to look up, for an array (m,); None for all.
        """
        level = self._checked_level(level)
        node = self.parent[1].copy() if ids is None else self.parent[1][ids]
        return self._above(node, level)

    def _above(self, node: np.ndarray, level: int) -> np.ndarray:
        """The clusters at a level above clusters of level 1, in place; -1 stays."""
        for above in range(2, level + 1):
            inside = node >= 0
            node[inside] = self.parent[above][node[inside]]
        return node

    def assign(self, rows: Matrix, level: int = 1, *, device: str = "auto") -> np.ndarray:
        """The cluster of other rows at a level, (m,) int64; -1 for rows that cannot be placed.

        A row belongs to the cluster of its nearest centroid of level 1, and to those above it. So do the new
        samples of a pool that has grown.

        Args:
            rows: (m, d) array, memory map or tensor, any float dtype.
            level: of the clusters.
            device: of the computation.

        Raises:
            ValueError: an unknown level, or rows of another length.
        """
        from curated_data.clustering.kmeans import nearest_centroids

        level = self._checked_level(level)
        node = nearest_centroids(rows, self.centroids[1], metric=self.metric, device=device)[0]
        return self._above(node, level)

    def save(self, path: Path | str) -> None:
        """Write the tree as a folder of `.npy` files and a `manifest.json`; replaces an existing tree.

        The folder appears complete or not at all.

        Raises:
            CacheError: `path` cannot be written, or is something other than a tree.
        """
        path = Path(path)
        _check_replaceable(path)
        with atomic_path(path) as temporary:
            temporary.mkdir()
            for level in self.centroids:
                atomic_save(temporary / f"centroids_{level}.npy", self.centroids[level])
                atomic_save(temporary / f"parent_{level}.npy", self.parent[level])
            if self.distance is not None:
                atomic_save(temporary / "distance.npy", self.distance)
            write_manifest(temporary, "tree", self._manifest())
            if (path / MANIFEST).exists():
                aside = set_aside(path, below=path.parent)
                os.replace(temporary, path)
                if aside is not None:
                    remove(aside, below=path.parent)
                temporary.mkdir()  # for `atomic_path`, whose rename onto an existing folder has no effect

    @classmethod
    def load(cls, path: Path | str, *, memory_map: bool = False) -> Self:
        """Read a tree that `save` wrote, and compare it with its checksums.

        Args:
            memory_map: leave the arrays on disk. Processes of one machine then share their pages, instead of
                a copy each. Writing to them changes nothing on disk.

        Raises:
            CacheError: there is no tree, or it is damaged or of another format version.
        """
        path = Path(path)
        manifest = read_manifest(path, "tree")
        if memory_map:
            verify_once(path, manifest)

        def read(name: str) -> np.ndarray:
            return read_array(path, name, manifest, map_mode="c" if memory_map else None)

        if "metric" not in manifest:
            raise CacheError(
                f"{path}: an earlier version built this tree, and did not record its metric; build it again"
            )
        with reading(path, Remedy(path / MANIFEST)):
            levels = range(1, int(manifest["n_levels"]) + 1)
            tree = cls(
                {level: read(f"centroids_{level}") for level in levels},
                {level: read(f"parent_{level}") for level in levels},
                read("distance") if manifest["distance"] else None,
                metric=manifest["metric"],
            )
            if tree._manifest() != {key: manifest.get(key) for key in tree._manifest()}:
                raise ValueError("its arrays do not match its manifest")
        return tree

    def __repr__(self) -> str:
        levels = " < ".join(f"{k}" for k in reversed(self.n_clusters.values()))
        d = self.centroids[1].shape[1]
        return f"ClusterTree({levels} < {self.n_samples} samples, d={d}, {self.metric})"

    def _manifest(self) -> dict[str, Any]:
        return {
            "n_levels": self.n_levels,
            "n_samples": self.n_samples,
            "n_clusters": list(self.n_clusters.values()),
            "dimension": self.centroids[1].shape[1],
            "distance": self.distance is not None,
            "metric": self.metric,
        }

    def _checked_level(self, level: int) -> int:
        if level not in self.centroids:
            raise ValueError(f"the tree has levels 1..{self.n_levels}, got {level}")
        return int(level)


def take_groups(children: Children, clusters: np.ndarray) -> np.ndarray:
    """The nodes of several clusters, one cluster after the other."""
    first = children.start[clusters]
    length = children.start[clusters + 1] - first
    total = int(length.sum())
    # The position of every output element within its group, without a loop: a ramp that restarts per group.
    shift = np.repeat(first - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    return children.nodes[np.arange(total, dtype=np.int64) + shift]


def _check_replaceable(path: Path) -> None:
    """Check that a tree can be saved at `path`: there is nothing, or a tree and nothing else.

    Raises:
        CacheError: there is something else, which would be lost.
    """
    if path.is_symlink() or not os.path.lexists(path):
        kind = "is a link" if path.is_symlink() else None
    elif not path.is_dir():
        kind = "is not a folder"
    else:
        there = {entry.name for entry in path.iterdir() if not entry.name.startswith(TEMPORARY)}
        written = {MANIFEST, *read_manifest(path, "tree")["files"]} if MANIFEST in there else set()
        kind = next((f"holds {name!r}, not part of a tree" for name in sorted(there - written)), None)
    if kind is not None:
        raise CacheError(f"{path}: {kind}, so no cluster tree is saved there; give another path")


def _counts(ids: np.ndarray, weights: np.ndarray | None, k: int) -> np.ndarray:
    """(k,) float64 number of nodes, or sum of their weights, in each cluster; exact up to 2**53 samples."""
    counted = np.zeros(k + 1)  # the first for excluded nodes
    for start in range(0, len(ids), _BLOCK + k):
        part = slice(start, start + _BLOCK + k)
        some = None if weights is None else weights[part]
        counted += np.bincount(ids[part] + 1, weights=some, minlength=k + 1)
    return counted[1:]


def _group(ids: np.ndarray, k: int) -> Children:
    """Group nodes by cluster, without excluded ones, by a counting sort, which is linear in n."""
    n = len(ids)
    dtype = np.int32 if n < 2**31 else np.int64  # halves the memory that the sort takes
    held = ids >= 0
    column_start = np.zeros(n + 1, dtype)
    np.cumsum(held, dtype=dtype, out=column_start[1:])
    rows = ids[held].astype(dtype)
    by_row = sparse.csc_array((np.ones(len(rows), np.int8), rows, column_start), shape=(k, n)).tocsr()
    return Children(by_row.indices.astype(np.int64), by_row.indptr.astype(np.int64))


def _checked_centroids(values: ArrayLike, level: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating) or 0 in array.shape:
        raise ValueError(
            f"centroids[{level}] needs a floating-point array (k, d), k and d >= 1, got {array.dtype} "
            f"{array.shape}"
        )
    array = array.astype(np.float32, copy=False)
    at_once = max(_BLOCK // array.shape[1], 1)
    if not all(np.isfinite(array[i : i + at_once]).all() for i in range(0, len(array), at_once)):
        raise ValueError(f"centroids[{level}] has non-finite values")
    return array


def _checked_ids(values: ArrayLike, level: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"parent[{level}] needs one dimension of integers, got {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=False)
