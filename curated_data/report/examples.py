"""Which samples of a curation to show as examples, and their images as thumbnails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from curated_data.clustering.tree import ClusterTree
from curated_data.errors import SampleError
from curated_data.pool.image import decode_image
from curated_data.selection.metrics import selected_sizes

if TYPE_CHECKING:
    from curated_data.pool import ShardPool


@dataclass(frozen=True)
class ClusterRow:
    """One row of a contact sheet: a cluster with examples of its kept and dropped samples.

    Attributes:
        why: why it is shown: "largest", "smallest" or "most cut".
        level, cluster: of the tree.
        size: its number of samples in the pool.
        n_kept: how many different ones of them were selected.
        kept, dropped: (<= n_images,) example ids.
    """

    why: str
    level: int
    cluster: int
    size: int
    n_kept: int
    kept: np.ndarray
    dropped: np.ndarray


def cluster_rows(
    tree: ClusterTree,
    ids: np.ndarray,
    *,
    choose: Literal["largest", "smallest", "most cut"] = "largest",
    level: int = 1,
    n_clusters: int = 4,
    n_images: int = 8,
    exclude: Sequence[int] = (),
    least: int = 1,
    seed: int = 0,
) -> list[ClusterRow]:
    """Clusters worth looking at, with random examples of kept and dropped samples.

    Args:
        choose: the clusters with the most samples, the fewest, or the largest share dropped.
        exclude: clusters to skip, such as those already shown.
        least: the minimum number of samples of a cluster.
        n_images: number of examples of each kind.
    """
    sizes = tree.sizes(level)
    n_kept = selected_sizes(tree, np.unique(ids))[level]
    key = {"largest": -sizes, "smallest": sizes, "most cut": n_kept / np.maximum(sizes, 1)}.get(choose)
    if key is None:
        raise ValueError(f"choose={choose!r}: give 'largest', 'smallest' or 'most cut'")
    order = np.lexsort((-sizes, key))
    order = order[(sizes[order] >= max(least, 1)) & ~np.isin(order, list(exclude))][:n_clusters]
    kept_mask = np.zeros(tree.n_samples, bool)
    kept_mask[ids] = True
    cluster_of = tree.assignment(level)
    rows = []
    for cluster in order.tolist():
        members = np.flatnonzero(cluster_of == cluster)  # a few passes; `members` would sort all samples
        rng = np.random.default_rng([seed, level, cluster])
        kept = np.sort(random_subset(members[kept_mask[members]], n_images, rng))
        dropped = np.sort(random_subset(members[~kept_mask[members]], n_images, rng))
        rows.append(
            ClusterRow(choose, level, cluster, int(sizes[cluster]), int(n_kept[cluster]), kept, dropped)
        )
    return rows


def thumbnails(pool: "ShardPool", ids: np.ndarray, size: int) -> np.ndarray:
    """(n, size, size, 3) uint8: the whole images on white; a crossed tile if one cannot be decoded."""
    out = np.full((len(ids), size, size, 3), 255, np.uint8)
    extensions = [e for e in pool.image_extensions if e in pool.index().extensions]
    unique, inverse = np.unique(np.asarray(ids, np.int64), return_inverse=True)
    for first in range(0, len(unique), 256):
        for i, sample in enumerate(pool.read(unique[first : first + 256], extensions), first):
            data = next((sample[e] for e in extensions if e in sample), b"")
            try:
                tile = _fit(decode_image(data, min_size=size, settings=pool.images), size)
            except SampleError:
                tile = _crossed(size)
            out[inverse == i] = tile
    return out


def _fit(image: torch.Tensor, size: int) -> np.ndarray:
    """An image (3, H, W), scaled to fit a square and centred on white: (size, size, 3)."""
    height, width = image.shape[1:]
    scale = size / max(height, width)
    shape = max(round(height * scale), 1), max(round(width * scale), 1)
    image = F.interpolate(image[None].float(), shape, mode="bilinear", antialias=True)[0]
    tile = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    tile[top : top + shape[0], left : left + shape[1]] = image.round().byte().permute(1, 2, 0).numpy()
    return tile


def _crossed(size: int) -> np.ndarray:
    tile = np.full((size, size, 3), 235, np.uint8)
    diagonal = np.arange(size)
    tile[diagonal, diagonal] = tile[diagonal, size - 1 - diagonal] = 160
    return tile


def random_subset(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `most` of the values, in no particular order."""
    return values if len(values) <= most else rng.choice(values, most, replace=False)
