"""Evaluate embedders on a suite of datasets: each is embedded once, cached, and every evaluation runs on it.

    uv run recipes/evaluate.py efficientnet_lite0:64 pixels:28 --suite configs/suites/small.yaml
    uv run recipes/evaluate.py checkpoint:runs/a.ckpt checkpoint:runs/b.ckpt --suite configs/suites/paper.yaml
    \
        --root /datasets

One column an embedder, one row a figure; with two or more, the difference of each to the first. Writes
table.md, results.json and results.png to --out. A dataset that is not there is named with what to put where;
the others run.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.markdown import Markdown

from curated_data import ShardPool, ShardWriter, kmeans
from curated_data.cache import atomic_path, atomic_write_json, fingerprint, open_cache
from curated_data.config import read_yaml, structured
from curated_data.embedding import Embedder, embed_pool, resolve_embedder
from curated_data.errors import ConfigError, CuratedDataError
from curated_data.pool import import_folder
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import linear
from lightning_modules.evaluation.retrieval import retrieval

log = logging.getLogger("evaluate")

EVALUATIONS = ("knn", "linear", "retrieval", "clustering", "health")


@dataclass
class Dataset:
    """A labelled train and test set.

    Attributes:
        layout: "shards" (WebDataset, with .cls), "folder" (a folder a class), or "torchvision".
        train, test: below the root: shards by pattern, a folder, or the keyword arguments of the torchvision
            class that choose the part, as {split: train}.
        dataset: the torchvision class.
        evaluations: which to run.
    """

    layout: str
    train: Any
    test: Any
    dataset: str = ""
    evaluations: list[str] = field(default_factory=lambda: ["knn", "linear"])


def main() -> int:
    """Run the suite; returns 0, or 1 where a dataset was missing, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("embedders", nargs="+", help="names, as checkpoint:FILE or timm:MODEL")
    parser.add_argument("--suite", default="configs/suites/small.yaml", help="(default: %(default)s)")
    parser.add_argument("--root", default=".", help="folder that the suite's paths are below (default: .)")
    parser.add_argument("--cache-dir", default="runs/cache", help="(default: %(default)s)")
    parser.add_argument("--out", default="runs/evaluation", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(options)
    except CuratedDataError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Evaluate every embedder on every dataset that is there; write and print the table."""
    suite = load_suite(options.suite)
    root, cache, out = Path(options.root), open_cache(options.cache_dir), Path(options.out)
    embedders = {name: resolve_embedder(name) for name in options.embedders}
    pools, missing = {}, []
    for name, dataset in suite.items():
        try:
            pools[name] = {part: open_part(name, dataset, part, root, cache) for part in ("train", "test")}
        except (CuratedDataError, FileNotFoundError, RuntimeError) as error:
            missing.append(f"{name}: {str(error).splitlines()[0]}")
    results = {
        name: {dataset: evaluate(embedder, pools[dataset], suite[dataset].evaluations, cache, options.workers)
               for dataset in pools}
        for name, embedder in embedders.items()
    }  # fmt: skip
    table = as_table(results)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table + "\n")
    atomic_write_json(out / "results.json", results)
    if pools:
        draw(results).savefig(out / "results.png", dpi=150)
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(table))
    for line in missing:
        print(f"not evaluated, {line}", file=sys.stderr)
    print(f"{out / 'table.md'}, {out / 'results.json'}, {out / 'results.png'}")
    return 1 if missing else 0


def load_suite(path: str) -> dict[str, Dataset]:
    """The datasets of a suite by name.

    Raises:
        ConfigError: an unknown field, layout or evaluation.
    """
    content = OmegaConf.to_container(read_yaml(Path(path)))
    suite = {name: structured(Dataset, fields) for name, fields in content.get("datasets", {}).items()}
    if not suite:
        raise ConfigError(f"{path}: no datasets; list them below `datasets:`")
    for name, dataset in suite.items():
        if dataset.layout not in ("shards", "folder", "torchvision"):
            raise ConfigError(
                f"{name}.layout: expected shards, folder or torchvision, got {dataset.layout!r}"
            )
        unknown = set(dataset.evaluations) - set(EVALUATIONS)
        if unknown:
            raise ConfigError(
                f"{name}.evaluations: expected of {', '.join(EVALUATIONS)}, got {sorted(unknown)}"
            )
    return suite


def open_part(name: str, dataset: Dataset, part: str, root: Path, cache: Path) -> ShardPool:
    """A dataset's train or test part as a pool; folders and torchvision's sets become shards in the cache
    once.
    """
    source = getattr(dataset, part)
    if dataset.layout == "shards":
        patterns = [source] if isinstance(source, str) else source
        return ShardPool([str(root / pattern) for pattern in patterns], cache_dir=cache)
    key = fingerprint(
        dataset=dataset.dataset, source=source, root=root.absolute(), layout=dataset.layout, version=1
    )
    folder = cache / "datasets" / f"{name}-{part}-{key}"
    if not folder.exists():
        with atomic_path(folder) as temporary:
            if dataset.layout == "folder":
                import_folder(root / source, temporary)
            else:
                convert(dataset.dataset, source, root, temporary)
    return ShardPool(str(folder / "*.tar"), cache_dir=cache)


def convert(dataset: str, part: Mapping[str, Any], root: Path, out: Path) -> None:
    """Write a torchvision classification set as shards, its images losslessly.

    Raises:
        ConfigError: torchvision has no such class.
        RuntimeError: (torchvision's) the files are not below the root.
    """
    from torchvision import datasets

    if not hasattr(datasets, dataset):
        raise ConfigError(f"torchvision.datasets has no {dataset!r}")
    data = getattr(datasets, dataset)(root, **part)
    with ShardWriter(out / "part-%05d.tar") as writer:
        for number, (image, label) in enumerate(data):
            writer.write(
                {"__key__": f"{number:07d}", "png": np.asarray(image.convert("RGB")), "cls": int(label)}
            )


def evaluate(
    embedder: Embedder, pools: Mapping[str, ShardPool], evaluations: list[str], cache: Path, workers: int
) -> dict[str, float]:
    """Every figure of one embedder on one dataset, by name, in 0..1 but for the effective rank."""
    x, y = {}, {}
    for part, pool in pools.items():
        store = embed_pool(pool, embedder, cache, num_workers=workers)
        labels = pool.labels(np.arange(len(pool)))
        ids = np.flatnonzero(store.valid & (labels >= 0))
        x[part], y[part] = store.rows(ids).astype(np.float32), labels[ids]
    found: dict[str, float] = {}
    if "knn" in evaluations:
        k = [k for k in (10, 20, 100, 200) if k <= len(x["train"])]
        result = knn(x["train"], y["train"], x["test"], y["test"], k=k)
        found |= {f"k-NN, k = {k}": accuracy for k, accuracy in result.accuracy.items()}
        found["k-NN, best, class average"] = max(result.class_accuracy.values())
    if "linear" in evaluations:
        heads = linear(x["train"], y["train"], x["test"], y["test"]).heads
        found |= {f"linear, {head['protocol']}": head["accuracy"] for head in heads}
    if "retrieval" in evaluations:
        result = retrieval(x["test"], x["train"], query_labels=y["test"], gallery_labels=y["train"])
        found |= {f"retrieval, mAP@{k}": scores["map"] for k, scores in result.scores.items()}
    if "clustering" in evaluations:
        assignment = kmeans(x["test"], len(np.unique(y["test"])), metric="cosine", n_init=3).assignment
        agreement = clustering(assignment, y["test"])
        found |= {"k-means, accuracy": agreement.accuracy, "k-means, NMI": agreement.nmi}
    if "health" in evaluations:
        found["effective rank"] = health(x["test"]).effective_rank
    return found


def as_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table: a row a figure, a column an embedder, then differences to the first."""
    first, *others = results
    header = ["dataset", "figure", *results, *(f"{name} − {first}" for name in others)]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for dataset, figures in results[first].items():
        for figure, base in figures.items():
            values = [results[name][dataset][figure] for name in results]
            cells = [f"{value:.3f}" for value in values] + [f"{value - base:+.3f}" for value in values[1:]]
            lines.append(f"| {dataset} | {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Bars of every figure that lies in 0..1, grouped by embedder."""
    first = next(iter(results))
    rows = [(d, f) for d, figures in results[first].items() for f in figures if f != "effective rank"]
    figure = Figure(figsize=(8, 0.9 + 0.22 * len(rows) * (len(results) + 0.6)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(results)
    for number, (name, found) in enumerate(results.items()):
        places = np.arange(len(rows)) + (number - (len(results) - 1) / 2) * height
        bars = axes.barh(places, [found[d][f] for d, f in rows], height, label=name)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=7)
    axes.set_yticks(np.arange(len(rows)), [f"{d}: {f}" for d, f in rows], fontsize=8)
    axes.set_xlim(0, 1.08)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
