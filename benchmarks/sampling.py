"""Hierarchical sampling by whole levels against one call per cluster: time, memory, and balance.

    python -m benchmarks.sampling [--samples 10000000] [--runs 3]

The peer is what the method is usually written as: recursion in Python over the tree, member lists made
beforehand (their cost is shown apart), a numpy draw in every lowest cluster. Medians of the runs; ratios are
of the same run.
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from benchmarks.machine import print_machine
from curated_data import ClusterTree, flat_sample, hierarchical_sample
from curated_data.programs import described_parser


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[100_000, 10_000, 1_000])
    parser.add_argument("--runs", type=int, default=3)
    parsed = parser.parse_args()
    print_machine()
    n, target = parsed.samples, parsed.samples // 10
    tree = zipf_tree(n, parsed.clusters)
    print(f"{n:,} samples, levels {parsed.clusters}, {target:,} selected; numpy {np.__version__}")

    start = time.process_time()
    children = member_lists(tree)
    lists = time.process_time() - start
    samplers: dict[str, Callable[[int], np.ndarray]] = {
        "recursion, random": lambda seed: recursive(tree, children, target, seed),
        "ours, random": lambda seed: hierarchical_sample(tree, target, seed=seed),
        "ours, closest": lambda seed: hierarchical_sample(tree, target, strategy="closest", seed=seed),
        "ours, up to 4 repeats": lambda seed: hierarchical_sample(tree, target, max_repeats=4, seed=seed),
        "ours, flat": lambda seed: flat_sample(tree, target, seed=seed),
    }
    times: dict[str, list[float]] = {name: [] for name in samplers}
    selections = {}
    for run in range(parsed.runs):
        for name, sample in samplers.items():
            tree._sizes.clear()  # derived arrays count for every run
            start = time.process_time()
            selections[name] = sample(run)
            times[name].append(time.process_time() - start)

    peer = [seconds + lists for seconds in times["recursion, random"]]
    print(f"\n{'':24}{'CPU s':>9}{'x peer':>9}{'selected':>12}{'level 3: least, most given':>28}")
    for name, seconds in times.items():
        ratio = statistics.median(p / s for p, s in zip(peer, seconds))
        top = np.bincount(tree.assignment(tree.n_levels)[selections[name]], minlength=parsed.clusters[-1])
        given = f"{top.min():,}, {top.max():,}"
        print(f"{name:24}{statistics.median(seconds):9.2f}{ratio:9.1f}{len(selections[name]):12,}{given:>28}")
    print(f"{'(its member lists)':24}{lists:9.2f}")

    quotas = [cluster_counts(tree, selections[name]) for name in ("recursion, random", "ours, random")]
    difference = np.abs(quotas[0] - quotas[1]).max()
    print(f"\nsamples by lowest cluster, sorted: largest difference to the peer {difference}")
    tracemalloc.start()
    tree._sizes.clear()
    hierarchical_sample(tree, target)
    print(f"peak of our temporaries: {tracemalloc.get_traced_memory()[1] / n:.1f} bytes per sample")


def zipf_tree(n: int, clusters: list[int]) -> ClusterTree:
    """A tree whose cluster sizes fall as one over their rank at every level."""
    rng = np.random.default_rng(0)
    below, parent = n, {}
    for level, k in enumerate(clusters, 1):
        weights = 1 / np.arange(1, k + 1)
        parent[level] = rng.choice(k, below, p=weights / weights.sum())
        below = k
    centroids = {level: np.zeros((k, 1), np.float32) for level, k in enumerate(clusters, 1)}
    return ClusterTree(centroids, parent, rng.random(n, dtype=np.float32))


def member_lists(tree: ClusterTree) -> dict[int, list[np.ndarray]]:
    """For each level, the nodes below every cluster."""
    lists = {}
    for level, parent in tree.parent.items():
        order = np.argsort(parent, kind="stable")
        lists[level] = np.split(
            order, np.cumsum(np.bincount(parent, minlength=len(tree.centroids[level])))[:-1]
        )
    return lists


def recursive(tree: ClusterTree, children: dict[int, list[np.ndarray]], target: int, seed: int) -> np.ndarray:
    """The plain form: one call per cluster."""
    rng = np.random.default_rng(seed)
    sizes = {level: tree.sizes(level) for level in tree.centroids}
    parts: list[np.ndarray] = []

    def descend(level: int, nodes: np.ndarray, t: int) -> None:
        if level == 0:
            parts.append(rng.choice(nodes, t, replace=False))
            return
        for node, share in zip(nodes.tolist(), fill(sizes[level][nodes], t).tolist()):
            if share:
                descend(level - 1, children[level][node], share)

    def fill(capacity: np.ndarray, t: int) -> np.ndarray:
        low, high = 0, int(capacity.max(initial=0))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if np.minimum(capacity, middle).sum() <= t else (low, middle - 1)
        share = np.minimum(capacity, low)
        above = np.flatnonzero(capacity > low)
        left = min(t - int(share.sum()), len(above))
        if left:
            share[rng.choice(above, left, replace=False)] += 1
        return share

    descend(tree.n_levels, np.arange(len(tree.centroids[tree.n_levels])), target)
    return np.sort(np.concatenate(parts))


def cluster_counts(tree: ClusterTree, ids: np.ndarray) -> np.ndarray:
    return np.sort(np.bincount(tree.parent[1][ids], minlength=len(tree.centroids[1])))


if __name__ == "__main__":
    main()
