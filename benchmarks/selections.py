"""Six ways to select as many images from a long-tailed pool, and what SimCLR learns from each.

    python -m benchmarks.selections                  # the embedded Fashion-MNIST, 3 seeds
    python -m benchmarks.selections --data FOLDER    # shards *train*.tar and *test*.tar with .cls labels
    python -m benchmarks.selections --data FOLDER --epochs 0    # how balanced they are, nothing trained

The ways: at random; from flat k-means; from a hierarchy without resampling, and with it; the latter drawn
again twice during training with the model's own features (`RecurationCallback`); and by the true labels, as
balanced as the pool allows, which is the ceiling of balance. The whole pool, seen for as many steps, and a
network with random weights are given beside them. Everything else is the quickstart's: embedder, network,
settings, number of optimizer steps, and a k-NN bank that is the whole labelled pool. A seed is that of
clustering, sampling, initial weights, order and views at once, the same for every row, so that differences to
random are paired by seed.

Every training is kept in the cache as it ends: a run that was killed continues with the next.
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.machine import print_machine
from curated_data import (
    ClusterTree,
    CuratedDataModule,
    CurationConfig,
    RecurationCallback,
    ShardPool,
    curate,
    flat_sample,
)
from curated_data.cache.artifacts import (
    atomic_write_json,
    build_once,
    fingerprint,
    open_cache,
    write_manifest,
)
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.levels import choose_levels
from lightning_modules import SimCLR
from recipes import quickstart
from recipes.recurate import History

WAYS = {
    "random": "random",
    "flat": "flat k-means",
    "hierarchical": "hierarchical, no resampling",
    "resampled": "hierarchical, 10 resamplings",
    "recurated": "re-curated twice in training",
    "labels": "balanced by true labels",
    "pool": "the whole pool, as many steps",
    "untrained": "no training",
}
RECURATIONS = 2


def main() -> None:
    """Fill in whatever cells of the table the cache does not hold, and print it."""
    options = parse_options()
    cache = open_cache(Path(options.out) / "cache")
    pool = ShardPool(quickstart.choose_data(options).pool, cache_dir=cache)
    embed_pool(pool, resolve_embedder(options.embedder), cache, num_workers=1)  # once, before jobs share it
    cells = [(way, seed) for seed in range(options.seeds) for way in options.ways]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=quiet) as jobs:
        found = list(jobs.map(cell, [options] * len(cells), *zip(*cells)))
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for (way, _), figures in zip(cells, found):
        rows[way].append(figures)
    print_table(rows)
    if options.figure:
        draw(rows).savefig(options.figure, dpi=150)


def parse_options() -> argparse.Namespace:
    """The command line; with what else the quickstart's functions ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="fashion", help="fashion, cifar10, or a folder of shards")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default: %(default)s)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows of the table (default: all)"
    )
    parser.add_argument("--embedder", default="efficientnet_lite0:64", help="(default: %(default)s)")
    parser.add_argument("--metric", choices=("l2", "cosine"), help="of the clustering (default: l2)")
    parser.add_argument("--target-size", type=int, help="samples to select (default: a fifth of the pool)")
    parser.add_argument(
        "--epochs", type=int, default=30, help="over a selection; 0: train nothing (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="trainings at once, a core each (default: %(default)s)"
    )
    parser.add_argument("--out", default="runs/selections", help="(default: %(default)s)")
    parser.add_argument("--figure", metavar="PNG", help="draw the table there")
    parser.set_defaults(pool=None, test=[], small=False, image_size=None, backbone="resnet10")
    options = parser.parse_args()
    print_machine()
    if not options.epochs:
        options.ways = [way for way in options.ways if way not in ("recurated", "untrained")]
    return options


def quiet() -> None:
    """One thread a job, and no lines of every epoch."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quickstart.quieten_lightning()


def cell(options: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    """The figures of one selection and the model trained on it, or as an earlier run left them."""
    cache = open_cache(Path(options.out) / "cache")
    data = quickstart.choose_data(options)
    settings = {
        "way": way,
        "seed": seed,
        "pool": ShardPool(data.pool, cache_dir=cache).state,
        "embedder": options.embedder,
        "metric": options.metric or "l2",
        "target_size": data.target_size,
        "epochs": options.epochs,
        "model": quickstart.simclr_settings(data, options.backbone),
    }

    def build(folder: Path) -> None:
        started = time.process_time()
        figures = measure(way, seed, data, options, cache)
        figures["cpu_seconds"] = time.process_time() - started
        atomic_write_json(folder / "figures.json", figures)
        write_manifest(folder, "selections", {"settings": settings})
        print(f"{way}, seed {seed}: {json.dumps(figures)}", file=sys.stderr, flush=True)

    folder, _ = build_once(cache / "selections" / fingerprint(**settings), build)
    return json.loads((folder / "figures.json").read_text())


def measure(
    way: str, seed: int, data: quickstart.Data, options: argparse.Namespace, cache: Path
) -> dict[str, Any]:
    """Select, train, evaluate."""
    pool = ShardPool(data.pool, cache_dir=cache)
    labels = pool.labels(np.arange(len(pool)))
    config = configuration(way, seed, data, options, len(pool))
    ids = select(way, seed, pool, labels, config, options, cache)

    if not options.epochs:
        return quickstart.balance(labels, ids)

    model = quickstart.simclr_settings(data, options.backbone)
    steps = options.epochs * (data.target_size // quickstart.BATCH_SIZE)
    if way == "pool":  # the same warm-up in steps
        model["warmup_epochs"] *= data.target_size / len(pool)
    lightning.seed_everything(seed, verbose=False)
    module = SimCLR(**model)
    if way == "untrained":
        return quickstart.accuracies(module, pool, labels, data, cache)

    chosen: dict[str, Any] = (
        {"curation": config, "embedder": options.embedder} if way == "recurated" else {"selection": ids}
    )
    stream = CuratedDataModule(
        pool,
        **chosen,
        batch_size=quickstart.BATCH_SIZE,
        seed=seed,
        cache_dir=cache,
        loader={"num_workers": 0},
    )
    history = History()
    callbacks = [history]
    if way == "recurated":
        callbacks.append(
            RecurationCallback(every_n_epochs=options.epochs // (RECURATIONS + 1), most=RECURATIONS)
        )
    trainer = quickstart.quiet_trainer(
        max_epochs=options.epochs, max_steps=steps, accelerator="cpu", callbacks=callbacks
    )
    trainer.fit(module, stream)
    assert trainer.global_step == steps, f"{way}: {trainer.global_step} steps, expected {steps}"
    balances = [quickstart.balance(labels, ids) for _, ids in history.selections]
    return {
        **balances[-1],
        **quickstart.accuracies(module, pool, labels, data, cache),
        "steps": steps,
        "entropies": [balance["entropy"] for balance in balances],
        "counts": np.bincount(labels[history.selections[-1][1]], minlength=labels.max() + 1).tolist(),
    }


def configuration(
    way: str, seed: int, data: quickstart.Data, options: argparse.Namespace, n_samples: int
) -> CurationConfig:
    """Each way leaves out one thing of the next: the upper levels, the resampling, the re-curation."""
    levels = choose_levels(n_samples)
    if way in ("flat", "hierarchical"):
        levels = [dataclasses.replace(level, n_resamples=0) for level in levels]
    return CurationConfig(
        target_size=data.target_size,
        levels=levels[:1] if way == "flat" else levels,
        sampling="flat" if way == "flat" else "hierarchical",
        metric=options.metric or "l2",
        seed=seed,
    )


def select(
    way: str,
    seed: int,
    pool: ShardPool,
    labels: np.ndarray,
    config: CurationConfig,
    options: argparse.Namespace,
    cache: Path,
) -> np.ndarray:
    """Ids that a training starts with."""
    if way in ("pool", "untrained"):
        return np.arange(len(pool))
    if way == "random":
        return np.sort(np.random.default_rng(seed).choice(len(pool), config.target_size, replace=False))
    if way == "labels":  # a tree whose clusters are the classes
        tree = ClusterTree({1: np.eye(labels.max() + 1, dtype=np.float32)}, {1: labels})
        return flat_sample(tree, config.target_size, seed=seed)
    return curate(pool, config, embedder=options.embedder, cache_dir=cache).ids


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Mean ± standard deviation over seeds, as Markdown; differences to random are of the same seed."""
    columns = {"entropy": (3, 1), "ratio": (1, 1), "all": (1, 100), "rarest": (1, 100)}
    print("| | class entropy, nats | head / tail | k-NN, all | k-NN, rarest 3 | all, less random | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for way, figures in rows.items():
        cells = []
        for name, (digits, scale) in columns.items():
            values = [scale * seed[name] for seed in figures if name in seed]
            cells.append(spread(values, digits))
        base = rows.get("random") if way != "random" else None
        pairs = [(ours, other) for ours, other in zip(figures, base or ()) if "all" in ours]
        gains = [100 * (ours["all"] - other["all"]) for ours, other in pairs]
        cells.append(spread(gains, 1))
        cells.append(f"{np.mean([seed['cpu_seconds'] for seed in figures]):.0f}")
        print(f"| {WAYS[way]} | " + " | ".join(cells) + " |")


def draw(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """Class entropy of each selection, and k-NN accuracies: a dot a seed, a line at the mean."""
    panels = {
        "entropy": "class entropy of the selection, nats",
        "all": "k-NN, all classes",
        "rarest": "k-NN, rarest 3",
    }
    rows = {way: figures for way, figures in rows.items() if way != "untrained"}
    figure = Figure(figsize=(11, 0.5 * len(rows) + 1), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        for place, figures in enumerate(rows.values()):
            values = [seed[name] for seed in figures]
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6, markersize=6)
            axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(rows)), [WAYS[way] for way in rows])
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # shared by all panels
    return figure


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample deviation; infinite ones (a class is missing) are counted instead."""
    if not values:
        return ""
    if n_infinite := sum(np.isinf(values)):
        return f"∞ in {n_infinite} of {len(values)}"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
