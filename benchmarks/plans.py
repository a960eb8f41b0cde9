"""What a plan expects beside what was then measured: seconds by stage, memory, bytes on disk.

    python -m benchmarks.plans     # the embedded Fashion-MNIST, one shard and all
    python -m benchmarks.plans --pool 'a-{00..02}.tar' --pool 'a-{00..06}.tar' --embedder timm:…

Each pool is planned in an empty cache and then curated, in a process of its own. Seconds are CPU seconds of
that process, by plan and by curation alike, so that other work on the machine tells neither; embedding
therefore takes no worker processes. Memory is the peak of a second process, which finds the embeddings
in the cache, libraries and mapped files included.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.machine import print_machine
from curated_data import CurationConfig, ShardPool, curate
from curated_data.pipeline import curate as pipeline
from curated_data.pipeline import plan as planning
from curated_data.pipeline.plan import plan
from curated_data.programs import described_parser
from recipes.quickstart import FASHION

STAGES = ("embed", "cluster")


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--pool", action="append", help="shards; may be given several times")
    parser.add_argument("--embedder", default="efficientnet_lite0:64", help="(default: %(default)s)")
    options = parser.parse_args()
    print_machine()
    shards = str(FASHION / "fashion-lt50-train-")
    pools = options.pool or [f"{shards}00.tar", shards + "{00..03}.tar"]
    units = ("embed, s", "cluster, s", "memory, MB", "embeddings, MB", "tree, MB")
    print("| pool | | " + " | ".join(units) + " |\n|---|---" + "|---" * len(units) + "|")
    for pool in pools:
        with tempfile.TemporaryDirectory() as cache:
            expected, found = in_a_process(timed, pool, options.embedder, cache)
            found["memory"] = in_a_process(memory, pool, options.embedder, cache)
        name = f"{expected.pop('samples'):,} x {expected.pop('dimension'):,}"
        for title, row in (("expected", expected), ("measured", found)):
            print(f"| {name} | {title} | " + " | ".join(f"{value:,.1f}" for value in row.values()) + " |")
            name = ""
        ratios = (expected[column] / max(found[column], 1e-9) for column in expected)
        print("| | ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


def in_a_process(function: Any, *arguments: Any) -> Any:
    """The function's result, from a fresh interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def settings(pool: str, seed: int = 0) -> CurationConfig:
    """A fifth of the pool, with near-duplicates out."""
    config = CurationConfig(target_size=max(len(ShardPool(pool)) // 5, 1), seed=seed)
    config.near_duplicates.enabled = True
    config.embedding.num_workers = 0
    return config


def timed(pool: str, embedder: str, cache: str) -> tuple[dict[str, float], dict[str, float]]:
    """Columns of the table as planned, and as they turned out, but for the memory."""
    torch.set_num_threads(1)
    clock = SimpleNamespace(monotonic=time.process_time)
    planning.time = pipeline.time = clock
    place = {"embedder": embedder, "cache_dir": cache}
    planned = plan(pool, settings(pool), **place)
    curation = curate(pool, settings(pool), **place)
    seconds = {stage.name: stage.seconds or 0.0 for stage in planned.stages}
    expected = {"samples": planned.n_samples, "dimension": curation.embeddings.shape[1]}
    expected |= {stage: seconds[stage] for stage in STAGES}
    expected |= {
        "memory": planned.peak_bytes / 1e6,
        "embeddings": planned.embedding_bytes / 1e6,
        "tree": planned.tree_bytes / 1e6,
    }
    found = {stage: curation.report["seconds"][stage] for stage in STAGES} | {"memory": 0.0}
    for name in ("embeddings", "tree"):
        files = curation.folders[name].rglob("*.npy")
        found[name] = sum(path.stat().st_size for path in files) / 1e6
    return expected, found


def memory(pool: str, embedder: str, cache: str) -> float:
    """MB of the process at its height, mapped files included, with the embeddings in the cache (Linux)."""
    torch.set_num_threads(1)
    config = settings(pool, seed=1)
    config.near_duplicates.threshold -= 1e-3  # so that both are made again
    place = {"embedder": embedder, "cache_dir": cache}
    curate(pool, config, **place)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) / 1e6


if __name__ == "__main__":
    main()
