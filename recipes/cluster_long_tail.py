r"""Cluster a long-tailed, labelled pool without its labels: k-means and three transport methods side by side.

    uv run recipes/cluster_long_tail.py 'recipes/data/fashion-lt50/fashion-lt50-train-{00..03}.tar' \
        --clusters 10
    uv run recipes/cluster_long_tail.py 'cifar10-lt100-train-*.tar' --clusters 10 \
        --embedder efficientnet_lite0:128

The methods are k-means, balanced optimal transport, P²OT and SP²OT.

Prints accuracy (Hungarian matching), class average, NMI, ARI and macro F1, and accuracy on frequent, medium
and rare classes, as mean and deviation over seeds. Labels are only used for these figures.
"""

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from curated_data import ShardPool, kmeans
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import ConfigError, PoolError
from curated_data.programs import described_parser, report_errors
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.transport_clustering import cluster_embeddings


def main() -> int:
    """Embed, cluster by each method, print; returns the exit status."""
    parser = described_parser(__doc__)
    parser.add_argument("pool", nargs="+", help="shards with .cls labels")
    parser.add_argument(
        "--clusters", type=int, required=True, help="how many clusters, such as one per class"
    )
    parser.add_argument(
        "--embedder", default="efficientnet_lite0:64", help="network that embeds (default: %(default)s)"
    )
    parser.add_argument(
        "--cache-dir", default="runs/cache", help="for the results of all stages (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    return report_errors("cluster_long_tail", lambda: console.print(compare(options)))


def compare(options: argparse.Namespace) -> Table:
    """A table with one row per method and one column per figure."""
    if options.clusters < 2 or options.seeds < 1:
        raise ConfigError(f"--clusters {options.clusters}, --seeds {options.seeds}: need 2 clusters, 1 seed")
    root = open_cache(options.cache_dir)
    pool = ShardPool(options.pool, cache_dir=root)
    store = embed_pool(pool, resolve_embedder(options.embedder), root)
    labels = pool.labels(np.arange(len(pool)))
    ids = np.flatnonzero(store.valid & (labels >= 0))
    if not len(ids):
        raise PoolError(f"{pool.urls[0]}: the pool has no labels (.cls members) to compare clusters with")
    if options.clusters > len(ids):
        raise ConfigError(f"--clusters {options.clusters}: there are only {len(ids)} labelled images")
    x, labels = store.rows(ids).astype(np.float32), np.unique(labels[ids], return_inverse=True)[1]
    counts = np.bincount(labels)

    methods = {
        "k-means": lambda seed: kmeans(x, options.clusters, metric="cosine", seed=seed).assignment,
        "balanced transport": lambda seed: by_transport(x, options.clusters, "ot", seed),
        "P²OT": lambda seed: by_transport(x, options.clusters, "p2ot", seed),
        "SP²OT": lambda seed: by_transport(x, options.clusters, "sp2ot", seed),
    }
    table = Table(title=f"{len(x):,} images, {len(counts)} classes of {counts.max():,} to {counts.min():,}")
    table.add_column("method")
    for name, method in methods.items():
        results = [
            clustering(method(seed), labels, train_counts=counts).rows()[0] for seed in range(options.seeds)
        ]
        columns = [column for column, value in results[0].items() if isinstance(value, float)]
        if len(table.columns) == 1:
            for column in columns:
                table.add_column(column, justify="right")
        values = {column: [result[column] for result in results] for column in columns}
        table.add_row(name, *(f"{np.mean(value):.3f} ± {np.std(value):.3f}" for value in values.values()))
    return table


def by_transport(x: np.ndarray, n_clusters: int, method: str, seed: int) -> np.ndarray:
    """(n,) clusters by optimal transport on centred embeddings."""
    return cluster_embeddings(x, n_clusters, method=method, center=True, seed=seed).assignment


if __name__ == "__main__":
    sys.exit(main())
