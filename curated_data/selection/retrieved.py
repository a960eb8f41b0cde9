"""What was retrieved by seed sets, as it is stored in a cache."""

from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.layout import RETRIEVAL
from curated_data.cache.remedies import Remedy
from curated_data.selection.retrieval import Retrieved

_INTEGERS = ("ids", "seed_set", "seed", "cluster", "rank")


def save_retrieved(folder: Path, found: Retrieved) -> dict[str, Any]:
    """Write the arrays, before the folder's manifest; returns what that has to hold."""
    for name in (*_INTEGERS, "cosine"):
        np.save(folder / f"{name}.npy", getattr(found, name))
    return {"names": list(found.names), "size": len(found.ids)}


def load_retrieved(folder: Path, n_samples: int) -> Retrieved:
    """Read what `save_retrieved` wrote, of a pool of so many samples.

    Raises:
        CacheError: it is missing or damaged.
    """
    manifest = read_manifest(folder, RETRIEVAL)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        names, shape = tuple(map(str, manifest["names"])), (int(manifest["size"]),)
    arrays = {name: read_array(folder, name, manifest, dtype=np.int64, shape=shape) for name in _INTEGERS}
    cosine = read_array(folder, "cosine", manifest, dtype=np.float64, shape=shape)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        for name, most in (("seed_set", len(names)), ("ids", n_samples)):
            values = arrays[name]
            if len(values) and not 0 <= values.min() <= values.max() < most:
                raise ValueError(f"{name} from {values.min()} to {values.max()}, of {most}")
    return Retrieved(names=names, cosine=cosine, **arrays)


def first_retrieved(found: Retrieved, limit: dict[str, int] | None = None) -> np.ndarray:
    """Places in `found`, the best first: by rank, then by cosine, then by id.

    Args:
        limit: the most of each set; None for all.
    """
    order = np.lexsort((found.ids, -np.nan_to_num(found.cosine), found.rank))
    if limit is None:
        return order
    kept = np.ones(len(order), bool)
    for number, name in enumerate(found.names):
        if name in limit:
            kept[np.flatnonzero(found.seed_set[order] == number)[limit[name] :]] = False
    return order[kept]
