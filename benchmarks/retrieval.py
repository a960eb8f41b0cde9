"""Retrieval of the nearest samples of every seed against faiss, flat and inverted: CPU seconds and recall.

    python -m benchmarks.retrieval [--samples 100000] [--seeds 5000] [--dimension 256] [--threads 2] [--flat]

The pool is a mixture of 1,000 components, the seeds are drawn from 50 of them. Recall is the share of the
pairs of seed and sample that float64 finds, for the first 200 seeds. The rows are kept in a file as float16,
as embeddings are kept; faiss needs all of them in memory as float32. The last column is the memory that the
search adds to the process (Linux), with that copy.
"""

import tempfile
import time

import faiss
import numpy as np

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from curated_data import retrieve
from curated_data.programs import described_parser

CHECKED = 200


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=5_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--nearest", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of faiss; ours are those of OMP_NUM_THREADS")
    parser.add_argument("--flat", action="store_true", help="without the inverted files")
    parsed = parser.parse_args()
    print_machine()
    faiss.omp_set_num_threads(parsed.threads)
    n = parsed.nearest
    with tempfile.TemporaryDirectory() as folder:
        rows, seeds = data(folder, parsed.samples, parsed.seeds, parsed.dimension)
        exact = nearest_in_float64(rows, seeds[:CHECKED], n)
        print(
            f"{parsed.samples:,} x {parsed.dimension}, {parsed.seeds:,} seeds, {n} each; "
            f"faiss {faiss.__version__}"
        )
        print(f"\n{'':28}{'CPU s':>9}{'wall s':>9}{'recall':>10}{'samples':>10}{'MB':>9}")
        retrieve(rows[:2_000], {"all": seeds[:CHECKED]}, n)
        ways = {
            "retrieve": lambda: retrieve(rows, {"all": seeds}, n).ids,
            "faiss, flat": lambda: flat(rows, seeds, n),
        }
        n_lists = int(4 * np.sqrt(parsed.samples))
        for n_probes in () if parsed.flat else (8, 64):
            ways[f"faiss, IVF{n_lists}, {n_probes} probes"] = lambda probes=n_probes: inverted(
                rows, seeds, n, n_lists, probes
            )
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            found, added = memory_added(way, every=0.02)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if found.ndim == 2:
                recall = np.mean([np.isin(a, b).mean() for a, b in zip(exact, found, strict=False)])
            else:  # the union over the seeds, of which those checked are some
                recall = np.isin(exact, found).mean()
            print(
                f"{name:28}{cpu:9.1f}{wall:9.1f}{recall:10.2%}{len(np.unique(found)):10,}{added / 1e6:9,.0f}"
            )


def data(folder: str, n: int, n_seeds: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """The pool, a memory map of float16, and the seeds."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1_000, dimension))

    def draw(count: int, n_components: int) -> np.ndarray:
        which = rng.integers(n_components, size=count)
        return centres[which] + 0.8 * rng.normal(size=(count, dimension))

    rows = np.lib.format.open_memmap(f"{folder}/x.npy", "w+", np.float16, (n, dimension))
    for start in range(0, n, 100_000):
        rows[start : start + 100_000] = draw(min(100_000, n - start), 1_000)
    rows.flush()
    return np.load(f"{folder}/x.npy", mmap_mode="r"), draw(n_seeds, 50).astype(np.float32)


def nearest_in_float64(rows: np.ndarray, seeds: np.ndarray, n: int) -> np.ndarray:
    """(m, n) ids, from all products in float64."""
    ids, best = np.empty((len(seeds), 0), np.int64), np.empty((len(seeds), 0))
    wide = normed(seeds, np.float64)
    for start in range(0, len(rows), 10_000):
        scores = wide @ normed(rows[start : start + 10_000], np.float64).T
        here = np.arange(start, start + scores.shape[1])
        best = np.concatenate([best, scores], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(here, scores.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :n]
        best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    return ids


def flat(rows: np.ndarray, seeds: np.ndarray, n: int) -> np.ndarray:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(normed(rows))
    return index.search(normed(seeds), n)[1]


def inverted(rows: np.ndarray, seeds: np.ndarray, n: int, n_lists: int, n_probes: int) -> np.ndarray:
    """With the training of the lists and the adding, which a pool needs once."""
    unit = normed(rows)
    index = faiss.index_factory(rows.shape[1], f"IVF{n_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(unit)
    index.add(unit)
    index.nprobe = n_probes
    return index.search(normed(seeds), n)[1]


def normed(rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    wide = np.asarray(rows, dtype)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
