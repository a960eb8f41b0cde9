"""The stage that clusters the embeddings into a tree, or makes a tree over a pool from an earlier one."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.layout import CHECKPOINTS, TREE
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import shown, tidy
from curated_data.clustering.hierarchy import hierarchical_kmeans
from curated_data.clustering.rows import BLOCK
from curated_data.clustering.seeding import CELL, PROBES, SCORES_BYTES
from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig, load_config
from curated_data.embedding import EmbeddingStore
from curated_data.errors import ConfigError, CuratedDataError, PoolError
from curated_data.levels import Level, TooManyClusters, resampled_size
from curated_data.parallel import rank
from curated_data.stages.cost import Cost, Rates
from curated_data.stages.index import AnyPool
from curated_data.stages.stage import Run, Stage

log = logging.getLogger(__name__)

_NO_LIMIT_GB = 1e9
_ROWS_IN_TRANSIT = 8 * BLOCK  # converted at once
_CANDIDATES = 1 << 15  # of a seeding whose nearest cells are known at once
_NAMES = ("resample", "metric", "init", "n_init", "n_iter", "tol", "seed")


@dataclass(frozen=True)
class Tree(Stage):
    """The cluster tree over a pool; its levels are filled in.

    Its inputs are the embeddings and what has left samples out; of a tree that follows an earlier one, that
    tree too (`base`), and of a re-curation the `share` of samples with new embeddings.
    """

    place = TREE
    kind = "clustering"  # the folder has another one in it, of kind "tree", which any `ClusterTree` saves
    step = "cluster"
    version = 7

    @property
    def settings(self) -> dict[str, Any]:
        levels = [dataclasses.asdict(level) for level in self.config.levels or ()]
        return {name: getattr(self.config, name) for name in _NAMES} | {"levels": levels}

    def cluster(
        self,
        run: Run,
        pool: AnyPool,
        store: EmbeddingStore,
        valid: np.ndarray,
        *,
        derived: bool,
        complete: Callable[[ClusterTree], ClusterTree] | None = None,
    ) -> ClusterTree:
        """Cluster the valid rows of a store, by hierarchical k-means.

        Args:
            derived: the levels are not the user's, so they shrink where rows repeat.
            complete: makes a tree over the pool from the tree over the store's rows, if these differ.

        Raises:
            ConfigError: the user's levels ask for more clusters than the distinct rows fill.
            PoolError: no row can be clustered.
        """
        assert self.config.levels is not None, "derived by now"
        levels = self.config.levels
        checkpoint = self.root / CHECKPOINTS / f"{self.place}-{self.name}"
        settings = {name: value for name, value in self.settings.items() if name != "levels"}

        def cluster() -> ClusterTree:
            try:
                return hierarchical_kmeans(
                    store,
                    levels,
                    valid=valid,
                    device=run.device,
                    checkpoint=checkpoint,
                    max_memory=int(min(self.config.max_memory_gb, _NO_LIMIT_GB) * 1e9),
                    shrink=derived,
                    **settings,
                )
            except CuratedDataError:
                raise
            except TooManyClusters as error:  # known only from the rows: equal ones leave clusters empty
                raise ConfigError(f"levels: {error}; or leave `levels` out to have them derived") from error
            except ValueError as error:
                raise PoolError(f"the pool's embeddings cannot be clustered: {error}") from error

        tree = self.build(run, pool, store, cluster, complete=complete)
        if rank() == 0:
            tidy(checkpoint, below=checkpoint.parent)
        if run.cached[self.place] and not derived:
            _check_shrunk(tree, levels)
        return tree

    def build(
        self,
        run: Run,
        pool: AnyPool,
        store: EmbeddingStore,
        make: Callable[[], ClusterTree],
        *,
        complete: Callable[[ClusterTree], ClusterTree] | None = None,
        find: Callable[[ClusterTree], dict[str, Any]] | None = None,
    ) -> ClusterTree:
        """Build the artifact: a tree, and the shards that it covers, by which a pool that has grown finds its
        old samples.

        Args:
            make: the tree; called on every rank.
            complete: what to keep of it, see `cluster`; called on rank zero.
            find: what else to record in the manifest; called on rank zero.
        """

        def build(folder: Path | None) -> None:
            tree = make()
            if folder is None:
                return
            tree = tree if complete is None else complete(tree)
            tree.save(folder / "tree")
            np.save(folder / "shards.npy", np.array(store.shard_fingerprints, "S20"))
            np.save(folder / "shard_ranges.npy", pool.shard_ranges())
            self.write_manifest(folder, **({} if find is None else find(tree)))

        run.together(self, build, check=store.verify)
        return BuiltTree(self.folder).tree

    def cost(self, n: int, dimension: int, rates: Rates, ranks: int = 1) -> Cost:
        """Of clustering n samples."""
        levels = self.config.levels or []
        totals = [level.n_clusters * level.n_splits for level in levels]
        seconds = clustering_work(n, dimension, self.config) / rates.kmeans / ranks
        row = 4 * dimension
        # All rows, a resampling's, and one of these in the order of its cells as float32, up to the limit;
        # blocks of rows in transit, as float64 too; four blocks of distances; centroids and their sums; some
        # hundred bytes per row.
        lowest = levels[0].n_clusters if levels else 0
        resampled = 0
        if levels and levels[0].n_resamples:
            resampled = min(n, lowest * resampled_size(levels[0], n))
        # The rows to seed on are held twice, as they are and by cells, beside the scores of candidates.
        seeds = min(n, 20 * lowest)
        held = min((n + max(resampled, 2 * seeds)) * row, int(self.config.max_memory_gb * 1e9))
        blocks = 5 * min(n, _ROWS_IN_TRANSIT) * row + 4 * BLOCK * 4 * lowest
        scores = min(SCORES_BYTES, 4 * PROBES * CELL * seeds) + 2 * 8 * PROBES * min(seeds, _CANDIDATES)
        return Cost(
            name=self.step,
            cached=self.is_cached,
            seconds=0.0 if self.is_cached else seconds,
            note=f"clusters {' > '.join(f'{total:,}' for total in totals)}",
            memory=held + blocks + 6 * lowest * row + scores + 100 * n,
        )

    def disk_bytes(self, n: int, dimension: int) -> int:
        """Of a tree over n samples: centroids, and arrays with one entry per sample."""
        clusters = sum(level.n_clusters * level.n_splits for level in self.config.levels or ())
        return n * (8 + 4) + clusters * (4 * dimension + 8)


class BuiltTree:
    """A tree's artifact, opened by its folder alone.

    Attributes:
        folder: of the artifact.
        manifest: its content.

    Raises:
        CacheError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, Tree.kind)
        with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
            self.inputs: Mapping[str, Any] = self.manifest["inputs"]
            if not isinstance(self.inputs, dict):
                raise ValueError(f"its inputs are {shown(self.inputs)}")

    @property
    def tree(self) -> ClusterTree:
        """The tree; its arrays stay on disk."""
        return ClusterTree.load(self.folder / "tree", memory_map=True)

    @property
    def shards(self) -> list[str]:
        """The names of the contents of the shards that it covers."""
        names = read_array(self.folder, "shards", self.manifest, dtype="S20", shape=(None,))
        return [name.decode("ascii", "replace") for name in names.tolist()]

    def shard_ranges(self) -> np.ndarray:
        """(shards + 1,) int64, the first sample of each shard, then their number."""
        shape = (len(self.shards) + 1,)
        return read_array(self.folder, "shard_ranges", self.manifest, dtype=np.int64, shape=shape)

    def settings_in(self, config: CurationConfig) -> CurationConfig:
        """A configuration with the settings of this tree in place of its own."""
        with reading(self.folder / MANIFEST, Remedy(self.folder / MANIFEST)):
            given = self.manifest["settings"]
            values = {name: given[name] for name in (*_NAMES, "levels")}
            try:
                return load_config(dataclasses.asdict(config) | values)
            except ConfigError as error:
                raise ValueError(str(error)) from error


def check_levels(levels: list[Level] | None, n_samples: int, n_pool: int | None = None) -> None:
    """Reject levels with more clusters than samples early, before any long stage starts.

    Args:
        n_samples: to cluster.
        n_pool: of the pool, if failed samples and near-duplicates have been taken out of it.
    """
    asked = levels[0].n_clusters * levels[0].n_splits if levels else 0
    if asked > n_samples:
        left = "" if n_pool in (None, n_samples) else f" that are left of {n_pool}"
        raise ConfigError(
            f"levels[0].n_clusters: {asked} clusters of {n_samples} samples{left}; ask for fewer, or leave "
            "`levels` out to have them derived"
        )


def clustering_work(n: float, dimension: int, config: CurationConfig) -> float:
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
            size = resampled_size(level, int(n))
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


def _check_shrunk(tree: ClusterTree, levels: list[Level]) -> None:
    """Refuse a tree whose levels were derived and have shrunk, if the same are now asked for."""
    found = list(tree.n_clusters.values())
    asked = [level.n_clusters * level.n_splits for level in levels]
    # Splits may leave some out, whoever asked for them.
    same = (k == total or level.n_splits > 1 for k, total, level in zip(found, asked, levels, strict=False))
    if len(found) != len(asked) or not all(same):
        raise ConfigError(
            f"levels: {asked} clusters requested, but rows repeat so often that only {found} can be filled; "
            "ask for these, or leave `levels` out to have them derived"
        )
