"""What a curation gives, and its last step, which is the same whether it is new, extended or made again."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.cache.holds import Hold
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.selection.metrics import cluster_balance
from curated_data.stages.index import AnyPool
from curated_data.stages.retrieval import Retrieval, SeedSet
from curated_data.stages.selection import Selection
from curated_data.stages.stage import Run

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curation:
    """The result of a curation.

    Attributes:
        ids: (m,) int64, the selected samples in ascending order, with repeats if `max_repeats` > 1.
        tree: the clusters; its level 0 is the pool.
        embeddings: of the whole pool.
        report: what each stage found, as plain numbers and strings.
        config: the settings, with derived levels filled in.
        folders: the folder of each stage's artifact in the cache.
        nested: by target of `nested_sizes`, the ids of that selection, which lies inside the next larger one.

    Examples:
        >>> from curated_data import curate
        >>> curation = curate(
        ...     "pool-{000..001}.tar", {"target_size": 10}, embedder="pixels:8", cache_dir="cache"
        ... )
        >>> curation.tree.n_samples, curation.report["failed"]
        (40, 0)
    """

    ids: np.ndarray
    tree: ClusterTree
    embeddings: EmbeddingStore
    report: dict[str, Any]
    config: CurationConfig
    folders: dict[str, Path]
    nested: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # While the curation is in use, no other run removes what it consists of.
        object.__setattr__(self, "_holds", [Hold(folder) for folder in self.folders.values()])

    def __repr__(self) -> str:
        selected, total = self.report["selected"], self.report["samples"]
        return f"Curation({selected:,} of {total:,} samples, {self.tree!r})"

    def _repr_html_(self) -> str:
        from curated_data.report.summary import as_html

        return as_html(self)

    def show(self, pool: AnyPool | None = None) -> None:
        """Print what the selection changed and its figures; in a notebook, with pictures.

        Args:
            pool: that was curated, for classes and for images.
        """
        from curated_data.report.summary import show

        show(self, pool)

    def table(self, pool: AnyPool | None = None, **options: Any) -> "pa.Table":
        """All that is known of each sample, as a table in memory; `CurationTable` lists its columns.

        For what does not fit into memory, `CurationTable(curation, pool).write("curation.parquet")`.

        Args:
            pool: that was curated; None leaves out what only it knows.
            options: of `CurationTable`, as `selected=True` or `images=64`.

        Examples:
            >>> from curated_data import ShardPool, curate
            >>> pool = ShardPool("pool-{000..001}.tar")
            >>> curation = curate(pool, {"target_size": 10}, embedder="pixels:8", cache_dir="cache")
            >>> curation.table(pool, selected=True).num_rows
            10
        """
        from curated_data.report.table import CurationTable

        return CurationTable(self, pool, **options).read()


def select(
    run: Run,
    config: CurationConfig,
    tree: ClusterTree,
    store: EmbeddingStore,
    figures: Callable[[np.ndarray], dict[str, Any]],
    seeds: Mapping[str, SeedSet] | None = None,
) -> Curation:
    """Draw the selection from a tree that the run has built.

    Args:
        tree, store, figures: as for `Selection.build`.
        seeds: of the retrieval, see `embed_seeds`.
    """
    inputs, retrieval = {"tree": run.folders["tree"].name}, None
    if seeds:
        fingerprints = {name: found.fingerprint for name, found in seeds.items()}
        retrieval = Retrieval.of(run.root, config, inputs["tree"], fingerprints)
        retrieval.build(run, tree, store, seeds)
        inputs[retrieval.place] = retrieval.name
    drawn = Selection(run.root, config, inputs).build(run, tree, store, figures, retrieval)
    report = drawn.report | {"cached": run.cached, "seconds": run.seconds}
    log.info(
        "selection: %d of %d samples%s",
        len(drawn.ids),
        tree.n_samples,
        " (found in the cache)" if all(run.cached.values()) else "",
    )
    return Curation(drawn.ids, tree, store, report, config, run.folders, drawn.nested)


def report_of(
    pool: AnyPool,
    store: EmbeddingStore,
    valid: np.ndarray,
    tree: ClusterTree,
    ids: np.ndarray,
    config: CurationConfig,
) -> dict[str, Any]:
    """A curation's numbers: what went in, what was left out and why, what was selected.

    Args:
        valid: (n,) bool, the samples that were to be clustered; those that the tree lacks are `excluded`, as
            zero embeddings are under the cosine metric.
    """
    return {
        "shards": len(pool.urls),
        "samples": len(pool),
        "failed": store.n_failures,
        "near_duplicates": int(store.valid.sum() - valid.sum()),
        "excluded": int((valid & (tree.parent[1] == EXCLUDED)).sum()),
        "target_size": config.target_size,
        "selected": len(ids),
        "distinct": len(np.unique(ids)),
        "levels": [dataclasses.asdict(level) for level in cluster_balance(tree, ids)],
    }
