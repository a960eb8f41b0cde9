"""What the table of ten million samples costs: seconds, and memory at its height.

    python -m benchmarks.table [--samples 10000000] [--folder DIR]

Shards are holes of the right size, with planted indexes and embeddings, as in `benchmarks.scale`; their
captions are zeros, which are read like any. The curation is found in its cache by a process of its own, which
writes the table as `curated-data table` does; another stops before the table, for comparison. "Added" is the
memory that the table needs beyond that; RSS has the pages of mapped files, too, which the system reclaims.
"""

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from benchmarks.scale import DECODERS, PER_SHARD, STRIDE, Planted, plant_embeddings, plant_index
from curated_data import ShardPool, curate
from curated_data.cache.artifacts import open_cache
from curated_data.report.table import CurationTable
from curated_data.stages.curation import Curation

LEVELS = [{"n_clusters": 100}, {"n_clusters": 10}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="for about 150 bytes per sample")
    parser.add_argument("--step", choices=("open", "table"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    logging.disable(logging.WARNING)
    if parsed.step is not None:
        step(parsed.folder, parsed.samples, parsed.step)
        return
    print_machine()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        prepare(Path(folder), parsed.samples)
        print(
            f"{parsed.samples:,} samples{'':20}{'s':>8}{'CPU s':>8}{'added MiB':>11}{'peak RSS MiB':>14}",
            flush=True,
        )
        for name in ("open", "table"):
            command = [sys.executable, "-m", "benchmarks.table", "--folder", folder, "--step", name]
            subprocess.run([*command, "--samples", str(parsed.samples)], check=True)


def prepare(folder: Path, n: int) -> None:
    """Write the pool, and curate it."""
    for number in range(n // PER_SHARD):
        with open(folder / f"pool-{number:06d}.tar", "wb") as file:
            file.truncate(PER_SHARD * STRIDE)
    root = open_cache(folder / "cache")
    pool = open_pool(folder, n)
    plant_index(pool, root)
    plant_embeddings(pool, root, "planted")
    found(folder, pool)


def open_pool(folder: Path, n: int) -> ShardPool:
    pattern = f"{folder}/pool-{{000000..{n // PER_SHARD - 1:06d}}}.tar"
    return ShardPool(pattern, cache_dir=folder / "cache", image_extensions=("bin",))


def found(folder: Path, pool: ShardPool) -> Curation:
    config = {"target_size": len(pool) // 10, "levels": LEVELS, "n_iter": 1, "max_memory_gb": 2.0}
    embedder = Planted("planted")
    return curate(
        pool, config, embedder=embedder, cache_dir=folder / "cache", device="cpu", decoders=DECODERS
    )


def step(folder: Path, n: int, name: str) -> None:
    """Look the curation up and, for "table", write it; prints what that took."""
    pool = open_pool(folder, n)
    path = folder / "curation.parquet"
    began, cpu_began = time.perf_counter(), time.process_time()
    curation = found(folder, pool)
    added = 0
    if name == "table":
        began, cpu_began = time.perf_counter(), time.process_time()
        _, added = memory_added(lambda: CurationTable(curation, pool).write(path))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:28}{seconds:8.1f}{cpu:8.1f}{added / 2**20:11.0f}{peak:14.0f}", flush=True)
    if name == "table":
        table = pq.ParquetFile(path)
        assert table.metadata.num_rows == n
        print(f"{path.stat().st_size / 1e6:.0f} MB of {', '.join(table.schema_arrow.names)}", flush=True)


if __name__ == "__main__":
    main()
