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
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from curated_data.cache.artifacts import open_cache
from curated_data.clustering.kmeans import kmeans
from curated_data.clustering.rows import resident_memory
from curated_data.config import CurationConfig, levels_for, load_config
from curated_data.embedding import Embedder, EmbeddingStore
from curated_data.embedding.extract import embed_samples
from curated_data.embedding.precomputed import Precomputed
from curated_data.errors import ConfigError
from curated_data.levels import Level
from curated_data.parallel import world_size
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.selection.quota_rules import check_clusters, with_weights
from curated_data.stages.cost import Cost, Rates
from curated_data.stages.embeddings import Embeddings, inputs_of
from curated_data.stages.filtering import filter_pool, filter_rows, with_named_ids
from curated_data.stages.index import ConfigSource, Index, PoolSource
from curated_data.stages.near_duplicates import NearDuplicates, check_preference, held_out_embeddings
from curated_data.stages.retrieval import Retrieval, SeedSet, seed_sources
from curated_data.stages.selection import Selection
from curated_data.stages.tree import Tree, check_levels, kmeans_work

log = logging.getLogger(__name__)

_PROBE_CLUSTERS = 256
_PROBE_ROWS = 4096  # on which k-means is timed
_PLACES = 4  # in the pool, from which a probe is taken
_LIBRARIES = 60_000_000  # bytes of buffers that torch, BLAS and faiss allocate on first use


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
    stages: list[Cost]
    filters: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Expected total of embedding, clustering and, in a recipe's plan, training; not of other stages."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def plan(
    pool: PoolSource,
    config: ConfigSource,
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
    config = with_weights(load_config(config))
    root = open_cache(cache_dir)
    first = Index.of(pool, root)
    pool = first.pool
    if not isinstance(pool, ShardPool):
        raise ConfigError("plan: the pool already holds embeddings, so there is nothing to embed")
    embeddings = Embeddings.of(root, pool, embedder, config, decoders)
    n_samples = len(pool)
    check_levels(config.levels, n_samples)
    check_preference(config, pool)
    held_out, sources = held_out_embeddings(config, embeddings), seed_sources(config, embeddings)
    config = with_named_ids(config, pool)
    filtered = filter_pool(pool, config)
    embeddings = embeddings.of_kept(filtered)
    store, n_missing = embeddings.open()
    n_kept = n_samples if filtered is None else int(filtered.keep.sum())
    seeds = _planned_seeds(sources)
    others, n_held_out = (None, 0) if held_out is None else held_out.open()
    stages, valid = planned_stages(root, config, store, n_kept, seeds, others)
    n_valid = n_kept if valid is None else int(valid.sum())
    levels = stages.tree.config.levels or []
    check_levels(levels, n_valid, n_samples)
    check_clusters(stages.tree.config)

    network = embeddings.embedder
    assert network is not None, "a pool of shards has one"
    if isinstance(network, Precomputed):
        raise ConfigError("plan: the embeddings exist already, so there is nothing to embed")
    if store is None or valid is None:
        probe = _probe(n_kept, n_probe)
        if filtered is not None:
            probe = np.flatnonzero(filtered.keep)[probe]
        rows, samples_per_second = _embed_probe(pool, network, probe, config, device, decoders)
    else:
        usable = np.flatnonzero(valid)
        some = np.random.default_rng(0).choice(usable, min(_PROBE_ROWS, len(usable)), replace=False)
        rows, samples_per_second = store.rows(np.sort(some)), None
    rates = Rates(samples_per_second, _kmeans_rate(rows, config, device))
    n_beside = n_held_out + sum(found.n_missing for found in seeds.values())
    embed = embeddings.cost(n_missing, network.dimension, rates, world_size(), n_beside)
    costs = stages.costs(n_valid, network.dimension, rates, world_size(), seeds)
    embedding_bytes = embeddings.disk_bytes(n_samples, network.dimension)
    tree_bytes = stages.tree.disk_bytes(n_samples, network.dimension)
    mapped = first.n_bytes + embedding_bytes + tree_bytes
    return Plan(
        n_samples=n_samples,
        n_shards=len(pool.urls),
        pool_bytes=int(pool.index().member_size.sum()),
        target_size=config.target_size,
        levels=levels,
        embedding_bytes=embedding_bytes,
        tree_bytes=tree_bytes,
        peak_bytes=peak_memory(costs, mapped, resident_memory()),
        stages=[embed, *costs],
        filters=None if filtered is None else filtered.report(pool.keys),
    )


def peak_memory(costs: Sequence[Cost], mapped: int, base: int) -> int:
    """Bytes that a process of these stages takes at its peak, as the system counts it.

    Args:
        mapped: bytes of the files that it maps, which count although the system takes them back where it has
            no others left.
        base: bytes that it takes before the first stage.
    """
    return base + mapped + _LIBRARIES + max(cost.memory for cost in costs)


class PlannedSeeds(NamedTuple):
    """Of a seed set: its rows, those still to be embedded, and its fingerprint if that is known yet."""

    n: int
    n_missing: int
    fingerprint: str | None


def _planned_seeds(sources: Mapping[str, SeedSet | Embeddings]) -> dict[str, PlannedSeeds]:
    found = {}
    for name, source in sources.items():
        if isinstance(source, SeedSet):
            found[name] = PlannedSeeds(len(source.rows), 0, source.fingerprint)
        else:
            store, n_missing = source.open()
            found[name] = PlannedSeeds(
                len(source.pool), n_missing, None if store is None else store.fingerprint
            )
    return found


class PlannedStages(NamedTuple):
    """The stages after the embedding."""

    near_duplicates: NearDuplicates | None
    tree: Tree
    retrieval: Retrieval | None
    selection: Selection

    def costs(
        self,
        n: int,
        dimension: int,
        rates: Rates,
        ranks: int = 1,
        seeds: Mapping[str, PlannedSeeds] | None = None,
    ) -> list[Cost]:
        """In order, for n samples that are clustered."""
        n_seeds = {name: found.n for name, found in (seeds or {}).items()}
        first = [] if self.near_duplicates is None else [self.near_duplicates.cost(n, dimension)]
        last = [] if self.retrieval is None else [self.retrieval.cost(n, dimension, n_seeds)]
        return [*first, self.tree.cost(n, dimension, rates, ranks), *last, self.selection.cost(n, dimension)]


def planned_stages(
    root: Path,
    config: CurationConfig,
    store: EmbeddingStore | None,
    n_samples: int,
    seeds: Mapping[str, PlannedSeeds] | None = None,
    held_out: EmbeddingStore | None = None,
) -> tuple[PlannedStages, np.ndarray | None]:
    """The stages after the embedding, and which samples they cluster, as far as is known.

    That is nothing, unless all embeddings are cached: artifacts are named by what they were made from.
    """
    valid, inputs = (None, None) if store is None else (store.valid, inputs_of(store))
    copies = None
    if config.near_duplicates.enabled:
        beside = {} if held_out is None else {"held_out": held_out.fingerprint}
        if config.near_duplicates.held_out and held_out is None:
            inputs = None
        copies = NearDuplicates(root, config, None if inputs is None else inputs | beside)
        if inputs is not None and valid is not None and copies.is_cached:
            valid &= copies.open(len(valid))
            inputs = inputs | {copies.place: copies.name}
        else:
            inputs = None
    n = n_samples if valid is None else int(valid.sum())
    config = dataclasses.replace(config, levels=levels_for(config, n))
    tree = Tree(root, config, inputs)
    made_from: dict[str, str] | None = {"tree": tree.name} if tree.is_cached else None
    retrieval = None
    if seeds:
        known = {name: found.fingerprint for name, found in seeds.items() if found.fingerprint}
        retrieval = Retrieval(root, config, None)
        if made_from is not None and len(known) == len(seeds):
            retrieval = Retrieval.of(root, config, made_from["tree"], known)
            made_from = made_from | {retrieval.place: retrieval.name}
        else:
            made_from = None
    selection = Selection(root, config, made_from)
    return PlannedStages(copies, tree, retrieval, selection), valid


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
    those = "the stage that was" if n_left_out == 1 else f"the {n_left_out} stages that were"
    left_out = f"without {those} not measured" if n_left_out else ""
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
