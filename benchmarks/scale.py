"""What ten million samples cost, stage by stage: CPU seconds, and memory at its height.

    python -m benchmarks.scale [--samples 10000000] [--clusters 10000 1000 100] [--folder DIR]

Shards are holes of the right size. Their indexes and embeddings (8 dimensions, float16) are written by the
package's own writers; every stage after these runs as a user runs it. So this measures what each sample costs
beside its images and its network: nothing here should grow faster than the pool, nor hold a Python object a
sample. Memory is this process's own, without mapped files; bytes are per sample of the pool.
"""

import logging
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import print_machine
from benchmarks.process_memory import memory_added
from curated_data import CuratedDataModule, ShardPool, curate, flat_sample, hierarchical_sample
from curated_data.cache.artifacts import open_cache
from curated_data.cache.layout import INDEX
from curated_data.embedding.contents import Contents
from curated_data.embedding.extract import embeddings_name
from curated_data.embedding.shard_files import write_shard
from curated_data.pipeline.extend import extend
from curated_data.pipeline.plan import plan
from curated_data.pipeline.recurate import draw_share, recurate
from curated_data.pool.index import ShardIndex
from curated_data.pool.index_files import save_shard_index
from curated_data.pool.known import Facts
from curated_data.programs import described_parser
from curated_data.report.explain import explain
from curated_data.report.page import write_report

DIMENSION = 8
PER_SHARD = 10_000
STRIDE = 2_048  # bytes of a sample in its shard: two members of up to 512, and their headers
PLACES = 2_000  # components of the mixture that embeddings are drawn from
SHARE = 0.2  # of the pool that is embedded again


def zeros(content: bytes) -> torch.Tensor:
    """In place of decoding."""
    return torch.zeros(1)


def unchanged(content: torch.Tensor) -> torch.Tensor:
    """In place of views."""
    return content


DECODERS = {"bin": zeros}


class Planted:
    """An embedder whose embeddings are all in the cache already."""

    dimension = DIMENSION

    def __init__(self, name: str):
        self.fingerprint = self.name = name

    def preprocess(self, image: Any) -> torch.Tensor:
        return torch.zeros(1)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch), DIMENSION)


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, nargs="+", default=[10_000, 1_000, 100])
    parser.add_argument("--folder", type=Path, help="for about 100 bytes per sample")
    parsed = parser.parse_args()
    print_machine()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        walk(Path(folder), parsed.samples, parsed.clusters)


def walk(folder: Path, n: int, clusters: list[int]) -> None:
    n_shards = max(n // PER_SHARD, 10)
    n, n_more = n_shards * PER_SHARD, n_shards // 10
    root = open_cache(folder / "cache")

    def open_pool(shards: int) -> ShardPool:
        pattern = f"{folder}/pool-{{000000..{shards - 1:06d}}}.tar"
        return ShardPool(pattern, cache_dir=root, image_extensions=("bin",))

    def stage(name: str, run: Callable[[], Any], note: Callable[[Any], str] = lambda result: "") -> Any:
        began = time.process_time()
        result, added = memory_added(run)
        seconds = time.process_time() - began
        print(f"{name:48}{seconds:9.2f}{added / n:9.1f}   {note(result)}", flush=True)
        return result

    shards = [folder / f"pool-{number:06d}.tar" for number in range(n_shards + n_more)]
    for path in shards:
        with open(path, "wb") as file:
            file.truncate(PER_SHARD * STRIDE)
    whole, grown = open_pool(n_shards), open_pool(n_shards + n_more)
    plant_index(grown, root)
    plant_embeddings(grown, root, "first")

    print(f"{n:,} samples in {n_shards:,} shards, clusters {clusters}")
    print(f"{'':48}{'CPU s':>9}{'bytes':>9}")
    stage("index of the pool from those of its shards", whole.index)
    pool = stage("opening it again", lambda: open_pool(n_shards), lambda pool: f"{len(pool):,} samples")
    some = np.arange(0, n, 10)
    stage("keys of a tenth", lambda: pool.keys(some))
    stage("sizes of a tenth", lambda: pool.sizes(some))

    levels = [{"n_clusters": k, "n_resamples": 1 if number == 0 else 0} for number, k in enumerate(clusters)]
    config = {"target_size": n // 10, "levels": levels, "n_iter": 10, "max_memory_gb": 2.0}
    settings = {"embedder": Planted("first"), "cache_dir": root, "device": "cpu", "decoders": DECODERS}
    stage("plan", lambda: plan(pool, config, **settings, n_probe=64))
    curation = stage("curate: clustering and selection", lambda: curate(pool, config, **settings))
    stage("curate again, a look-up", lambda: curate(open_pool(n_shards), config, **settings))
    tree, target = curation.tree, n // 10
    for name, sample in {
        "hierarchical, random": lambda: hierarchical_sample(tree, target),
        "hierarchical, closest": lambda: hierarchical_sample(tree, target, strategy="closest"),
        "hierarchical, furthest": lambda: hierarchical_sample(tree, target, strategy="furthest"),
        "hierarchical, up to 4 repeats": lambda: hierarchical_sample(tree, target, max_repeats=4),
        "hierarchical, the whole pool": lambda: hierarchical_sample(tree, n),
        "flat": lambda: flat_sample(tree, target),
        "members of a cluster": lambda: tree.members(1, 0),
    }.items():
        tree._sizes.clear()
        stage(f"  {name}", sample)

    for name, how in {
        "full shuffle": {},
        "blocks of shards": {"shuffle": "block"},
        "stratified": {"stratify_level": len(clusters)},
    }.items():
        data = data_module(open_pool(n_shards), config | {"target_size": n}, settings, **how)
        loader = stage(f"stream of all, {name}: set-up", data.train_dataloader)
        batches = iter(loader)
        stage("  first batch of 1,024", lambda batches=batches: next(batches))
        requests = loader.batch_sampler._requests(0, len(loader) // 2, 1_000)
        stage("  a million ids from the middle of an epoch", lambda requests=requests: deque(requests, 0))
        stage("  state", lambda data=data: pickle.dumps(data.state_dict()), lambda s: f"{len(s):,} bytes")

    fresh = draw_share(tree.parent[1] >= 0, SHARE, 0)
    plant_embeddings(pool, root, "second", fresh)
    again = settings | {"embedder": Planted("second"), "base": curation, "share": SHARE}
    stage("re-curate by a fifth: clustering and selection", lambda: recurate(pool, curation.config, **again))
    extended = settings | {"tree": curation.folders["tree"]}
    stage("extend by a tenth", lambda: extend(grown, config, **extended))
    page = folder / "report.html"
    stage("report page", lambda: write_report(curation, pool, page), lambda p: f"{size_of(p):.1f} MB")
    stage("why a sample was chosen", lambda: explain(curation, int(curation.ids[0])))


def plant_index(pool: ShardPool, root: Path) -> None:
    """The indexes of shards with samples of two members each, as indexing would find them."""
    rows = np.arange(PER_SHARD + 1)
    for shard in pool.shards:
        keys = np.char.add(f"{Path(shard.url).stem}/", np.char.zfill(rows[:-1].astype(str), 5)).astype("S")
        length = keys.dtype.itemsize
        offset = (rows[:-1, None] * STRIDE + [512, 1_536]).ravel()
        index = ShardIndex(
            ["bin", "txt"],
            rows * length,
            np.frombuffer(keys.tobytes(), np.uint8),
            rows * 2,
            np.tile(np.array([0, 1], np.int32), PER_SHARD),
            offset,
            np.tile([400, 60], PER_SHARD),
        )
        save_shard_index(root / INDEX / index.layout, index, url=shard.url)
        Facts(root, "layouts").add(shard.fingerprint, index.layout)


def plant_embeddings(pool: ShardPool, root: Path, name: str, ids: np.ndarray | None = None) -> None:
    """Draws of a mixture with components of very different weights, shard by shard."""
    how = {"dtype": "float16", "precision": "auto", "decoders": DECODERS}
    folder = root / "embeddings" / embeddings_name(pool, Planted(name), ids=ids, **how)
    rng = np.random.default_rng(0)
    places = rng.normal(0, 4, (PLACES, DIMENSION))
    weight = 1 / np.arange(1, PLACES + 1)
    ranges = pool.shard_ranges() if ids is None else np.searchsorted(ids, pool.shard_ranges())
    contents = Contents(root, pool)
    for number, size in enumerate(np.diff(ranges).tolist()):
        place = places[rng.choice(PLACES, size, p=weight / weight.sum())]
        rows = (place + rng.normal(size=(size, DIMENSION))).astype(np.float16)
        content = contents.names[number] or contents.record(number, f"shard {number}".encode())
        write_shard(folder, content, rows, [], {"url": "", "embedder": name})


def data_module(pool: ShardPool, config: Any, settings: dict[str, Any], **how: Any) -> CuratedDataModule:
    """Samples are zeros: what is measured is everything but their bytes."""
    given = {name: settings[name] for name in ("embedder", "cache_dir")}
    given |= {"loader": {"num_workers": 0}, "decoding": {"decoders": settings["decoders"]}}
    return CuratedDataModule(pool, config, batch_size=1_024, views=unchanged, **given, **how)


def size_of(path: Path) -> float:
    return path.stat().st_size / 1e6


if __name__ == "__main__":
    main()
