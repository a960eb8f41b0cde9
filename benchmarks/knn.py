"""Exact k-NN beside faiss and the product alone, and the memory that a bank on disk takes.

    python benchmarks/knn.py [--queries 2000 --bank 131072 --dimension 1024]

One thread. GFLOP/s of a CPU second, medians of runs that took turns; the work counted is that of the product,
2 queries x bank x dimension, whatever else a search does. Then a bank in a float16 file, searched as a memory
map by a process of its own: how much memory that process adds beyond the file's pages.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.nearest import top_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--bank", type=int, default=131_072)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk-bank", type=int, default=400_000, help="rows of the bank on disk; 0: skip")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    queries, bank = (
        F.normalize(torch.randn(n, arguments.dimension, generator=generator), dim=1)
        for n in (arguments.queries, arguments.bank)
    )
    q, b = queries.numpy(), bank.numpy()
    packed = bank.to_mkldnn()
    step = 500  # the products alone in parts, so that no result is larger than the searches' own
    runs: dict[str, Callable[[], object]] = {
        "product, torch (MKL)": lambda: [part @ bank.T for part in queries.split(step)],
        "product, oneDNN": lambda: [F.linear(part.to_mkldnn(), packed) for part in queries.split(step)],
        "product, numpy (OpenBLAS)": lambda: [q[i : i + step] @ b.T for i in range(0, len(q), step)],
    }
    for k in arguments.k:
        runs[f"ours, k = {k}"] = lambda k=k: top_rows(queries, bank, k)
        runs[f"faiss.knn, k = {k}"] = lambda k=k: faiss.knn(q, b, k, metric=faiss.METRIC_INNER_PRODUCT)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    work = 2 * arguments.queries * arguments.bank * arguments.dimension / 1e9
    rates = {name: work / statistics.median(times) for name, times in seconds.items()}
    peak = max(rate for name, rate in rates.items() if name.startswith("product"))
    print("| | GFLOP/s | share of the best product |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / peak:.0%} |")
    for k in arguments.k:
        ours, theirs = top_rows(queries, bank, k)[1].numpy(), runs[f"faiss.knn, k = {k}"]()[1]
        print(f"k = {k}: the same rows for {(np.sort(ours) == np.sort(theirs)).all(1).mean():.2%} of queries")
    if arguments.disk_bank:
        on_disk(arguments.disk_bank, arguments.dimension)


def on_disk(n: int, dimension: int) -> None:
    """Search a bank in a file, and print the anonymous memory that this added."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.npy"
        bank = np.lib.format.open_memmap(path, "w+", np.float16, (n, dimension))
        rng = np.random.default_rng(0)
        for start in range(0, n, 10_000):
            part = bank[start : start + 10_000]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        bank.flush()
        del bank
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_search, args=(path, send))
        process.start()
        added, seconds = receive.recv()
        process.join()
    size = 2 * n * dimension / 2**20
    print(f"bank of {n:,} x {dimension} on disk ({size:,.0f} MiB as float16, {2 * size:,.0f} as float32): "
          f"{added:,.0f} MiB of memory added, 256 queries in {seconds:.1f} CPU s")  # fmt: skip


def _search(path: Path, send: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    bank = np.load(path, mmap_mode="r")
    labels = np.arange(len(bank)) % 10
    knn(bank[:5000], labels[:5000], bank[:256], labels[:256], k=20)  # what libraries allocate once
    before, peak, ended = _anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    knn(bank, labels, bank[:256], labels[:256], k=20)
    seconds = time.process_time() - start
    ended.set()
    watcher.join()
    send.send((peak - before, seconds))


def _anonymous() -> float:
    """This process's memory in MiB but for the pages of files, which the system takes back at will."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this part needs Linux")


if __name__ == "__main__":
    main()
