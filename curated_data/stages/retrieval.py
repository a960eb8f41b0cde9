"""The stage that looks for samples like those of seed sets."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import MANIFEST, fingerprint, read_array, read_manifest
from curated_data.cache.checksums import load_given, reading
from curated_data.cache.layout import RETRIEVAL
from curated_data.cache.remedies import Remedy
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.precomputed import Precomputed
from curated_data.errors import ConfigError, PoolError
from curated_data.selection.retrieval import (
    BLOCK,
    TILE,
    Retrieved,
    retrieve,
    retrieve_clusters,
    target_weights,
)
from curated_data.selection.retrieved import first_retrieved, load_retrieved, save_retrieved
from curated_data.stages.cost import Cost
from curated_data.stages.embeddings import Embeddings
from curated_data.stages.stage import Run, Stage

log = logging.getLogger(__name__)

_OF_METHOD = {
    "nearest": ("n", "least", "limit"),
    "clusters": ("level", "least_seeds", "per_cluster", "limit"),
    "weights": ("level", "weights"),
}


@dataclass(frozen=True)
class SeedSet:
    """Embeddings of examples.

    Attributes:
        rows: (m, d).
        fingerprint: of what they are.
    """

    rows: np.ndarray
    fingerprint: str


@dataclass(frozen=True)
class Retrieval(Stage):
    """What is retrieved from the samples of a tree, or the weights of its clusters.

    Its inputs are the tree and the seed sets.
    """

    place = RETRIEVAL
    kind = RETRIEVAL
    step = "retrieve"
    version = 1

    @classmethod
    def of(cls, root: Path, config: CurationConfig, tree: str, seeds: Mapping[str, str]) -> "Retrieval":
        """Of a tree's name and the fingerprints of seed sets."""
        return cls(root, config, {"tree": tree} | {f"seeds {name}": found for name, found in seeds.items()})

    @property
    def settings(self) -> dict[str, Any]:
        given = self.config.retrieval
        names = ("method", *_OF_METHOD[given.method])
        # The sets are served in their order.
        found = {name: getattr(given, name) for name in names} | {"order": list(given.seeds)}
        return found | {"seed": self.config.seed} if given.method == "clusters" else found

    def build(self, run: Run, tree: ClusterTree, store: EmbeddingStore, seeds: Mapping[str, SeedSet]) -> None:
        """Retrieve, unless it is cached; `open_retrieved` and `weights` read it."""
        given = self.config.retrieval
        if given.level > tree.n_levels:
            raise ConfigError(f"retrieval.level: the tree has levels 1 to {tree.n_levels}, got {given.level}")
        rows = {name: found.rows for name, found in seeds.items()}
        limit = given.limit if isinstance(given.limit, Mapping) else dict.fromkeys(rows, given.limit)
        limits = {name: int(most) for name, most in limit.items() if most is not None}
        valid = tree.parent[1] != EXCLUDED

        def build(folder: Path) -> None:
            sizes = {"seeds": {name: len(of_set) for name, of_set in rows.items()}}
            if given.method == "weights":
                weights = target_weights(
                    tree, rows, given.weights or None, metric=tree.metric, level=given.level
                )
                np.save(folder / "weights.npy", weights)
                self.write_manifest(folder, **sizes)
                return
            if given.method == "nearest":
                store.verify()
                found = retrieve(store, rows, given.n, least=given.least, valid=valid)
                found = _part(found, np.sort(first_retrieved(found, limits)))
            else:
                found = retrieve_clusters(
                    tree,
                    rows,
                    metric=tree.metric,
                    per_cluster=given.per_cluster,
                    least_seeds=given.least_seeds,
                    level=given.level,
                    limit=limits,
                    valid=valid,
                    seed=self.config.seed,
                )
            self.write_manifest(folder, **sizes, **save_retrieved(folder, found))

        run.once(self, build)

    def open(self, n_samples: int) -> Retrieved | None:
        """What was retrieved from so many samples; None of weights."""
        if self.config.retrieval.method == "weights":
            return None
        return load_retrieved(self.folder, n_samples)

    def weights(self, k: int) -> np.ndarray | None:
        """(k,) of the clusters, if these were asked for."""
        if self.config.retrieval.method != "weights":
            return None
        manifest = read_manifest(self.folder, self.kind)
        return read_array(self.folder, "weights", manifest, dtype=np.float64, shape=(k,))

    def cost(self, n: int, dimension: int, seeds: Mapping[str, int]) -> Cost:
        """Of n samples and the number of seeds of each set; the time is not measured."""
        n_seeds = sum(seeds.values())
        each = self.config.retrieval.n if self.config.retrieval.method == "nearest" else 1
        return Cost(
            name=self.step,
            cached=self.is_cached,
            seconds=0.0 if self.is_cached else None,
            note=f"{n_seeds:,} seeds of {len(seeds)} sets, by {self.config.retrieval.method}",
            # Seeds as they are, joined and of length one; what they found; and a block of the pool.
            memory=n_seeds * (12 * dimension + 48 * each) + 9 * n + 16 * BLOCK * dimension + 64 * TILE,
        )

    def report(self, ids: np.ndarray, n_samples: int) -> dict[str, Any]:
        """For each seed set, its seeds, what it retrieved, and how much of that is selected."""
        manifest = read_manifest(self.folder, self.kind)
        with reading(self.folder / MANIFEST, Remedy(self.folder / MANIFEST)):
            sizes = {str(name): int(size) for name, size in manifest["seeds"].items()}
        found = self.open(n_samples)
        if found is None:
            return {name: {"seeds": size} for name, size in sizes.items()}
        selected = np.isin(found.ids, ids)
        return {
            name: {
                "seeds": sizes.get(name, 0),
                "retrieved": int((found.seed_set == number).sum()),
                "selected": int(selected[found.seed_set == number].sum()),
            }
            for number, name in enumerate(found.names)
        }


def seed_sources(config: CurationConfig, like: Embeddings) -> dict[str, SeedSet | Embeddings]:
    """The seed sets of a configuration: rows, or the stage that embeds a set's shards as the pool is.

    Rows are read and shards indexed now, before anything takes long.

    Raises:
        ConfigError: a file that cannot be read or does not fit, or shards beside a pool of rows.
        PoolError: no shard matches, or one cannot be read.
    """
    found: dict[str, SeedSet | Embeddings] = {}
    for name, given in config.retrieval.seeds.items():
        where = f"retrieval.seeds.{name}"
        if isinstance(given, str) and given.endswith(".npy"):
            rows = load_given(given, where)
            if rows.ndim != 2 or rows.dtype.kind != "f" or rows.shape[1] != like.dimension:
                raise ConfigError(
                    f"{where}: {given} holds {rows.dtype} {rows.shape}, expected floats, (m, "
                    f"{like.dimension}) as the pool's embeddings; embed both with the same embedder"
                )
            found[name] = SeedSet(rows, fingerprint(rows=rows))
            continue
        pool = like.pool
        if isinstance(pool, EmbeddedPool) or isinstance(like.embedder, Precomputed):
            raise ConfigError(f"{where}: the pool's embeddings exist already; give a .npy file of such rows")
        found[name] = like.of_shards(given, where)
    return found


def embed_seeds(sources: Mapping[str, SeedSet | Embeddings], run: Run) -> dict[str, SeedSet]:
    """The seed sets of `seed_sources`, with those of shards embedded.

    Raises:
        PoolError: none of a set's samples can be embedded.
    """
    found = {}
    for name, source in sources.items():
        if isinstance(source, SeedSet):
            found[name] = source
            continue
        where = f"retrieval.seeds.{name}"
        store = source.build(run.device)
        if not store.valid.any():
            raise PoolError(f"{where}: none of its {len(store)} samples could be embedded; give others")
        if store.n_failures:
            log.warning("%s: %d of %d seeds could not be embedded", where, store.n_failures, len(store))
        found[name] = SeedSet(store.as_array()[store.valid], store.fingerprint)
    return found


def _part(found: Retrieved, places: np.ndarray) -> Retrieved:
    arrays = {
        item.name: getattr(found, item.name)[places]
        for item in dataclasses.fields(found)
        if item.name != "names"
    }
    return Retrieved(names=found.names, **arrays)
