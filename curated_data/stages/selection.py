"""The last stage: which samples to train on, drawn from the tree."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curated_data.cache.artifacts import MANIFEST, read_array, read_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.layout import SELECTION
from curated_data.cache.remedies import Remedy
from curated_data.clustering.tree import ClusterTree
from curated_data.config import IN_CELLS, CurationConfig, load_config
from curated_data.embedding import EmbeddingStore
from curated_data.errors import CacheError, ConfigError
from curated_data.selection.draw import draw_all, first_of, sizes_of
from curated_data.selection.quota_rules import are_set, quotas_of
from curated_data.selection.sparse import BLOCK, CELL
from curated_data.stages.cost import Cost
from curated_data.stages.retrieval import Retrieval
from curated_data.stages.stage import Run, Stage


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
            nested = {}
            for size, some in zip(sizes_of(self.config)[1:], inner, strict=True):
                np.save(folder / f"nested_{size}.npy", some)
                nested[str(size)] = len(some)
            more = {"nested": nested} if nested else {}
            config = dataclasses.asdict(self.config)
            report = figures(ids)
            if retrieval is not None:
                report["retrieval"] = retrieval.report(ids, tree.n_samples)
            self.write_manifest(folder, size=len(ids), report=report, config=config, **more)

        return open_selection(run.once(self, build), tree.n_samples)

    def _draw(
        self, tree: ClusterTree, store: EmbeddingStore, retrieval: Retrieval | None
    ) -> list[np.ndarray]:
        """The ids, and those of each smaller selection, the largest first."""
        config = self.config
        found = weights = None
        if retrieval is not None:
            found = retrieval.open(tree.n_samples)
            weights = retrieval.weights(len(tree.centroids[config.retrieval.level]))
        first = first_of(config, store.valid, found)
        if found is not None and not config.retrieval.fill:
            return [np.sort(first[:size]) for size in sizes_of(config)]
        return draw_all(tree, store, config, first, quotas_of(config, tree, weights))

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
