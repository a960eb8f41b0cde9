"""What a curation would do and take, before anything long starts: sizes, memory, and hours by a small probe.

What the cache holds already costs nothing. The rest is extrapolated from rates that are measured here:
samples embedded a second on a few hundred samples from all over the pool, and the speed of a small k-means on
their embeddings and of a matrix product. `benchmarks/plans.py` compares plans with what was then measured.
"""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn

from curated_data.cache import MANIFEST, open_cache
from curated_data.clustering.hierarchy import Level, choose_levels
from curated_data.clustering.kmeans import kmeans
from curated_data.clustering.rows import BLOCK
from curated_data.config import CurationConfig, load_config
from curated_data.distributed import world_size
from curated_data.embedding import Embedder, EmbeddingStore, embed_pool, resolve_embedder
from curated_data.embedding.extract import Decoders, embeddings_name
from curated_data.embedding.store import missing_shards
from curated_data.pipeline import check_levels, near_duplicates_name, read_keep, selection_name, tree_name
from curated_data.pool import ShardPool
from curated_data.selection.near_duplicates import CELL_SIZE, N_PROBES

log = logging.getLogger(__name__)

_PROBE_CLUSTERS = 256
_PROBE_ROWS = 4096  # that k-means is timed on
_PLACES = 4  # in the pool, that a probe is taken from
_ROWS_ON_THEIR_WAY = 8 * BLOCK  # converted at once
_LIBRARIES = 60_000_000  # bytes of buffers that torch, BLAS and faiss take when they are first used


@dataclass(frozen=True)
class Stage:
    """One stage of the walk.

    Attributes:
        name: index, embed, near_duplicates, cluster, sample, or train.
        cached: all of it is in the cache.
        seconds: expected, on the machine that probed; 0 where cached, None where nothing could be measured.
        note: what it does, in words.
    """

    name: str
    cached: bool
    seconds: float | None
    note: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        n_samples, n_shards: of the pool.
        pool_bytes: of its samples' members; what embedding and training read.
        target_size: asked for.
        levels: of the tree, derived ones filled in.
        embedding_bytes: of the whole pool's embeddings, on disk.
        tree_bytes: of centroids and of the arrays with an entry for each sample, on disk.
        peak_bytes: of memory that near-duplicates and clustering add to a rank's process at their height.
        stages: in order.
    """

    n_samples: int
    n_shards: int
    pool_bytes: int
    target_size: int
    levels: list[Level]
    embedding_bytes: int
    tree_bytes: int
    peak_bytes: int
    stages: list[Stage]

    @property
    def seconds(self) -> float:
        """Expected in all, of the stages that could be measured."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


@dataclass(frozen=True)
class Rates:
    """What one process does in a second.

    Attributes:
        samples: embedded; None where the probe could embed none.
        kmeans: units of `kmeans_work`.
        product: floating-point operations of a product of matrices, as nearest neighbours are searched by.
    """

    samples: float | None
    kmeans: float
    product: float


def plan(
    pool: ShardPool | str | Path | list[str],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
    *,
    embedder: str | nn.Module | Callable[[Tensor], Tensor] | Embedder,
    cache_dir: str | Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    n_probe: int = 256,
) -> Plan:
    """Say what `curate` with these arguments would do. It indexes the pool, and embeds a probe.

    Args:
        pool, config, embedder, cache_dir, device, decoders: as of `curate`.
        n_probe: samples that are embedded, spread evenly over the pool; none where all embeddings are cached.

    Raises:
        ConfigError, PoolError, EmbedderError, CacheError: as `curate` would, in its first minutes.
    """
    config = load_config(config)
    root = open_cache(cache_dir)
    pool = pool.with_cache(root) if isinstance(pool, ShardPool) else ShardPool(pool, cache_dir=root)
    n_samples = len(pool)
    check_levels(config.levels, n_samples)
    embedder = resolve_embedder(embedder)
    settings = dataclasses.asdict(config.embedding)
    folder = root / "embeddings" / embeddings_name(embedder, device=device, decoders=decoders, **settings)
    ranges = pool.shard_ranges()
    missing = missing_shards(folder, pool.shard_fingerprints)
    n_missing = int(sum(ranges[number + 1] - ranges[number] for number in missing))

    store = None if missing else EmbeddingStore(
        folder, pool.shard_fingerprints, embedder.dimension, config.embedding.dtype
    )  # fmt: skip
    cached, valid = _cached(root, config, store)
    n_valid = n_samples if valid is None else int(valid.sum())
    levels = config.levels or choose_levels(n_valid)
    check_levels(levels, n_valid)
    config = dataclasses.replace(config, levels=levels)

    probe = _probe(n_samples, n_probe)
    if store is None:
        rows, samples_a_second = _embed_probe(pool, embedder, probe, config, device, decoders)
    else:
        usable = np.flatnonzero(valid)
        some = np.random.default_rng(0).choice(usable, min(_PROBE_ROWS, len(usable)), replace=False)
        rows, samples_a_second = store.rows(np.sort(some)), None
    rates = Rates(samples_a_second, _kmeans_rate(rows, config, device), _product_rate(embedder.dimension))
    stages = expected_stages(
        n_valid, embedder.dimension, config, rates, n_missing=n_missing, cached=cached, ranks=world_size()
    )
    return Plan(
        n_samples=n_samples,
        n_shards=len(pool.urls),
        pool_bytes=_pool_bytes(pool),
        target_size=config.target_size,
        levels=levels,
        stages=stages,
        **expected_bytes(n_samples, embedder.dimension, config),
    )


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
    """The stages of a curation and the seconds that each is expected to take.

    Args:
        n: samples that are clustered.
        dimension: of an embedding.
        config: with its levels filled in.
        rates: of one process.
        n_missing: samples that are not embedded yet.
        cached: for near_duplicates, cluster and sample, whether the cache holds it.
        ranks: that share the work.
    """
    embed = 0.0 if not n_missing else (n_missing / rates.samples / ranks if rates.samples else None)
    totals = [level.n_clusters * level.n_splits for level in config.levels or ()]
    stages = [Stage("embed", not n_missing, embed, f"{n_missing:,} samples to embed, length {dimension}")]
    work: list[tuple[str, float, str]] = []
    if config.near_duplicates.enabled:
        seconds = near_duplicates_flops(n, dimension) / rates.product  # one rank looks for all
        work.append(("near_duplicates", seconds, "each sample's nearest neighbours"))
    shape = " > ".join(f"{total:,}" for total in totals)
    seconds = clustering_work(n, dimension, config) / rates.kmeans / ranks
    work.append(("cluster", seconds, f"clusters {shape}"))
    for name, seconds, note in work:
        is_cached = bool(cached.get(name))
        stages.append(Stage(name, is_cached, 0.0 if is_cached else seconds, note))
    is_sampled = bool(cached.get("sample"))
    stages.append(Stage("sample", is_sampled, 0.0 if is_sampled else n * 1e-6, f"{config.target_size:,} ids"))
    return stages


def clustering_work(n: int, dimension: int, config: CurationConfig) -> float:
    """The tree's k-means runs in units of `kmeans_work`, and the assignments after resamplings.

    A resampling's rows are a few around each centroid, which settle sooner than a whole level's.
    """
    work = 0.0
    for level in config.levels or ():
        k, d = level.n_clusters, dimension
        work += config.n_init * kmeans_work(n, k, d)
        if level.n_splits > 1:  # each group apart, by all its rows
            work += k * kmeans_work(n / k, level.n_splits, d)
        else:
            size = level.sample_size or max(2, round(n / k / 2))
            resampled = 0.6 * kmeans_work(min(n, size * k), k, d) + 0.125 * kmeans_work(n, k, d)
            work += level.n_resamples * resampled if size > 1 else 0.0
        n = k * level.n_splits
    return work


def kmeans_work(n: float, k: int, dimension: int) -> float:
    """What the time of one k-means is proportional to: n d sqrt(k).

    Not n k d: seeding looks into cells, iterations only at what may move, and with more clusters there are
    fewer iterations. The constant stayed within a factor of 1.5 from 2,000 rows and 100 clusters to 50,000
    and 2,500, and is that of 1,000,000 rows and 100,000 clusters too (`benchmarks/plans.py`; on CPUs).
    """
    return n * dimension * float(k) ** 0.5


def near_duplicates_flops(n: int, dimension: int) -> float:
    """Of the products of every sample with its own cell and the others that are looked at."""
    return 2.0 * n * min(n, (1 + N_PROBES) * CELL_SIZE) * dimension


def expected_bytes(n: int, dimension: int, config: CurationConfig) -> dict[str, int]:
    """Sizes on disk and the height of memory, by the fields of `Plan`."""
    levels = config.levels or ()
    clusters = sum(level.n_clusters * level.n_splits for level in levels)
    itemsize = np.dtype(config.embedding.dtype).itemsize
    tree = n * (8 + 4) + clusters * (4 * dimension + 8)
    row = 4 * dimension
    # Clustering: all rows and a resampling's as float32, within the limit; three blocks of rows on their way;
    # four blocks of distances; centroids with their sums; some forty bytes a row.
    lowest = levels[0].n_clusters if levels else 0
    resampled = 0
    if levels and levels[0].n_resamples:
        resampled = min(n, lowest * (levels[0].sample_size or max(2, round(n / lowest / 2))))
    held = min((n + resampled) * row, int(config.max_memory_gb * 1e9))
    peak = held + 3 * min(n, _ROWS_ON_THEIR_WAY) * row + 4 * BLOCK * 4 * lowest + 3 * lowest * row + 40 * n
    if config.near_duplicates.enabled:  # the rows of a cell, of those compared with it, and faiss's copies
        peak = max(peak, 6 * min(n, CELL_SIZE) * row + 60 * n)
    return {
        "embedding_bytes": n * dimension * itemsize,
        "tree_bytes": tree,
        "peak_bytes": _LIBRARIES + peak,
    }


def plan_tables(plan: Plan) -> list[Table]:
    """A plan to print: what there is, and the stages with their time."""
    sizes = Table(title="Plan", show_header=False)
    sizes.add_column()
    sizes.add_column(justify="right")
    for name, value in (
        ("samples in the pool", f"{plan.n_samples:,} in {plan.n_shards:,} shards"),
        ("to select", f"{plan.target_size:,}"),
        ("bytes of the pool", size(plan.pool_bytes)),
        ("embeddings, on disk", size(plan.embedding_bytes)),
        ("tree, on disk", size(plan.tree_bytes)),
        ("memory at its height, a rank", size(plan.peak_bytes)),
    ):
        sizes.add_row(name, value)
    stages = Table(title="Expected, by a probe on this machine")
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    stages.add_column("what")
    for stage in plan.stages:
        time_ = (
            "cached" if stage.cached else ("unknown" if stage.seconds is None else duration(stage.seconds))
        )
        stages.add_row(stage.name, time_, stage.note)
    stages.add_row("in all", duration(plan.seconds), "")
    return [sizes, stages]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def size(n_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= length:
            return f"{n_bytes / length:,.1f} {unit}"
    return f"{n_bytes / 1e6:,.1f} MB"


def _cached(
    root: Path, config: CurationConfig, store: EmbeddingStore | None
) -> tuple[dict[str, bool], np.ndarray | None]:
    """Which stages after the embedding are in the cache, and which samples are clustered, as far as is known.

    Without all embeddings none can be: their names tell what they were made from.
    """
    if store is None:
        return {}, None
    valid = store.valid
    origin = {"embedder": store.folder.name, "embeddings": store.fingerprint}
    cached = {}
    if config.near_duplicates.enabled:
        if config.near_duplicates.held_out:
            return {}, valid  # would take the held-out pool's embeddings to tell
        name = near_duplicates_name(config, origin)
        folder = root / "near_duplicates" / name
        cached["near_duplicates"] = (folder / MANIFEST).exists()
        if not cached["near_duplicates"]:
            return cached, valid
        valid = valid & read_keep(folder)
        origin["near_duplicates"] = name
    config = dataclasses.replace(config, levels=config.levels or choose_levels(int(valid.sum())))
    tree = tree_name(config, origin)
    cached["cluster"] = (root / "tree" / tree / MANIFEST).exists()
    cached["sample"] = (root / "selection" / selection_name(config, tree) / MANIFEST).exists()
    return cached, valid


def _probe(n: int, most: int) -> np.ndarray:
    """Ids of up to `most` samples: runs of neighbours, as an embedding reads them, from all over the pool."""
    if n <= most:
        return np.arange(n)
    length = -(-most // _PLACES)
    starts = np.linspace(0, n - length, _PLACES).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(length)).ravel())


def _pool_bytes(pool: ShardPool) -> int:
    block = 1 << 20
    return sum(
        int(pool.sizes(np.arange(start, min(start + block, len(pool)))).sum())
        for start in range(0, len(pool), block)
    )


def _embed_probe(
    pool: ShardPool,
    embedder: Embedder,
    ids: np.ndarray,
    config: CurationConfig,
    device: str | torch.device,
    decoders: Decoders | None,
) -> tuple[np.ndarray, float]:
    """The probe's embeddings, usable ones alone, and samples a second, without what starting up takes."""

    def embed(which: np.ndarray) -> tuple[np.ndarray, float]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            settings = dataclasses.asdict(config.embedding)
            store = embed_pool(
                pool, embedder, Path(folder), device=device, decoders=decoders, ids=which, **settings
            )
            seconds = time.monotonic() - began
            return store.as_array()[store.valid], seconds

    few = ids[: max(1, len(ids) // 8)]
    embed(few)  # the first pass pays for caches, compilation and the device
    _, start_up = embed(few)
    rows, seconds = embed(ids)
    grown, more = seconds - start_up, len(ids) - len(few)
    return rows, more / grown if more and grown > 0.1 * seconds else len(ids) / seconds


def _kmeans_rate(rows: np.ndarray, config: CurationConfig, device: str | torch.device) -> float:
    """Units of `kmeans_work` a second, of a k-means on the probe's rows; a few are made more by mixing pairs.

    Copies with noise would not do: clusters that are balls far apart settle at once, unlike those of images.
    """
    if not len(rows):
        rows = np.ones((1, 64), np.float32)
    rng = np.random.default_rng(0)
    rows = np.asarray(rows, np.float32)
    if len(rows) < _PROBE_ROWS:
        first, second = rng.integers(0, len(rows), (2, _PROBE_ROWS))
        share = rng.random((_PROBE_ROWS, 1), np.float32)
        rows = share * rows[first] + (1 - share) * rows[second]
        rows += rng.normal(0, 0.1 * float(rows.std()) + 1e-6, rows.shape).astype(np.float32)
    k = _PROBE_CLUSTERS

    def seconds() -> float:
        began = time.monotonic()
        kmeans(rows, k, n_iter=config.n_iter, tol=config.tol, device=device, metric=config.metric)
        return time.monotonic() - began

    kmeans(rows[:512], 16, n_iter=2, device=device)  # what is set up once
    return kmeans_work(len(rows), k, rows.shape[1]) / min(seconds(), seconds())


def _product_rate(dimension: int) -> float:
    """Operations a second of exact nearest neighbours, as near-duplicates are searched by (on the CPU)."""
    rows = np.random.default_rng(0).normal(size=(2048, dimension)).astype(np.float32)
    index = faiss.IndexFlatIP(dimension)
    index.add(rows)
    index.search(rows[:256], 17)  # what is set up once
    began = time.monotonic()
    index.search(rows, 17)
    return 2.0 * len(rows) * len(rows) * dimension / (time.monotonic() - began)
