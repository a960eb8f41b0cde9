"""What a filter costs over a pool of many samples: seconds, and memory at its height.

    python -m benchmarks.filters [--samples 1000000 10000000] [--folder DIR]

Shards are holes of the right size with planted indexes, as in `benchmarks.scale`. Three conditions, one of
which meets missing values, are evaluated over columns of parquet: in a file beside each shard, as img2dataset
writes them, or in one file with the keys of all samples in another order. Each is a process of its own, which
opens the pool by its index in the cache. "Added" is the process's own memory, beside mapped files.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from benchmarks.scale import PER_SHARD, STRIDE, plant_index
from curated_data import ShardPool
from curated_data.cache.artifacts import open_cache
from curated_data.config import CurationConfig
from curated_data.stages.filtering import filter_pool

WHERE = "similarity > 0.28 AND least(width, height) >= 200 AND NOT nsfw"
PLACES = {"beside": "parquet beside each shard", "by key": "one parquet, in another order"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="for about 100 bytes per sample")
    parser.add_argument("--step", choices=PLACES, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    logging.disable(logging.WARNING)
    if parsed.step is not None:
        step(parsed.folder, parsed.samples[0], parsed.step)
        return
    print_machine()
    print(f"{WHERE}\n{'':42}{'s':>8}{'CPU s':>8}{'added MiB':>11}{'kept':>12}", flush=True)
    for n in parsed.samples:
        with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
            prepare(Path(folder), n)
            for name in PLACES:
                command = [sys.executable, "-m", "benchmarks.filters", "--folder", folder, "--step", name]
                subprocess.run([*command, "--samples", str(n)], check=True)


def prepare(folder: Path, n: int) -> None:
    """Write a pool's index, and the scores of its samples in both places."""
    rng = np.random.default_rng(0)
    tables = []
    for number in range(n // PER_SHARD):
        path = folder / f"pool-{number:06d}.tar"
        with open(path, "wb") as file:
            file.truncate(PER_SHARD * STRIDE)
        similarity = rng.random(PER_SHARD).astype(np.float32)
        sides = rng.integers(64, 2_000, (2, PER_SHARD))
        table = {
            "key": [f"{path.stem}/{place:05d}" for place in range(PER_SHARD)],
            "similarity": pa.array(similarity, mask=rng.random(PER_SHARD) < 0.01),
            "width": sides[0],
            "height": sides[1],
            "nsfw": rng.random(PER_SHARD) < 0.05,
        }
        tables.append(pa.table(table))
        pq.write_table(tables[-1], path.with_suffix(".parquet"))
    whole = pa.concat_tables(tables)
    pq.write_table(whole.take(rng.permutation(len(whole))), folder / "scores.parquet")
    root = open_cache(folder / "cache")
    plant_index(open_pool(folder, n), root)
    open_pool(folder, n).index()


def open_pool(folder: Path, n: int, columns: Path | None = None) -> ShardPool:
    pattern = f"{folder}/pool-{{000000..{n // PER_SHARD - 1:06d}}}.tar"
    return ShardPool(pattern, cache_dir=folder / "cache", image_extensions=("bin",), columns=columns)


def step(folder: Path, n: int, name: str) -> None:
    """Filter, and print what that took."""
    pool = open_pool(folder, n, folder / "scores.parquet" if name == "by key" else None)
    config = CurationConfig(target_size=1_000, where=WHERE)
    began, cpu_began = time.perf_counter(), time.process_time()
    found, added = memory_added(lambda: filter_pool(pool, config))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    assert found is not None, "there is a condition"
    label = f"{n:,}, {PLACES[name]}"
    print(f"{label:42}{seconds:8.1f}{cpu:8.1f}{added / 2**20:11.0f}{found.keep.sum():12,}", flush=True)


if __name__ == "__main__":
    main()
