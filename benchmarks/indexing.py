"""How fast pools are indexed, beside a pass of Python's `tarfile` and of webdataset over the same shards.

    python benchmarks/indexing.py                    # three kinds of shards, one core: a minute
    python benchmarks/indexing.py --samples 1000000  # a whole pool, all cores, as a user has it

Prints samples per second of wall and of CPU time, medians of several rounds in which the readers take turns,
so that what else the machine does falls on all alike. Files are read once before: this measures the work, not
the disk. On a machine with two loaded cores: 155,000 to 190,000 samples per CPU second (76,000 with PAX
headers), 8 to 9 times webdataset's pass; 1e6 samples in 100 shards in 23 s.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from curated_data.pool import ShardPool, index_shard


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=0, help="index a pool of that many small samples instead"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the shards are written (1.5 KB a sample)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.samples:
            index_pool(Path(folder), arguments.samples)
        else:
            compare(Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
