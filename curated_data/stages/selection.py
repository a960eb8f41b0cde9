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
from curated_data.config import IN_CELLS, CurationConfig, load_config
from curated_data.embedding import EmbeddingStore
from curated_data.errors import CacheError, ConfigError
from curated_data.selection.greedy import greedy_order
from curated_data.selection.included import with_included
from curated_data.selection.nested import nested_sample
from curated_data.selection.quota_rules import are_set, quotas_of
from curated_data.selection.quotas import Quotas
from curated_data.selection.retrieved import first_retrieved
from curated_data.selection.sampling import Strategy, flat_sample, hierarchical_sample
from curated_data.selection.sparse import BLOCK, CELL, find_neighbours, sparse_sample
from curated_data.stages.cost import Cost
from curated_data.stages.retrieval import Retrieval
from curated_data.stages.stage import Run, Stage

log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """A selection as it is on disk.

    Attributes:
        ids: (m,) int64, ascending, with repeats.
        nested: by target, such ids of smaller selections inside it.
        report, config: of the run that drew it.
    """

    ids: np.ndarray
    nested: dict[int, np.ndarray]
    report: dict[str, Any]
    config: CurationConfig


@dataclass(frozen=True)
class Selection(Stage):
    """Ids drawn from a tree, which is its input, with the report and the settings of their curation."""

    place = SELECTION
    kind = "selection"
    step = "sample"
    version = 5

    @property
    def settings(self) -> dict[str, Any]:
        names = ("target_size", "strategy", "sampling", "max_repeats", "seed")
        config = self.config
        given: dict[str, Any] = {"include": config.include, "nested_sizes": sorted(set(config.nested_sizes))}
        if config.retrieval.seeds and not config.retrieval.fill:
            given["fill"] = "no"
        if are_set(config):
            given["quotas"] = dataclasses.asdict(config.quotas)
        return {name: getattr(config, name) for name in names} | {k: v for k, v in given.items() if v}

    def build(
        self,
        run: Run,
        tree: ClusterTree,
        store: EmbeddingStore,
        figures: Callable[[np.ndarray], dict[str, Any]],
        retrieval: Retrieval | None = None,
    ) -> Drawn:
        """Draw the ids.

        Args:
            tree: over n samples.
            store: embeddings of all of them, for their neighbours.
            figures: of the selected ids, the report of their curation: plain numbers and strings that depend
                on nothing but the tree and the settings.
            retrieval: a built one, whose name is among the inputs.
        """

        def build(folder: Path) -> None:
            ids, *inner = self._draw(tree, store, retrieval)
            np.save(folder / "ids.npy", ids)
            for size, some in zip(self._nested_sizes, inner, strict=True):
                np.save(folder / f"nested_{size}.npy", some)
            nested = {str(size): len(some) for size, some in zip(self._nested_sizes, inner, strict=True)}
            more = {"nested": nested} if nested else {}
            config = dataclasses.asdict(self.config)
            report = figures(ids)
            if retrieval is not None:
                report["retrieval"] = retrieval.report(ids, tree.n_samples)
            self.write_manifest(folder, size=len(ids), report=report, config=config, **more)

        return open_selection(run.once(self, build), tree.n_samples)

    @property
    def _nested_sizes(self) -> list[int]:
        return sorted(set(self.config.nested_sizes), reverse=True)

    def _draw(
        self, tree: ClusterTree, store: EmbeddingStore, retrieval: Retrieval | None
    ) -> list[np.ndarray]:
        """The ids, and those of each smaller selection, the largest first."""
        config = self.config
        first, quotas = self._first(store), quotas_of(config, tree)
        if retrieval is not None:
            found = retrieval.open(tree.n_samples)
            if found is not None:
                first = np.concatenate([first, found.ids[first_retrieved(found)]])
                first = first[np.sort(np.unique(first, return_index=True)[1])]
                if len(first) > config.target_size:
                    log.warning(
                        "retrieval: %d samples are more than target_size, %d; those of the lowest ranks stay",
                        len(first), config.target_size,
                    )  # fmt: skip
            level = config.retrieval.level
            weights = retrieval.weights(len(tree.centroids[level]))
            if weights is not None:
                given = quotas or Quotas()
                quotas = Quotas(given.temperature or 0.0, given.cap, weights, level)
            if found is not None and not config.retrieval.fill:
                return [np.sort(first[:size]) for size in (config.target_size, *self._nested_sizes)]
        how: dict[str, Any] = {"seed": config.seed, "quotas": quotas}
        if config.sampling == "sparse":
            near = find_neighbours(store, tree)
            how["max_repeats"] = config.max_repeats
            ids = sparse_sample(tree, near, config.target_size, **how)
        elif config.sampling == "greedy":
            order = greedy_order(store, tree, config.target_size)
            ids = np.sort(order)
        else:
            is_flat = config.sampling == "flat"
            how["strategy"] = cast(Strategy, config.strategy)  # one of them, by `load_config`
            # The tree has no distances to these centroids.
            if is_flat and quotas is not None and quotas.level > 1:
                how["embeddings"] = store
            sample = flat_sample if is_flat else hierarchical_sample
            ids = sample(tree, config.target_size, max_repeats=config.max_repeats, **how)

        def holding(ids: np.ndarray, size: int) -> np.ndarray:
            return with_included(tree, ids, np.sort(first[:size]), size, seed=config.seed)

        drawn = [holding(ids, config.target_size)]
        for size in self._nested_sizes:
            if config.sampling == "sparse":
                ids = sparse_sample(tree, near, size, within=drawn[-1], **how)
            elif config.sampling == "greedy":
                first_of = np.concatenate([order[np.isin(order, drawn[-1])], np.setdiff1d(drawn[-1], order)])
                ids = np.sort(first_of[:size])
            else:
                ids = nested_sample(tree, drawn[-1], size, flat=is_flat, **how)
            drawn.append(holding(ids, size))
        return drawn

    def _first(self, store: EmbeddingStore) -> np.ndarray:
        """(k,) int64, what is to be included and can be."""
        included = np.array(self.config.include, np.int64)  # by `opened`, ids alone
        usable = included[store.valid[included]]
        if len(usable) < len(included):
            n_lost = len(included) - len(usable)
            log.warning("include: %d samples are not selected, since they could not be embedded", n_lost)
        return usable

    def cost(self, n: int, dimension: int) -> Cost:
        """Of drawing from n samples; the time is not measured."""
        memory = 100 * n
        if self.config.sampling in IN_CELLS:
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
    ids = _read_ids(folder, "ids", manifest, manifest.get("size"), n_samples)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        sizes = {int(size): int(length) for size, length in dict(manifest.get("nested", {})).items()}
    nested = {
        size: _read_ids(folder, f"nested_{size}", manifest, length, n_samples)
        for size, length in sizes.items()
    }
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        try:
            config = load_config(manifest["config"])
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return Drawn(ids, nested, manifest["report"], config)


def _read_ids(folder: Path, name: str, manifest: dict[str, Any], length: Any, n_samples: int) -> np.ndarray:
    ids = read_array(folder, name, manifest, dtype=np.int64, shape=(length,))
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_samples:
        path = folder / f"{name}.npy"
        raise CacheError(
            f"{path}: damaged (ids from {ids.min()} to {ids.max()}, of {n_samples} samples); {Remedy(path)}"
        )
    return ids
