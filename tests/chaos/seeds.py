"""Seed sets and what is retrieved for them: kinds for `files`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data import curate
from curated_data.pipeline.inspect import verify_cache
from tests.chaos.kinds import Kind
from tests.chaos.world import CONFIG, EMBEDDER, World

_METHODS: dict[str, dict[str, Any]] = {
    "nearest": {"n": 2},
    "clusters": {"method": "clusters", "per_cluster": 2},
    "weights": {"method": "weights"},
}


def seed_kinds(world: World) -> list[Kind]:
    """Seed sets of rows and of a shard, and what a cache holds of what was retrieved for them."""
    case, start = world.cage.case, world.home / "starts" / "seeds"
    start.mkdir(parents=True)
    np.save(start / "rows.npy", np.random.default_rng(3).random((5, 12)).astype(np.float32))
    shutil.copy2(world.home / "grown" / "more-000000.tar", start / "shard.tar")

    def retrieved(method: str) -> Any:
        torch.set_num_threads(1)
        seeds = {"rows": str(case / "rows.npy"), "shard": str(case / "shard.tar")}
        sampling = "flat" if method == "weights" else "hierarchical"
        config = CONFIG | {"sampling": sampling, "retrieval": {"seeds": seeds, **_METHODS[method]}}
        found = curate(world.pool, config, embedder=EMBEDDER, cache_dir=case / "cache", device="cpu")
        return [found.ids.tolist(), json.loads(json.dumps(found.report["retrieval"]))]

    reads = {method: lambda method=method: retrieved(method) for method in _METHODS}
    world.cage.fresh(start)
    for read in reads.values():
        ending = world.cage.run(read)
        assert ending.how == "done", ending
    known = start.with_name("seeds, known")
    shutil.copytree(case, known, symlinks=True)

    def stage(folder: Path) -> list[Path]:
        return sorted(path for path in (folder / "cache" / "retrieval").glob("*/*") if path.is_file())

    def given(folder: Path) -> list[Path]:
        return [folder / "rows.npy", folder / "shard.tar"]

    def as_given(*_: Any) -> str:
        return "taken as it is"  # rows of a user have no checksum, nor have pixels

    names = ("rows", "shard", "retrieval.seeds")
    whole = reads | {"verify": lambda: verify_cache(case / "cache")}
    return [
        Kind("retrieval", known, stage, whole, forges=True),
        Kind("seed sets", start, given, reads, as_given, names),
        Kind("seed sets, known", known, given, reads, as_given, names),
    ]
