"""What levels, resamplings and iterations to set: how flat a selection each gives, for how many CPU seconds.

    python -m benchmarks.settings mixture-256 mixture-32 FEATURES.npz --seeds 5 --out settings.json

A pool is an `.npz` of `x` (n, d) and `label` (n,), or a drawn one: `mixture-D`, a long tail of overlapping
components in D dimensions. A tenth of the pool is sampled. Flatness is the number of *effective* labels, exp
of the labels' entropy in the selection, mean of five draws from each tree. The last column counts the seeds
in which a variant is flatter than the published form: what is not so on every pool is no better default.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.kmeans import mixture
from benchmarks.machine import print_machine
from curated_data.clustering import Level, choose_levels, hierarchical_kmeans
from curated_data.selection.sampling import hierarchical_sample

BASE = "published: n/20, n/100; 10 resamplings of half a cluster"


def levels(*shares: int, resamplings: int = 10) -> Callable[[int], list[Level]]:
    """Levels of n / share clusters, resampled by half of an average cluster."""

    def build(n: int) -> list[Level]:
        found, below = [], n
        for share in shares:
            k = n // share
            found.append(Level(k, resamplings, max(2, round(below / k / 2))))
            below = k
        return found

    return build


VARIANTS: dict[str, tuple[Callable[[int], list[Level]], dict[str, int]]] = {
    BASE: (levels(20, 100), {}),
    "5 iterations a resampling": (levels(20, 100), {"resample_n_iter": 5}),
    "1 iteration": (levels(20, 100), {"resample_n_iter": 1}),
    "seeding alone": (levels(20, 100), {"resample_n_iter": 0}),
    "3 resamplings": (levels(20, 100, resamplings=3), {}),
    "no resampling": (levels(20, 100, resamplings=0), {}),
    "one level, n/20": (levels(20), {}),
    "three levels, n/20, n/100, n/500": (levels(20, 100, 500), {}),
    "finer: n/5, n/50": (levels(5, 50), {}),
    "coarser: n/50, n/500": (levels(50, 500), {}),
    "auto": (lambda n: choose_levels(n, n // 10), {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pools", nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--metric", default="l2", choices=("l2", "cosine"))
    parser.add_argument("--variants", type=int, nargs="+", help="by their place, from 0 (default: all)")
    parser.add_argument("--out", type=Path, help="keep what is measured; a second run continues from it")
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    kept = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    names = [list(VARIANTS)[i] for i in options.variants] if options.variants else list(VARIANTS)
    for pool in options.pools:
        x, label = load(pool)
        print(
            f"\n{Path(pool).stem}: {len(x)} x {x.shape[1]}, {len(np.unique(label))} labels, {options.metric}"
        )
        print("| | effective labels | seen | CPU s | flatter in |\n|---|---|---|---|---|")
        rng = np.random.default_rng(0)
        draws = [label[rng.choice(len(x), len(x) // 10, replace=False)] for _ in range(options.seeds)]
        show("random", [[effective(d), len(np.unique(d)), 0.0] for d in draws], None)
        base = None
        for name in names:
            runs = []
            for seed in range(options.seeds):
                key = f"{Path(pool).stem}/{options.metric}/{name}/{seed}"
                if key not in kept:
                    kept[key] = measure(x, label, name, options.metric, seed)
                    if options.out:
                        options.out.write_text(json.dumps(kept, indent=1))
                runs.append(kept[key])
            base = base or runs
            show(name, runs, base)


def measure(x: np.ndarray, label: np.ndarray, name: str, metric: str, seed: int) -> list[float]:
    """Effective labels, labels seen, CPU seconds of one tree."""
    build, settings = VARIANTS[name]
    began = time.process_time()
    tree = hierarchical_kmeans(x, build(len(x)), seed=seed, metric=metric, **settings)
    seconds = time.process_time() - began
    draws = [label[hierarchical_sample(tree, len(x) // 10, seed=draw)] for draw in range(5)]
    seen = float(np.mean([len(np.unique(draw)) for draw in draws]))
    return [float(np.mean([effective(draw) for draw in draws])), seen, seconds]


def load(pool: str) -> tuple[np.ndarray, np.ndarray]:
    if pool.startswith("mixture-"):
        return mixture(20_000, 0, n_components=1_000, d=int(pool.removeprefix("mixture-")))
    with np.load(pool, allow_pickle=False) as arrays:
        return arrays["x"], arrays["label"]


def effective(label: np.ndarray) -> float:
    share = np.unique(label, return_counts=True)[1] / len(label)
    return math.exp(-(share * np.log(share)).sum())


def show(name: str, runs: list[list[float]], base: list[list[float]] | None) -> None:
    balance, seen, seconds = (np.array(column) for column in zip(*runs, strict=True))
    wins = "" if base is None else f"{sum(a[0] > b[0] for a, b in zip(runs, base, strict=True))}/{len(runs)}"
    print(
        f"| {name} | {balance.mean():.2f} ± {balance.std():.2f} | {seen.mean():.1f} "
        f"| {np.median(seconds):.1f} | {wins} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
