"""The clusters by which an epoch is stratified, kept beside the selection that it streams."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.checksums import load_npz
from curated_data.cache.layout import STREAMING
from curated_data.cache.publishing import atomic_path
from curated_data.errors import CacheError, ConfigError


def check_level(level: int, n_levels: int) -> None:
    """Check the level by which an epoch is stratified.

    Raises:
        ConfigError: a tree of so many levels does not have it.
    """
    if level not in range(1, n_levels + 1):
        levels = "level 1" if n_levels == 1 else f"levels 1 to {n_levels}"
        raise ConfigError(f"stratify_level: the tree has {levels}, found {level!r}")


def strata(
    ids: np.ndarray | None,
    level: int,
    *,
    find: Callable[[int, np.ndarray | None], np.ndarray] | None,
    tree: str,
    cache_dir: Path,
    keep: bool,
) -> np.ndarray:
    """The cluster of each id.

    They are kept, because a re-curation removes the tree of the last one, and a run may resume from before.

    Args:
        ids: (n,) of the selection; None for the whole pool.
        level: of the tree.
        find: the clusters of ids in the tree; None if it has been removed: then those that were kept count.
        tree: the name of its folder.
        cache_dir: where they are kept, 8 bytes per id.
        keep: keep them now; one rank is enough.

    Raises:
        CacheError: neither the tree nor its clusters are there, or these are damaged.
    """
    path = cache_dir / STREAMING / f"{fingerprint(selection=ids, tree=tree, level=level)}.npz"
    if find is not None:
        clusters = find(level, ids)
        if keep and not path.exists():
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, clusters=clusters)  # an archive, which has checksums
        return clusters
    if not path.exists():
        raise CacheError(
            f"stratify_level: the clusters of the resumed selection are gone from the cache, tree {tree} "
            f"and {path}; resume from a later checkpoint"
        )
    remedy = "remove it and resume from a later checkpoint"
    clusters = load_npz(path, ["clusters"], remedy)["clusters"]
    is_right = clusters.ndim == 1 and clusters.dtype.kind in "iu"
    if not is_right or (ids is not None and len(clusters) != len(ids)):
        expected = "one cluster per id" if ids is None else f"the clusters of {len(ids)} ids"
        raise CacheError(f"{path}: damaged ({clusters.shape} {clusters.dtype}, not {expected}); {remedy}")
    return clusters
