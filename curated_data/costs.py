"""A curation's expected costs: seconds of embedding and clustering from measured rates, and bytes on disk and
in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from curated_data.clustering.rows import BLOCK
from curated_data.clustering.seeding import SCORES_BYTES
from curated_data.config import CurationConfig
from curated_data.levels import resampled_size
from curated_data.selection.links import ONE_CELL

_ROWS_IN_TRANSIT = 8 * BLOCK  # converted at once
_LIBRARIES = 60_000_000  # bytes of buffers that torch, BLAS and faiss allocate on first use


@dataclass(frozen=True)
class Stage:
    """One stage of a curation.

    Attributes:
        name: embed, near_duplicates, cluster, sample, or train.
        cached: whether all of it is in the cache.
        seconds: expected on the machine that was measured; 0 if cached, None if it was not measured.
        note: what the stage does, in words.
    """

    name: str
    cached: bool
    seconds: float | None
    note: str


@dataclass(frozen=True)
class Rates:
    """What one process does per second.

    Attributes:
        samples: embedded; None if the probe could embed none.
        kmeans: units of `kmeans_work`.
    """

    samples: float | None
    kmeans: float


def expected_stages(
    n: int,
    dimension: int,
    config: CurationConfig,
    rates: Rates,
    *,
    n_missing: int,
    cached: Mapping[str, bool],
    ranks: int = 1,
) -> list[Stage]:
    """The stages of a curation, with the seconds that embedding and clustering are expected to take.

    Args:
        n: samples that are clustered.
        dimension: length of an embedding.
        config: with derived levels filled in.
        rates: of one process.
        n_missing: samples that are not embedded yet.
        cached: whether near_duplicates, cluster and sample are in the cache.
        ranks: number of processes that share the work.
    """
    embed = 0.0 if not n_missing else (n_missing / rates.samples / ranks if rates.samples else None)
    totals = [level.n_clusters * level.n_splits for level in config.levels or ()]
    stages = [Stage("embed", not n_missing, embed, f"{n_missing:,} samples to embed, length {dimension}")]
    work: list[tuple[str, float | None, str]] = []
    if config.near_duplicates.enabled:
        work.append(("near_duplicates", None, "each sample's nearest neighbours, on one rank"))
    shape = " > ".join(f"{total:,}" for total in totals)
    seconds = clustering_work(n, dimension, config) / rates.kmeans / ranks
    work.append(("cluster", seconds, f"clusters {shape}"))
    work.append(("sample", None, f"{config.target_size:,} ids"))
    for name, expected, note in work:
        is_cached = bool(cached.get(name))
        stages.append(Stage(name, is_cached, 0.0 if is_cached else expected, note))
    return stages


def clustering_work(n: int, dimension: int, config: CurationConfig) -> float:
    """All k-means runs of a tree and the assignments after resamplings, in units of `kmeans_work`.

    A resampling takes a few rows around each centroid, and converges sooner than the whole level does.
    """
    work = 0.0
    for level in config.levels or ():
        k, d = level.n_clusters, dimension
        work += config.n_init * kmeans_work(n, k, d)
        if level.n_splits > 1:  # each group by itself, on all its rows
            work += k * kmeans_work(n / k, level.n_splits, d)
        else:
            size = resampled_size(level, n)
            resampled = 0.6 * kmeans_work(min(n, size * k), k, d) + 0.125 * kmeans_work(n, k, d)
            work += level.n_resamples * resampled if size > 1 else 0.0
        n = k * level.n_splits
    return work


def kmeans_work(n: float, k: int, dimension: int) -> float:
    """n d sqrt(k), to which the time of one k-means is proportional.

    Not n k d: seeding only searches cells, iterations skip rows that cannot move, and more clusters need
    fewer iterations. On CPUs the constant stayed within a factor of 1.5 from 2,000 rows and 100 clusters to
    50,000 and 2,500, and also holds for 1,000,000 rows and 100,000 clusters (`benchmarks/plans.py`).
    """
    return n * dimension * float(k) ** 0.5


def expected_bytes(
    n: int, dimension: int, config: CurationConfig, *, base: int = 0, index: int = 0
) -> dict[str, int]:
    """Sizes on disk and peak memory, by the names of `Plan`'s fields.

    Args:
        base: memory of a process with all libraries, the embedder, and no pool.
        index: bytes of the pool's index, which is mapped, as embeddings and tree are: their pages count as
            the process's memory, although the system takes them back where it has none left.
    """
    levels = config.levels or ()
    clusters = sum(level.n_clusters * level.n_splits for level in levels)
    itemsize = np.dtype(config.embedding.dtype).itemsize
    tree = n * (8 + 4) + clusters * (4 * dimension + 8)
    row = 4 * dimension
    # Clustering: all rows, a resampling's, and one of these in the order of its cells as float32, up to the
    # limit; blocks of rows in transit, as float64 too; four blocks of distances; centroids and their sums;
    # some hundred bytes per row.
    lowest = levels[0].n_clusters if levels else 0
    resampled = 0
    if levels and levels[0].n_resamples:
        resampled = min(n, lowest * resampled_size(levels[0], n))
    # The rows to seed on are held twice: as they are, and by cells.
    seeded = 2 * min(n, 20 * lowest)
    held = min((n + max(resampled, seeded)) * row, int(config.max_memory_gb * 1e9))
    blocks = 5 * min(n, _ROWS_IN_TRANSIT) * row + 4 * BLOCK * 4 * lowest
    peak = held + blocks + 6 * lowest * row + min(SCORES_BYTES, 400 * n) + 100 * n
    if config.near_duplicates.enabled:  # the rows of a cell and its neighbours, and faiss's copies
        peak = max(peak, 6 * min(n, ONE_CELL) * row + 100 * n)
    return {
        "embedding_bytes": n * dimension * itemsize,
        "tree_bytes": tree,
        "peak_bytes": base + index + n * dimension * itemsize + tree + _LIBRARIES + peak,
    }
