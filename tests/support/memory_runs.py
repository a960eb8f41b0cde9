"""A plan or a curation of a pool of numbers in a process of its own, which prints its bytes at the peak."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from curated_data import CurationConfig, Level, curate
from curated_data.plan import plan


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


def main() -> None:
    what, pool, cache, n, dimension, duplicates = sys.argv[1:]
    torch.set_num_threads(1)
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
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])  # `ru_maxrss` begins with the parent's
    print(json.dumps({"found": found, "peak": peak}))


if __name__ == "__main__":
    main()
