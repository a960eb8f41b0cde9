"""What a curation would do and cost, before any long work starts: disk, memory, and hours from a small probe.

What is cached costs nothing. Embedding and clustering are extrapolated from rates measured here: embedding a
few hundred samples from all over the pool, and a small k-means on their embeddings. The time of other stages
is not measured, and not part of the total. `benchmarks/plans.py` compares plans with measurements.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn

from curated_data.cache import MANIFEST, open_cache
from curated_data.clustering.kmeans import kmeans
from curated_data.clustering.levels import Level
from curated_data.clustering.rows import resident_memory
from curated_data.config import CurationConfig, levels_for, load_config
from curated_data.costs import Rates, Stage, expected_bytes, expected_stages, kmeans_work
from curated_data.deduplication import check_preference, near_duplicates_name, read_keep
from curated_data.embedding import Embedder, EmbeddingStore, resolve_embedder
from curated_data.embedding.contents import Contents
from curated_data.embedding.extract import embed_samples, embeddings_name
from curated_data.embedding.store import missing_shards
from curated_data.filtering import filter_inputs, filter_pool, filter_rows, with_named_ids
from curated_data.parallel import world_size
from curated_data.pipeline import check_levels, selection_name, tree_name
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.pool.index import ARRAYS

log = logging.getLogger(__name__)

_PROBE_CLUSTERS = 256
_PROBE_ROWS = 4096  # on which k-means is timed
_PLACES = 4  # in the pool, from which a probe is taken


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Attributes:
        n_samples, n_shards: of the pool.
        pool_bytes: size of its samples' members, which embedding and training read.
        target_size: number of samples to select.
        levels: of the tree, with derived ones filled in.
        embedding_bytes: size of the pool's embeddings on disk.
        tree_bytes: size of the tree on disk: centroids, and arrays with one entry per sample.
        peak_bytes: peak memory of each rank's process, as the system counts it: libraries, the embedder,
            mapped files, near-duplicates and clustering. The measured peak should be 0.4 to 1 times it;
            worker processes come on top.
        stages: in order.
        filters: what they drop, as in the report of a curation; None without filters.
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
    filters: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Expected total of embedding, clustering and, in a recipe's plan, training; not of other stages."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def plan(
    pool: ShardPool | str | Path | Sequence[str | Path],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
    *,
    embedder: str | nn.Module | Callable[[Tensor], Tensor] | Embedder,
    cache_dir: str | Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    n_probe: int = 256,
) -> Plan:
    """What `curate` would do with these arguments. Indexes the pool, and embeds a few samples as a probe.

    Args:
        pool, config, embedder, cache_dir, device, decoders: as for `curate`.
        n_probe: number of samples to embed, spread over the pool; none if all embeddings are cached.

    Raises:
        ConfigError, PoolError, EmbedderError, CacheError: as `curate` would in its first minutes.
    """
    config = load_config(config)
    embedder = resolve_embedder(embedder)
    root = open_cache(cache_dir)
    pool = pool.with_cache(root) if isinstance(pool, ShardPool) else ShardPool(pool, cache_dir=root)
    n_samples = len(pool)
    check_levels(config.levels, n_samples)
    check_preference(config, pool)
    config = with_named_ids(config, pool)
    filtered = filter_pool(pool, config)
    settings = dataclasses.asdict(config.embedding)
    folder = root / "embeddings" / embeddings_name(pool, embedder, decoders=decoders, **settings)
    ranges = pool.shard_ranges()
    contents = Contents(root, pool).recognise()
    missing = missing_shards(folder, contents)
    n_missing = int(sum(ranges[number + 1] - ranges[number] for number in missing))

    names = [name for name in contents if name is not None]
    store = None
    if not missing:
        store = EmbeddingStore(folder, names, embedder.dimension, config.embedding.dtype, urls=pool.urls)
    if store is not None and filtered is not None:
        store.left_out = ~filtered.keep
    cached, valid = _cached(root, config, store, filter_inputs(filtered))
    n_valid = n_samples if filtered is None else int(filtered.keep.sum())
    n_valid = n_valid if valid is None else int(valid.sum())
    levels = levels_for(config, n_valid)
    check_levels(levels, n_valid)
    config = dataclasses.replace(config, levels=levels)

    probe = _probe(n_samples, n_probe)
    if store is None or valid is None:
        rows, samples_per_second = _embed_probe(pool, embedder, probe, config, device, decoders)
    else:
        usable = np.flatnonzero(valid)
        some = np.random.default_rng(0).choice(usable, min(_PROBE_ROWS, len(usable)), replace=False)
        rows, samples_per_second = store.rows(np.sort(some)), None
    rates = Rates(samples_per_second, _kmeans_rate(rows, config, device))
    stages = expected_stages(
        n_valid, embedder.dimension, config, rates, n_missing=n_missing, cached=cached, ranks=world_size()
    )
    index = pool.index()
    index_bytes = sum(getattr(index, name).nbytes for name in ARRAYS)
    return Plan(
        n_samples=n_samples,
        n_shards=len(pool.urls),
        pool_bytes=int(index.member_size.sum()),
        target_size=config.target_size,
        levels=levels,
        stages=stages,
        filters=None if filtered is None else filtered.report(pool.keys),
        **expected_bytes(n_samples, embedder.dimension, config, base=resident_memory(), index=index_bytes),
    )


def plan_tables(plan: Plan) -> list[Table]:
    """A plan as tables to print: sizes, and the stages with their times."""
    sizes = Table(title="Plan", show_header=False)
    sizes.add_column()
    sizes.add_column(justify="right")
    for name, value in (
        ("samples in the pool", f"{plan.n_samples:,} in {plan.n_shards:,} shards"),
        ("to select", f"{plan.target_size:,}"),
        ("bytes of the pool", size(plan.pool_bytes)),
        ("embeddings, on disk", size(plan.embedding_bytes)),
        ("tree, on disk", size(plan.tree_bytes)),
        ("memory of a process at its height", size(plan.peak_bytes)),
    ):
        sizes.add_row(name, value)
    for row in filter_rows(plan.filters):
        sizes.add_row(*row)
    stages = Table(title="Expected, by a probe on this machine")
    stages.add_column("stage")
    stages.add_column("time", justify="right")
    stages.add_column("what")
    for stage in plan.stages:
        expected = "not measured" if stage.seconds is None else duration(stage.seconds)
        stages.add_row(stage.name, "cached" if stage.cached else expected, stage.note)
    n_left_out = sum(stage.seconds is None for stage in plan.stages)
    left_out = f"without the {n_left_out} stages that were not measured" if n_left_out else ""
    stages.add_row("in all", duration(plan.seconds), left_out)
    return [sizes, stages]


def duration(seconds: float) -> str:
    """Seconds as text, in a suitable unit."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def size(n_bytes: int) -> str:
    """Bytes as text, in a suitable unit."""
    for unit, length in (("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= length:
            return f"{n_bytes / length:,.1f} {unit}"
    return f"{n_bytes / 1e6:,.1f} MB"


def _cached(
    root: Path, config: CurationConfig, store: EmbeddingStore | None, filters: dict[str, str]
) -> tuple[dict[str, bool], np.ndarray | None]:
    """Which stages after the embedding are cached, and which samples are clustered, as far as is known.

    None is, unless all embeddings are: artifacts are named by what they were made from.
    """
    if store is None:
        return {}, None
    valid = store.valid
    origin = {"embedder": store.folder.name, "embeddings": store.fingerprint} | filters
    cached = {}
    if config.near_duplicates.enabled:
        if config.near_duplicates.held_out:
            return {}, valid  # cannot be known without the embeddings of the held-out pool
        name = near_duplicates_name(config, origin)
        folder = root / "near_duplicates" / name
        cached["near_duplicates"] = (folder / MANIFEST).exists()
        if not cached["near_duplicates"]:
            return cached, valid
        valid = valid & read_keep(folder, len(valid))
        origin["near_duplicates"] = name
    config = dataclasses.replace(config, levels=levels_for(config, int(valid.sum())))
    tree = tree_name(config, origin)
    cached["cluster"] = (root / "tree" / tree / MANIFEST).exists()
    cached["sample"] = (root / "selection" / selection_name(config, tree) / MANIFEST).exists()
    return cached, valid


def _probe(n: int, most: int) -> np.ndarray:
    """Ids of up to `most` samples: runs of neighbours, as embedding reads them, from all over the pool."""
    if n <= most:
        return np.arange(n)
    length = -(-most // _PLACES)
    starts = np.linspace(0, n - length, _PLACES).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(length)).ravel())


def _embed_probe(
    pool: ShardPool,
    embedder: Embedder,
    ids: np.ndarray,
    config: CurationConfig,
    device: str | torch.device,
    decoders: Decoders | None,
) -> tuple[np.ndarray, float]:
    """The probe's valid embeddings, and samples embedded per second, start-up excluded."""

    def embed(which: np.ndarray) -> tuple[np.ndarray, float]:
        began = time.monotonic()
        settings = dataclasses.asdict(config.embedding)
        rows, valid = embed_samples(pool, embedder, which, device=device, decoders=decoders, **settings)
        return rows[valid], time.monotonic() - began

    few = ids[: max(1, len(ids) // 8)]
    embed(few)  # warms up caches, compilation and the device
    _, start_up = embed(few)
    rows, seconds = embed(ids)
    grown, more = seconds - start_up, len(ids) - len(few)
    return rows, more / grown if more and grown > 0.1 * seconds else len(ids) / seconds


def _kmeans_rate(rows: np.ndarray, config: CurationConfig, device: str | torch.device) -> float:
    """Units of `kmeans_work` per second, from a k-means on the probe's rows.

    Too few rows are mixed in pairs to make more. Noisy copies would not do: well-separated balls converge at
    once, unlike images.
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
        kmeans(rows, k, n_iter=config.n_iter, tol=config.tol, device=device, metric=config.metric or "l2")
        return time.monotonic() - began

    kmeans(rows[:512], 16, n_iter=2, device=device)  # one-time set-up
    return kmeans_work(len(rows), k, rows.shape[1]) / min(seconds(), seconds())
