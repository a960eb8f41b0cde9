"""The stage that takes near-duplicates out before clustering."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import read_array, read_manifest
from curated_data.cache.layout import NEAR_DUPLICATES
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.existing import EmbeddedPool
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.pool.decode import has_images
from curated_data.selection.links import ONE_CELL
from curated_data.selection.near_duplicates import exact_groups, image_contents, near_duplicates
from curated_data.selection.removed import Removed
from curated_data.stages.cost import Cost
from curated_data.stages.embeddings import Embeddings
from curated_data.stages.index import AnyPool
from curated_data.stages.stage import Run, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grown:
    """Which of the n samples of a pool that has grown an earlier tree was built over.

    Samples that were in the tree stay, whatever they are copies of. All others are looked at again, also
    those that were removed before the tree was built: what they were copies of may have left the pool since.

    Attributes:
        known: (n,) bool, the samples that the tree was built over, removed ones included.
        in_tree: (n,) bool, those of them that have a cluster.
    """

    known: np.ndarray
    in_tree: np.ndarray


@dataclass(frozen=True)
class NearDuplicates(Stage):
    """Which samples of a pool are copies of others, or of held-out ones; the artifact is a `Removed`.

    Its inputs are the embeddings, those of the held-out samples if there are any, and the tree (`base`) that
    a pool has grown around.
    """

    place = NEAR_DUPLICATES
    kind = "near_duplicates"
    step = "near_duplicates"
    version = 4

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config.near_duplicates)

    def build(
        self,
        run: Run,
        pool: AnyPool,
        store: EmbeddingStore,
        held_out: EmbeddingStore | None,
        grown: Grown | None = None,
    ) -> np.ndarray:
        """(n,) bool: which samples were kept."""
        settings = self.config.near_duplicates

        def build(folder: Path) -> None:
            store.verify()
            valid = store.valid
            contents = None
            if isinstance(pool, ShardPool) and settings.prefer == "largest":
                contents = image_contents(pool)
            found = near_duplicates(
                store,
                valid=valid,
                threshold=settings.threshold,
                n_neighbours=settings.n_neighbours,
                same=None if contents is None else exact_groups(contents.digest),
                prefer=None if contents is None else contents.n_pixels,
                held_out=None if held_out is None else held_out.as_array()[held_out.valid],
                stay=None if grown is None else grown.in_tree,
            )
            match = found.held_out_match
            if held_out is not None:  # from rows that were compared to samples of the held-out pool
                match = np.append(np.flatnonzero(held_out.valid), -1)[match]
            Removed(found.keep, found.near, match, found.cosine).save(folder)
            left_out = valid & ~found.keep
            counts = {"removed": int(left_out.sum()), "held_out_matches": int((match >= 0).sum())}
            if grown is not None:
                counts["removed_new"] = int((left_out & ~grown.known).sum())
                counts["held_out_in_tree"] = int((grown.in_tree & (match >= 0)).sum())
            self.write_manifest(folder, **counts)
            log.info("near-duplicates: %d samples removed", counts["removed"])

        run.once(self, build)
        return self.open(len(store))

    def open(self, n: int) -> np.ndarray:
        """(n,) bool: which samples were kept."""
        return read_array(self.folder, "keep", read_manifest(self.folder, self.kind), dtype=bool, shape=(n,))

    def counts(self, *names: str) -> dict[str, int]:
        """Numbers that `build` has found, from the manifest."""
        manifest = read_manifest(self.folder, self.kind)
        return {name: manifest[name] for name in names}

    def cost(self, n: int, dimension: int) -> Cost:
        """Of n samples; the time is not measured."""
        return Cost(
            name=self.step,
            cached=self.is_cached,
            seconds=0.0 if self.is_cached else None,
            note="each sample's nearest neighbours, on one rank",
            # The rows of a cell and its neighbours, and faiss's copies.
            memory=6 * min(n, ONE_CELL) * 4 * dimension + 100 * n,
        )


def check_preference(config: CurationConfig, pool: AnyPool) -> None:
    """Check, before anything is embedded, that near-duplicates can be told apart as asked.

    Raises:
        ConfigError: the largest copies are to be kept, and the pool has no images.
    """
    asked = config.near_duplicates.enabled and config.near_duplicates.prefer == "largest"
    if isinstance(pool, EmbeddedPool):
        if asked:
            raise ConfigError("near_duplicates.prefer: 'largest' needs images, and the pool holds rows")
        return
    present = pool.index().extensions
    if asked and not has_images(present, pool.image_extensions):
        raise ConfigError(
            "near_duplicates.prefer: 'largest' needs images, and the pool has none, its members are "
            f"{', '.join(present)}; leave it out"
        )


def held_out_embeddings(config: CurationConfig, of: Embeddings) -> Embeddings | None:
    """The stage that embeds the samples which the pool must not contain copies of; None if there are none.

    Their shards are indexed now, before anything takes long.

    Args:
        of: the stage of the pool, by whose settings their images are decoded too. Those of a pool of rows are
            `.npy` files of rows.

    Raises:
        PoolError: no shard matches, one cannot be read, or they are empty.
        ConfigError: rows of another length than those of the pool.
    """
    if not (config.near_duplicates.enabled and config.near_duplicates.held_out):
        return None
    held_out, like, where = config.near_duplicates.held_out, of.pool, "near_duplicates.held_out"
    if not isinstance(like, EmbeddedPool):
        return of.of_shards(held_out, where)
    try:
        rows = EmbeddedPool(held_out)
    except PoolError as error:  # which would read as if it were of the pool itself
        raise PoolError(f"{where}: {error}") from error
    if rows.name != like.name:
        raise ConfigError(
            f"{where}: its rows are {rows.dimension} x {rows.dtype}, those of the pool {like.dimension} x "
            f"{like.dtype}; give embeddings of the same network and type"
        )
    return of.of_pool(rows)


def embed_held_out(stage: Embeddings | None, run: Run) -> EmbeddingStore | None:
    """The embeddings of `held_out_embeddings`.

    Raises:
        ConfigError: not one of the samples can be embedded, so that nothing would be held out.
    """
    if stage is None:
        return None
    store = stage.build(run.device)
    if store.n_failures == len(store):
        first = next(store.iterate_failures())
        raise ConfigError(
            f"near_duplicates.held_out: none of its {len(store)} samples could be embedded; give shards that "
            f"the embedder can read, or leave it out; the first: {first['shard']}, key {first['key']!r}: "
            f"{first['reason']}"
        )
    if store.n_failures:
        log.warning(
            "near_duplicates.held_out: %d of %d held-out samples could not be embedded; copies of these are "
            "not recognised in the pool",
            store.n_failures,
            len(store),
        )
    return store
