"""k-means and hierarchical k-means against their peers: CPU seconds, quality, and the share of the peak.

    python -m benchmarks.kmeans peak      # the products' limit, and how near an assignment comes to it
    python -m benchmarks.kmeans flat      # one k-means: ours, scikit-learn, faiss, the reference's algorithm
    python -m benchmarks.kmeans mixture   # 50k x 256, levels 2500/500, 10 resamplings: balance of a sample
    python -m benchmarks.kmeans tree      # 100k x 256, levels 5000/1000, 10 resamplings
    python -m benchmarks.kmeans large     # first level of 100k clusters on 1M x 256 (4 GB of memory)
    python -m benchmarks.kmeans streamed  # rows on disk, larger than max_memory: reading ahead of the work
    python -m benchmarks.kmeans gpu       # one CUDA device: see kmeans_gpu.py; minutes

"The reference's algorithm" is that of `kmeans_reference.py`. `--reference` runs it where it takes minutes
(`flat`, `mixture`); `tree` times parts of it and multiplies. All times are CPU seconds of this process,
summed over its threads: unlike wall time they mean something on a machine that is busy with other work. One
thread, the default, keeps spinning threads out of the sum.
"""

import math
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from benchmarks.kmeans_gpu import gpu
from benchmarks.kmeans_reference import (
    reference_iteration_seconds,
    reference_kmeans,
    reference_seeding_seconds,
    reference_tree,
)
from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from curated_data.clustering import ClusterTree, Level, hierarchical_kmeans, kmeans
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.nearest import Centroids, nearest
from curated_data.clustering.rows import blocks
from curated_data.programs import described_parser
from curated_data.selection.sampling import hierarchical_sample

SMALL_NOISE = 0.25 / 16  # 0.25 / sqrt(d)


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("what", choices=list(PROGRAMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds; medians are printed")
    parser.add_argument("--reference", action="store_true", help="run the reference's algorithm in full too")
    arguments = parser.parse_args()
    print_machine()
    threadpool_limits(arguments.threads)  # of scikit-learn and numpy
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, faiss {faiss.__version__}, {arguments.threads} thread(s)")
    PROGRAMS[arguments.what](arguments.seeds, arguments.reference)


def peak(seeds: int, reference: bool) -> None:
    """GFLOP/s of one large product by each library, and of whole assignments."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    best = 0.0
    for name, product in (
        ("torch.mm (MKL)", lambda: torch.mm(a, b.T)),
        ("oneDNN through torch", lambda: torch.nn.functional.linear(a.to_mkldnn(), b.to_mkldnn())),
        ("numpy (OpenBLAS)", lambda: a.numpy() @ b.numpy().T),
    ):
        rate = 2 * 4096**3 / 1e9 / median_seconds(product, 7)
        best = max(best, rate)
        print(f"{name:42} {rate:7.1f} GFLOP/s a CPU second")
    for n, k, d in ((40_000, 5_000, 256), (40_000, 1_000, 64), (20_000, 5_000, 768)):
        x, c = torch.randn(n, d), torch.randn(k, d)
        rows = prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None).hold()
        work = 2 * n * k * d / 1e9
        ours = work / median_seconds(lambda rows=rows, c=c: nearest(rows, c), 5)
        theirs = work / median_seconds(lambda x=x, c=c: faiss.knn(x.numpy(), c.numpy(), 1), 5)
        print(
            f"assignment {n} x {d} to {k:5d}: ours {ours:6.1f} ({ours / best:4.0%} of peak), "
            f"faiss {theirs:6.1f} ({theirs / best:4.0%})"
        )


def flat(seeds: int, reference: bool) -> None:
    """One k-means of the mixture, from each library."""
    for n, k in ((20_000, 1_000), (50_000, 2_500)):
        x, _ = mixture(n, 0)
        peers: dict[str, Callable[[int], float]] = {
            "ours": lambda seed, k=k, x=x: kmeans(x, k, seed=seed).inertia,
            "faiss, random rows, 50 iterations": lambda seed, k=k, x=x: faiss_inertia(x, k, seed),
        }
        if reference:
            peers["scikit-learn, greedy, 50 iterations"] = lambda seed, k=k, x=x: (
                KMeans(k, n_init=1, max_iter=50, random_state=seed).fit(x).inertia_
            )
            peers["the reference's algorithm"] = lambda seed, k=k, x=x: reference_kmeans(x, k, seed)[2]
        print(f"n = {n}, d = 256, k = {k}, medians of {seeds} seeds")
        report(peers, seeds)


def mixture_tree(seed: int, x: np.ndarray) -> ClusterTree:
    return hierarchical_kmeans(x, [Level(2_500, 10, 10), Level(500, 10, 3)], seed=seed)


def mixture(
    n: int, seed: int, n_components: int = 2_000, d: int = 256, noise: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of a long-tailed mixture: components of weight 1/rank around 50 far centres.

    Components are 0.6 from their far centre and spread by 0.2 in 16 directions of their own.

    Args:
        noise: standard deviation in every dimension. At 0.25 components overlap; `SMALL_NOISE`, a length of
            0.25 in all, leaves them apart.
    """
    rng = np.random.default_rng(seed)
    far = rng.normal(size=(50, d))
    step = rng.normal(size=(n_components, d))
    centre = far[rng.integers(0, 50, n_components)] + 0.6 * step / np.linalg.norm(step, axis=1, keepdims=True)
    weight = 1 / np.arange(1, n_components + 1)
    label = rng.choice(n_components, n, p=weight / weight.sum())
    x = np.empty((n, d), np.float32)
    for c in np.unique(label):
        inside = label == c
        within = rng.normal(size=(inside.sum(), 16)) * 0.2 @ (rng.normal(size=(16, d)) / math.sqrt(d))
        x[inside] = centre[c] + within + rng.normal(size=(inside.sum(), d)) * noise
    return x, label


def effective_components(label: np.ndarray, tree: ClusterTree) -> tuple[float, float]:
    """exp(entropy) of the components of 5,000 sampled, and how many are covered: means of five draws."""
    found = []
    for seed in range(5):
        counts = np.bincount(label[hierarchical_sample(tree, 5_000, seed=seed)])
        share = counts[counts > 0] / counts.sum()
        found.append((math.exp(-(share * np.log(share)).sum()), len(share)))
    return tuple(np.mean(found, axis=0))


def run_mixture(seeds: int, reference: bool) -> None:
    for noise in (0.25, SMALL_NOISE):
        x, label = mixture(50_000, 0, noise=noise)
        draw = np.bincount(label[np.random.default_rng(0).choice(len(x), 5_000, replace=False)])
        share = draw[draw > 0] / draw.sum()
        effective = math.exp(-(share * np.log(share)).sum())
        print(f"noise {noise}: random 5,000: {effective:.0f} effective components, {len(share)} covered")
        peers = {"ours": mixture_tree}
        if reference:
            peers["reference"] = lambda seed, x: reference_tree(x, [(2_500, 10, 10), (500, 10, 3)], seed)
        for name, run in peers.items():
            for seed in range(seeds):
                tree, seconds = timed(lambda seed=seed, run=run, x=x: run(seed, x))
                effective, covered = effective_components(label, tree)
                print(
                    f"  {name}, seed {seed}: {effective:.0f} effective, {covered:.0f} covered, "
                    f"{seconds:.1f} CPU s",
                    flush=True,
                )


def tree(seeds: int, reference: bool) -> None:
    """The tree of the method's own size; the reference's cost from its parts."""
    x, label = mixture(100_000, 0)
    levels = [Level(5_000, 10, 10), Level(1_000, 10, 3)]
    for seed in range(seeds):
        found, seconds = timed(lambda seed=seed: hierarchical_kmeans(x, levels, seed=seed))
        effective, covered = effective_components(label, found)
        inertia = float(np.square(found.distance.astype(np.float64)).sum())
        print(
            f"ours, seed {seed}: {seconds:.1f} CPU s, inertia of level 1 {inertia:.6g}, "
            f"{effective:.0f} effective, {covered:.0f} covered",
            flush=True,
        )
    rows = torch.from_numpy(x - x.mean(0))
    sampled = rows[::2]
    cost = 0.0
    for some, k, times in ((rows, 5_000, 1), (sampled, 5_000, 10)):
        cost += times * (reference_seeding_seconds(some, k) + 50 * reference_iteration_seconds(some, k))
    cost += 10 * reference_iteration_seconds(rows, 5_000)
    print(f"the reference's level 1, parts multiplied: {cost:.0f} CPU s")


def large(seeds: int, reference: bool) -> None:
    """One first level of 100,000 clusters."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(20_000, 256)).astype(np.float32)
    x = centre[rng.zipf(1.3, 1_000_000) % 20_000]
    for start in range(0, len(x), 50_000):
        x[start : start + 50_000] += rng.normal(size=(50_000, 256)).astype(np.float32) * 0.5
    began = time.perf_counter()
    result, seconds = timed(lambda: kmeans(x, 100_000, seed=0))
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"1M x 256, k = 100,000: {seconds:.0f} CPU s, {time.perf_counter() - began:.0f} s, "
        f"{result.n_iter} iterations, inertia {result.inertia:.6g}, {result.n_empty} empty, "
        f"{peak_memory:.1f} GiB at most"
    )


class Throttled:
    """A memory map that gives so many bytes per second, as shared storage does."""

    def __init__(self, array: np.ndarray, rate: float) -> None:
        self.array, self.rate = array, rate
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, which: Any) -> np.ndarray:
        began = time.perf_counter()
        rows = np.array(self.array[which])
        time.sleep(max(0.0, rows.nbytes / self.rate - (time.perf_counter() - began)))
        return rows


def streamed(seeds: int, reference: bool) -> None:
    """One assignment of 300,000 x 256 on disk, 293 MiB, with 60 MiB allowed: wall time, medians of 3; and the
    memory that a tree of them takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        x = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float32, (300_000, 256))
        for start in range(0, len(x), 50_000):
            x[start : start + 50_000] = np.random.default_rng(start).normal(size=(50_000, 256))
        x.flush()
        ready = Centroids(torch.from_numpy(np.array(x[:512])))
        for name, source in (
            ("local disk, in the page cache", x),
            ("400 MB/s", Throttled(x, 400e6)),
            ("100 MB/s", Throttled(x, 100e6)),
        ):
            rows = prepare(
                source, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=60 << 20
            )
            seconds = {
                "reading": wall(
                    lambda rows=rows: [rows.block(*piece) is None for piece in blocks(len(rows))]
                ),
                "one after the other": wall(
                    lambda rows=rows: [ready.nearest(rows.block(*piece)) for piece in blocks(len(rows))]
                ),
                "read ahead": wall(lambda rows=rows: nearest(rows, ready.centroids)),
            }
            print(f"{name}: " + ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items()), flush=True)
        for allowed, k in ((60, 300), (240, 2_000)):
            _, more = memory_added(
                lambda k=k, allowed=allowed: hierarchical_kmeans(
                    x, [Level(k, 1, 10)], n_iter=4, max_memory=allowed << 20
                ),
                every=0.005,
            )
            print(f"k = {k}, one resampling, {allowed} MiB allowed: {more / 2**20:.0f} MiB of memory added")


def wall(run: Callable[[], Any]) -> float:
    """Median seconds of three runs, by the clock."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return float(np.median(found))


def faiss_inertia(x: np.ndarray, k: int, seed: int) -> float:
    """faiss's k-means, kept from training on a subsample; the inertia of its centroids."""
    model = faiss.Kmeans(x.shape[1], k, niter=50, seed=seed, max_points_per_centroid=10**9)
    model.train(x)
    return float(model.index.search(x, 1)[0].astype(np.float64).sum())


def report(peers: dict[str, Callable[[int], float]], seeds: int) -> None:
    """CPU seconds and inertia of each peer, medians, and both as ratios to the first."""
    base: tuple[float, float] | None = None
    for name, run in peers.items():
        runs = [timed(lambda seed=seed, run=run: run(seed)) for seed in range(seeds)]
        inertia, seconds = (float(np.median(column)) for column in zip(*runs, strict=True))
        base = base or (inertia, seconds)
        print(
            f"  {name:38} {seconds:8.1f} CPU s ({seconds / base[1]:6.2f} x)   inertia {inertia:12.1f} "
            f"({inertia / base[0]:.4f} x)",
            flush=True,
        )


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    result = run()
    return result, time.process_time() - began


def median_seconds(run: Callable[[], Any], times: int) -> float:
    run()
    return float(np.median([timed(run)[1] for _ in range(times)]))


PROGRAMS: dict[str, Callable[[int, bool], None]] = {
    "peak": peak, "flat": flat, "mixture": run_mixture, "tree": tree, "large": large, "streamed": streamed,
    "gpu": lambda seeds, reference: gpu(),
}  # fmt: skip

if __name__ == "__main__":
    main()
