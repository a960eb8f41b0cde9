"""The last stage: which samples to train on, drawn from the tree."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.layout import SELECTION
from curated_data.cache.remedies import Remedy
from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig, load_config
from curated_data.embedding import EmbeddingStore
from curated_data.errors import CacheError, ConfigError
from curated_data.selection.included import with_included
from curated_data.selection.sampling import Strategy, flat_sample, hierarchical_sample
from curated_data.selection.sparse import BLOCK, CELL, find_neighbours, sparse_sample
from curated_data.stages.cost import Cost
from curated_data.stages.stage import Run, Stage

log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """A selection as it is on disk.

    Attributes:
        ids: (m,) int64, ascending, with repeats.
        report, config: of the run that drew it.
    """

    ids: np.ndarray
    report: dict[str, Any]
    config: CurationConfig


@dataclass(frozen=True)
class Selection(Stage):
    """Ids drawn from a tree, which is its input, with the report and the settings of their curation."""

    place = SELECTION
    kind = "selection"
    step = "sample"
    version = 4

    @property
    def settings(self) -> dict[str, Any]:
        names = ("target_size", "strategy", "sampling", "max_repeats", "seed")
        include = {"include": self.config.include} if self.config.include else {}
        return {name: getattr(self.config, name) for name in names} | include

    def build(
        self,
        run: Run,
        tree: ClusterTree,
        store: EmbeddingStore,
        figures: Callable[[np.ndarray], dict[str, Any]],
    ) -> Drawn:
        """Draw the ids.

        Args:
            tree: over n samples.
            store: embeddings of all of them, for their neighbours.
            figures: of the selected ids, the report of their curation: plain numbers and strings that depend
                on nothing but the tree and the settings.
        """

        def build(folder: Path) -> None:
            ids = self._with_included(self._draw(tree, store), tree, store)
            np.save(folder / "ids.npy", ids)
            config = dataclasses.asdict(self.config)
            self.write_manifest(folder, size=len(ids), report=figures(ids), config=config)

        return open_selection(run.once(self, build), tree.n_samples)

    def _draw(self, tree: ClusterTree, store: EmbeddingStore) -> np.ndarray:
        config = self.config
        how: dict[str, Any] = {"max_repeats": config.max_repeats, "seed": config.seed}
        if config.sampling == "sparse":
            return sparse_sample(tree, find_neighbours(store, tree), config.target_size, **how)
        sample = flat_sample if config.sampling == "flat" else hierarchical_sample
        strategy = cast(Strategy, config.strategy)  # one of them, by `load_config`
        return sample(tree, config.target_size, strategy=strategy, **how)

    def _with_included(self, ids: np.ndarray, tree: ClusterTree, store: EmbeddingStore) -> np.ndarray:
        included = np.array(self.config.include, np.int64)  # by `opened`, ids alone
        if not len(included):
            return ids
        usable = included[store.valid[included]]
        if len(usable) < len(included):
            n_lost = len(included) - len(usable)
            log.warning("include: %d samples are not selected, since they could not be embedded", n_lost)
        return with_included(tree, ids, usable, self.config.target_size, seed=self.config.seed)

    def cost(self, n: int, dimension: int) -> Cost:
        """Of drawing from n samples; the time is not measured."""
        memory = 100 * n
        if self.config.sampling == "sparse":
            # Three copies of a block of rows, or of a very large cluster; then a cell's cosines.
            rows, clusters = 4 * n * dimension, sum(level.n_clusters for level in self.config.levels or ())
            memory += 3 * max(min(rows, 4 * BLOCK * dimension), 2 * rows // max(clusters, 1))
            memory += 12 * min(n, CELL) ** 2
        return Cost(
            name=self.step,
            cached=self.is_cached,
            seconds=0.0 if self.is_cached else None,
            note=f"{self.config.target_size:,} ids",
            memory=memory,
        )


def open_selection(folder: Path, n_samples: int) -> Drawn:
    """A selection by its folder, of a pool of so many samples.

    Raises:
        CacheError: it is missing or damaged, or an earlier version drew it.
    """
    manifest = read_manifest(folder, Selection.kind)
    if not all(isinstance(manifest.get(name), dict) for name in ("report", "config")):
        raise CacheError(
            f"{folder}: was drawn by an earlier version, which kept less about it; run its curation again, "
            "which draws it again"
        )
    ids = read_array(folder, "ids", manifest, dtype=np.int64, shape=(manifest.get("size"),))
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_samples:
        raise CacheError(
            f"{folder / 'ids.npy'}: damaged (ids from {ids.min()} to {ids.max()}, of {n_samples} samples); "
            f"{Remedy(folder / 'ids.npy')}"
        )
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        try:
            config = load_config(manifest["config"])
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return Drawn(ids, manifest["report"], config)
