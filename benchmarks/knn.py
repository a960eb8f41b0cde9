"""Exact k-NN: beside faiss and the product alone; of a bank on disk; of a bank in two ranks' shares.

    python -m benchmarks.knn speed [--queries 1024 --banks 32768 131072 --dimension 1024 --k 20 200]
    python -m benchmarks.knn disk --rows 10000000 [--queries 256 --folder DIR]
    python -m benchmarks.knn ranks [--rows 200000 --queries 512]

speed: one thread, GFLOP/s of a CPU second, medians of runs that took turns; the work counted is that of the
product, 2 queries x bank x dimension, whatever else a search does.

disk: writes a bank as a float16 file (20 GB at 10,000,000 x 1024; removed afterwards) and searches it as a
memory map in a process of its own: seconds, the memory that this adds to what a search of 5,000 rows took,
beyond the file's pages, and whether the neighbours that were planted for every query are those that are
found.

ranks: the same bank searched by one process and by two gloo ranks, each with its share of the file.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from curated_data.programs import described_parser
from lightning_modules.evaluation.knn import KNNResult, knn
from lightning_modules.evaluation.nearest import top_rows

PLANTED = 20  # neighbours of each query that are known
N_CLASSES = 100


def main() -> None:
    parser = described_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_speed, of_disk, of_ranks = (commands.add_parser(name) for name in ("speed", "disk", "ranks"))
    for command, rows in ((of_disk, 10_000_000), (of_ranks, 200_000)):
        command.add_argument("--rows", type=int, default=rows, help="of the bank (default: %(default)s)")
        command.add_argument("--folder", help="for the file (default: the system's for such)")
    for command, queries in ((of_speed, 1024), (of_disk, 256), (of_ranks, 512)):
        command.add_argument("--queries", type=int, default=queries, help="(default: %(default)s)")
        command.add_argument("--dimension", type=int, default=1024, help="(default: %(default)s)")
    of_speed.add_argument("--banks", type=int, nargs="+", default=[32_768, 131_072], help="rows")
    of_speed.add_argument("--k", type=int, nargs="+", default=[20, 200])
    of_speed.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if arguments.command == "speed":
        for rows in arguments.banks:
            speed(rows, arguments.queries, arguments.dimension, arguments.k, arguments.repeats)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        size = 2 * arguments.rows * arguments.dimension
        if shutil.disk_usage(folder).free < 1.1 * size:
            parser.error(f"{folder} has no room for a file of {size / 1e9:.1f} GB: give --folder")
        start = time.time()
        write_bank(Path(folder), arguments.rows, arguments.queries, arguments.dimension)
        print(f"bank of {arguments.rows:,} x {arguments.dimension}, {size / 1e9:.1f} GB as float16, "
              f"written in {time.time() - start:.0f} s", flush=True)  # fmt: skip
        (on_disk if arguments.command == "disk" else in_shares)(Path(folder))


def speed(rows: int, n_queries: int, dimension: int, ks: list[int], repeats: int) -> None:
    """Print a table of rates, and whether both find the same rows."""
    generator = torch.Generator().manual_seed(0)
    queries, bank = (
        F.normalize(torch.randn(n, dimension, generator=generator), dim=1) for n in (n_queries, rows)
    )
    q, b = queries.numpy(), bank.numpy()
    packed = bank.to_mkldnn()
    step = 512  # the products alone in parts, so that no result is larger than the searches' own
    runs: dict[str, Callable[[], object]] = {
        "product, torch (MKL)": lambda: [part @ bank.T for part in queries.split(step)],
        "product, oneDNN": lambda: [F.linear(part.to_mkldnn(), packed) for part in queries.split(step)],
        "product, numpy (OpenBLAS)": lambda: [q[i : i + step] @ b.T for i in range(0, len(q), step)],
    }
    for k in ks:
        runs[f"ours, k = {k}"] = lambda k=k: top_rows(queries, bank, k)
        runs[f"faiss.knn, k = {k}"] = lambda k=k: faiss.knn(q, b, k, metric=faiss.METRIC_INNER_PRODUCT)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    work = 2 * n_queries * rows * dimension / 1e9
    rates = {name: work / statistics.median(times) for name, times in seconds.items()}
    peak = max(rate for name, rate in rates.items() if name.startswith("product"))
    print(f"{n_queries:,} queries, bank of {rows:,} x {dimension}\n")
    print("| | GFLOP/s | share of the best product |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / peak:.0%} |")
    print()
    for k in ks:
        ratios = [b / a for a, b in zip(seconds[f"ours, k = {k}"], seconds[f"faiss.knn, k = {k}"])]
        ours, theirs = top_rows(queries, bank, k)[1].numpy(), runs[f"faiss.knn, k = {k}"]()[1]
        same = (np.sort(ours) == np.sort(theirs)).all(1).mean()
        print(f"k = {k}: {statistics.median(ratios):.2f} times as fast as faiss in the same turn "
              f"({min(ratios):.2f} to {max(ratios):.2f}); the same rows for {same:.2%} of all")  # fmt: skip
    print(flush=True)


def write_bank(folder: Path, n: int, n_queries: int, dimension: int) -> None:
    """`bank.npy`: random rows of which PLANTED are near each query; `queries.npy`, and `planted.npy`, where.

    Random rows are one block with other signs for each of its repetitions: quick, and no two are near.
    """
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n_queries, dimension), dtype=np.float32)
    planted = rng.choice(n, (n_queries, PLANTED), replace=False)
    owner = {int(row): i for i, rows in enumerate(planted) for row in rows}
    order = np.array(sorted(owner))
    block = rng.standard_normal((min(n, 16_384), dimension), dtype=np.float32).astype(np.float16)
    with open(folder / "bank.npy", "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (n, dimension)}
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, n, len(block)):
            signs = rng.choice(np.array([-1, 1], np.float16), dimension)
            part = block[: n - start] * signs
            for row in order[np.searchsorted(order, start) : np.searchsorted(order, start + len(part))]:
                noise = rng.standard_normal(dimension, dtype=np.float32)
                part[row - start] = 0.5 * (queries[owner[int(row)]] + 0.7 * noise)
            file.write(part.tobytes())
            if start // len(block) % 32 == 31:  # other programs' pages are worth more than these
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "planted.npy", planted)


def on_disk(folder: Path) -> None:
    """Search the bank in a process of its own, and print what that took."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_search, args=(folder, send))
    process.start()
    send.close()
    added, cpu, wall, right = receive.recv()
    process.join()
    print(f"searched in {cpu:.0f} CPU s, {wall:.0f} s; {added:,.0f} MiB more memory than for 5,000 rows; the "
          f"planted neighbours are those found for {right:.2%} of the queries")  # fmt: skip


def _search(folder: Path, send: Connection) -> None:
    torch.set_num_threads(1)
    bank, queries = np.load(folder / "bank.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    unit = F.normalize(torch.from_numpy(queries), dim=1)
    top_rows(unit, bank[:5000], PLANTED)  # what libraries allocate once
    wall, cpu = time.time(), time.process_time()
    rows, added = memory_added(lambda: top_rows(unit, bank, PLANTED)[1].numpy(), every=0.02)
    wall, cpu = time.time() - wall, time.process_time() - cpu
    planted = np.load(folder / "planted.npy")
    send.send((added / 2**20, cpu, wall, (np.sort(rows) == np.sort(planted)).all(1).mean()))


def in_shares(folder: Path) -> None:
    """k-NN accuracy by one process and by two, each with half of the bank and of the queries."""
    alone = _of_share(folder, 0, 1)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        receive, send = context.Pipe(duplex=False)
        processes = [
            context.Process(target=_rank, args=(folder, rank, f"file://{meeting}/store", send))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = [receive.recv() for _ in processes]
        for process in processes:
            process.join()
    for result in found:
        same = result.accuracy == alone.accuracy and result.per_class == alone.per_class
        print(f"accuracy {result.accuracy} of {result.n_train:,} rows; {'equal' if same else 'NOT equal'} to "
              "one process, in every class")  # fmt: skip


def _rank(folder: Path, rank: int, meeting: str, send: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    result = _of_share(folder, rank, 2)
    torch.distributed.destroy_process_group()
    send.send(result)


def _of_share(folder: Path, rank: int, world: int) -> KNNResult:
    bank, queries = np.load(folder / "bank.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    labels = np.random.default_rng(1).integers(0, N_CLASSES, len(bank))
    truth = labels[np.load(folder / "planted.npy")[:, 0]]
    mine = slice(len(bank) * rank // world, len(bank) * (rank + 1) // world)
    asked = slice(len(queries) * rank // world, len(queries) * (rank + 1) // world)
    return knn(bank[mine], labels[mine], queries[asked], truth[asked], k=(1, 20, 200))


if __name__ == "__main__":
    main()
