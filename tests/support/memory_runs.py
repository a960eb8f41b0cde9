"""A plan or a curation of a pool of numbers in a process of its own, which prints its bytes at the peak."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from curated_data import CurationConfig, Level, curate
from curated_data.clustering.rows import resident_memory
from curated_data.config import load_config
from curated_data.embedding.existing import EmbeddedPool
from curated_data.levels import choose_levels
from curated_data.plan import peak_memory, plan, planned_stages
from curated_data.stages.cost import Rates


def write_pool(path: Path, n: int) -> None:
    """n samples of eight random numbers."""
    values = np.random.default_rng(0).random((n, 8)).astype(np.float32)
    with tarfile.open(path, "w") as tar:
        for i, value in enumerate(values):
            content = io.BytesIO()
            np.save(content, value)
            info = tarfile.TarInfo(f"{i:07d}.npy")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)


class Numbers:
    """Embeds eight numbers in many dimensions."""

    name = fingerprint = "numbers"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.weight = torch.randn(8, dimension, generator=torch.Generator().manual_seed(0))

    def preprocess(self, sample):
        return torch.as_tensor(sample)

    def __call__(self, batch):
        return torch.sin(batch.float() @ self.weight)


def write_rows(path: Path, n: int, dimension: int, dtype: str) -> None:
    """n rows in clusters, written in blocks."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(n // 300, dimension)).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", dtype, (n, dimension))
    for first in range(0, n, 4096):
        part = out[first : first + 4096]
        part[:] = centres[rng.integers(0, len(centres), len(part))] + rng.normal(size=part.shape)


def of_rows(path: str, cache: str, preset: str, duplicates: bool) -> dict[str, int]:
    """What is promised for a curation of rows, and its peak."""
    base = resident_memory()
    pool = EmbeddedPool(path)
    n, d = len(pool), pool.dimension
    config = CurationConfig(target_size=n // 10, preset=preset)
    if preset == "paper":  # the sizes of its levels, in less time
        sizes = [level.n_clusters for level in load_config(config).levels or choose_levels(n, n // 10)]
        config = CurationConfig(
            target_size=n // 10, preset=preset, levels=[Level(k, 1) for k in sizes], n_iter=1
        )
    config.near_duplicates.enabled = duplicates
    config = load_config(config)
    curate(pool, config, embedder=None, cache_dir=cache, device="cpu")
    stages, _ = planned_stages(Path("nowhere"), config, None, n)
    mapped = n * d * np.dtype(pool.dtype).itemsize + stages.tree.disk_bytes(n, d)
    found = peak_memory(stages.costs(n, d, Rates(None, 1.0)), mapped, base)
    return {"found": found, "peak": peak()}


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])  # `ru_maxrss` begins with the parent's


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "rows":
        path, cache, preset, duplicates = sys.argv[2:]
        print(json.dumps(of_rows(path, cache, preset, duplicates == "True")))
        return
    what, pool, cache, n, dimension, duplicates = sys.argv[1:]
    k = int(n) // 50
    config = CurationConfig(target_size=int(n) // 10, levels=[Level(k, 1, 10), Level(k // 10)], n_iter=5)
    config.near_duplicates.enabled = duplicates == "True"
    config.embedding.num_workers, config.embedding.batch_size = 0, 256
    embedder = Numbers(int(dimension))
    place = {"embedder": embedder, "cache_dir": cache, "device": "cpu"}
    if what == "plan":
        found = plan(pool, config, **place).peak_bytes
    else:
        found = len(curate(pool, config, **place).ids)
    print(json.dumps({"found": found, "peak": peak()}))


if __name__ == "__main__":
    main()
