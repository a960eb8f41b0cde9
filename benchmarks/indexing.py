"""How fast pools are indexed, beside a pass of Python's `tarfile` and of webdataset over the same shards.

    python -m benchmarks.indexing                    # three kinds of shards, one core: a minute
    python -m benchmarks.indexing --samples 1000000  # a whole pool, all cores, as a user has it
    python -m benchmarks.indexing --shards 100000    # opening an indexed pool of so many shards

Prints samples per second of wall and of CPU time, medians of several rounds in which the readers take turns,
so that what else the machine does falls on all alike. Files are read once before: this measures the work, not
the disk. On a machine with two loaded cores: 155,000 to 190,000 samples per CPU second (76,000 with PAX
headers), 8 to 9 times webdataset's pass; 1e6 samples in 100 shards in 23 s.
"""

import argparse
import pickle
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from benchmarks.machine import print_machine
from curated_data import CuratedDataModule
from curated_data.cache.artifacts import fingerprint, open_cache, write_manifest
from curated_data.cache.layout import POOL
from curated_data.cache.publishing import atomic_path
from curated_data.pool import PoolIndex, ShardPool, index_shard
from curated_data.pool.build import pool_fingerprint
from curated_data.pool.index import ARRAYS
from curated_data.pool.known import Facts


def write_shard(path: Path, n_samples: int, image_bytes: int, *, float_times: bool = False) -> None:
    """A shard of samples with members jpg and cls; `float_times` adds PAX headers, as some writers do."""
    image = np.random.default_rng(0).bytes(image_bytes)
    with open(path, "wb") as file:
        for i in range(n_samples):
            for extension, content in (("jpg", image), ("cls", b"7")):
                info = tarfile.TarInfo(f"{path.stem}/{i:08d}.{extension}")
                info.size = len(content)
                info.mtime = 1e9 + 0.5 if float_times else 0
                file.write(info.tobuf(tarfile.PAX_FORMAT))
                file.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
        file.write(bytes(10_240))


def by_index(path: Path) -> int:
    return len(index_shard(path))


def by_tarfile(path: Path) -> int:
    """Headers alone too, by seeking; no grouping."""
    with tarfile.open(path, "r:") as archive:
        return sum(1 for member in archive if member.name.endswith(".jpg"))


def by_webdataset(path: Path) -> int:
    """The whole shard, as webdataset reads it."""
    with open(path, "rb") as stream:
        return sum(1 for _ in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def rates(
    readers: dict[str, Callable[[Path], int]], path: Path, n_samples: int, rounds: int
) -> dict[str, list[float]]:
    """Median samples per second of wall and of CPU time, per reader."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, reader in readers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found = reader(path)
            if found != n_samples:
                raise RuntimeError(f"{name} found {found} of {n_samples} samples")
            if turn:  # the first round brings the files to memory
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: [n_samples / statistics.median(column) for column in zip(*rows)] for name, rows in taken.items()
    }


def compare(folder: Path, rounds: int) -> None:
    kinds = {
        "1 KB images": {"n_samples": 20_000, "image_bytes": 1_000},
        "1 KB images, PAX headers": {"n_samples": 10_000, "image_bytes": 1_000, "float_times": True},
        "25 KB images": {"n_samples": 5_000, "image_bytes": 25_000},
    }
    readers = {"index_shard": by_index, "tarfile, headers": by_tarfile, "webdataset, whole": by_webdataset}
    print(f"{'':26}{'reader':20}{'samples/s':>12}{'per CPU s':>12}{'ratio':>8}")
    for kind, options in kinds.items():
        path = folder / "shard.tar"
        write_shard(path, **options)
        found = rates(readers, path, options["n_samples"], rounds)
        for name, (wall, cpu) in found.items():
            ratio = found["index_shard"][1] / cpu
            print(f"{kind:26}{name:20}{wall:12,.0f}{cpu:12,.0f}{ratio:8.1f}")


def index_pool(folder: Path, n_samples: int) -> None:
    """A pool of small samples in shards of 10,000, indexed as a user does it, then found in the cache."""
    n_shards = -(-n_samples // 10_000)
    for number in range(n_shards):
        write_shard(folder / f"pool-{number:06d}.tar", min(10_000, n_samples - number * 10_000), 500)
    pattern, cache = str(folder / "pool-*.tar"), folder / "cache"
    for what in ("indexed", "found in the cache"):
        started = time.perf_counter()
        n_found = len(ShardPool(pattern, cache_dir=cache))
        seconds = time.perf_counter() - started
        print(f"{n_found:,} samples in {n_shards} shards {what} in {seconds:.2f} s")


def open_pool(folder: Path, n_shards: int, per_shard: int = 100) -> None:
    """An indexed pool of many shards, opened as a training run does it, up to its first batches.

    The shards are holes of the right size, and their index is written as it would be for members that lie in
    rows, so that the pool takes no room; what is read of it are zeros.
    """
    for number in range(n_shards):
        with open(folder / f"pool-{number:06d}.tar", "wb") as file:
            file.truncate(per_shard * 25_600)
    pattern, cache = str(folder / f"pool-{{000000..{n_shards - 1:06d}}}.tar"), folder / "cache"
    n = n_shards * per_shard
    rows = np.arange(n + 1)
    index = PoolIndex(
        ["bin"],
        rows * 8,
        np.full(8 * n, ord("k"), np.uint8),
        rows,
        np.zeros(n, np.int32),
        np.tile(np.arange(per_shard) * 25_600 + 512, n_shards),
        np.full(n, 23_000),
        shard_start=np.arange(n_shards + 1) * per_shard,
    )
    pool = ShardPool(pattern, cache_dir=cache)
    root = open_cache(cache)
    layouts = [fingerprint(shard=number) for number in range(n_shards)]
    for shard, layout in zip(pool.shards, layouts, strict=True):
        Facts(root, "layouts").add(shard.fingerprint, layout)
    with atomic_path(root / POOL / pool_fingerprint(layouts)) as temporary:
        temporary.mkdir()
        for name in (*ARRAYS, "shard_start"):
            np.save(temporary / f"{name}.npy", getattr(index, name))
        content = {"extensions": ["bin"], "n_samples": n, "n_duplicate_keys": 0, "duplicate_example": None}
        write_manifest(temporary, POOL, content | {"shards": pool.urls, "n_bytes": n * 23_000})

    def timed(what: str, step: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        print(f"  {what:28}{time.perf_counter() - wall:8.3f} s{time.process_time() - cpu:8.3f} s of CPU time")
        return result

    print(f"{n:,} samples in {n_shards:,} shards, indexed")
    pool = timed("pattern to names", lambda: ShardPool(pattern, cache_dir=cache))
    timed("sizes and times of shards", lambda: pool.shards)
    timed("their fingerprints", lambda: [shard.fingerprint for shard in pool.shards])
    timed("the index", pool.index)
    print(f"  {'pickled for a worker':28}{len(pickle.dumps(pool)) / 1e6:8.1f} MB")
    for shuffle in ("full", "block"):
        data = CuratedDataModule(
            pool,
            shuffle=shuffle,
            views=lambda content: content,
            decoding={"decoders": {"bin": lambda content: torch.zeros(1)}},
            loader={"num_workers": 0},
        )
        data.pool.image_extensions = ("bin",)
        batches = iter(data.train_dataloader())
        timed(f"first batch of 64, {shuffle}", lambda batches=batches: next(batches))
        timed(f"20 more, {shuffle}", lambda batches=batches: [next(batches) for _ in range(20)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=0, help="index a pool of that many small samples instead"
    )
    parser.add_argument("--shards", type=int, default=0, help="open a pool of that many shards instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the shards are written (1.5 KB a sample)"
    )
    arguments = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.shards:
            open_pool(Path(folder), arguments.shards)
        elif arguments.samples:
            index_pool(Path(folder), arguments.samples)
        else:
            compare(Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
