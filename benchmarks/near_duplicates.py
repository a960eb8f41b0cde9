"""Near-duplicates by cells against an exact search of all pairs: CPU seconds, and the share of links found.

    python -m benchmarks.near_duplicates [--samples 100000] [--dimension 128] [--threads 2]
    python -m benchmarks.near_duplicates --memory --samples 1000000 --dimension 256

The pool is a mixture of 1,000 components, a tenth of it noisy copies of other rows. The peer is faiss's exact
search (`IndexFlatIP`, 17 neighbours, which is what the cells are searched with too). `--memory` keeps the
rows in a file as float16, as embeddings are kept, and prints what the search adds to the process (Linux).
"""

import argparse
import tempfile
import time

import faiss
import numpy as np

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from curated_data.programs import described_parser
from curated_data.selection.near_duplicates import near_duplicates


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cell-size", type=int, default=1_024, help="with --memory (default: %(default)s)")
    parsed = parser.parse_args()
    print_machine()
    faiss.omp_set_num_threads(parsed.threads)
    if parsed.memory:
        memory(parsed)
        return
    x = pool(parsed.samples, parsed.dimension)
    print(f"{x.shape[0]:,} x {x.shape[1]}, threshold {parsed.threshold}, faiss {faiss.__version__}")

    start = time.process_time()
    exact = exact_links(x, parsed.threshold)
    peer = time.process_time() - start
    print(f"\n{'':32}{'CPU s':>9}{'x peer':>9}{'links':>10}{'of the exact':>14}{'kept':>10}")
    print(f"{'all pairs, faiss':32}{peer:9.1f}{1:9.1f}{len(exact):10,}{1:14.2%}")
    for cell_size in (16_384, 4_096, 1_024):
        for n_probes in (4, 16):
            start = time.process_time()
            found = near_duplicates(x, threshold=parsed.threshold, cell_size=cell_size, n_probes=n_probes)
            seconds = time.process_time() - start
            share = np.isin(exact, found.pairs @ [len(x), 1]).mean()
            name = f"cells of {cell_size:,}, {n_probes} probes"
            print(
                f"{name:32}{seconds:9.1f}{peer / seconds:9.1f}{len(found.pairs):10,}{share:14.2%}"
                f"{int(found.keep.sum()):10,}"
            )


def memory(parsed: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = np.lib.format.open_memmap(
            f"{folder}/x.npy", "w+", np.float16, (parsed.samples, parsed.dimension)
        )
        for start in range(0, parsed.samples, 100_000):
            part = pool(min(100_000, parsed.samples - start), parsed.dimension, seed=start)
            rows[start : start + len(part)] = part
        del rows, part
        rows = np.load(f"{folder}/x.npy", mmap_mode="r")
        near_duplicates(rows[:2_000], threshold=parsed.threshold)
        start = time.process_time()
        found, added = memory_added(
            lambda: near_duplicates(rows, threshold=parsed.threshold, cell_size=parsed.cell_size), every=0.02
        )
        seconds, mb = time.process_time() - start, rows.nbytes / 1e6
        print(f"{parsed.samples:,} x {parsed.dimension}, cells of {parsed.cell_size:,}")
        print(f"{len(found.pairs):,} links, {seconds:.0f} CPU s")
        print(f"{added / 1e6:,.0f} MB beside the mapped rows, which are {mb:,.0f} MB")


def pool(n: int, dimension: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1_000, dimension))
    x = centres[rng.integers(1_000, size=n)] + 0.8 * rng.normal(size=(n, dimension))
    copies = rng.choice(n, n // 10, replace=False)
    originals = rng.choice(np.setdiff1d(np.arange(n), copies), len(copies))
    x[copies] = x[originals] + 0.3 * rng.normal(size=(len(copies), dimension))
    return x.astype(np.float32)


def exact_links(x: np.ndarray, threshold: float) -> np.ndarray:
    """Links as one number each, smaller id times n plus the larger."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(unit)
    similarity, nearest = index.search(unit, 17)
    row, column = np.nonzero((similarity >= threshold) & (nearest != np.arange(len(x))[:, None]))
    pairs = np.sort(np.stack([row, nearest[row, column]], axis=1), axis=1)
    return np.unique(pairs @ [len(x), 1])


if __name__ == "__main__":
    main()
