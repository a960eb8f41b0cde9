"""Ranks that fail, die, lag, or were given different things: the others end, soon, and say why."""

import datetime
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from curated_data import curate, distributed
from curated_data.cache import write_manifest
from curated_data.distributed import build_together
from curated_data.errors import CacheError

CONFIG = {
    "target_size": 20,
    "levels": [{"n_clusters": 12, "n_resamples": 2, "sample_size": 3}, {"n_clusters": 4}],
    "embedding": {"num_workers": 0, "dtype": "float32", "batch_size": 16},
}


def outcomes(function, folder: Path, *arguments, timeout: float = 60.0, seconds: float = 60.0) -> list[str]:
    """How `function(rank, *arguments)` ends on each of two ranks: "" or the error, "killed" or "hangs"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run, args=(function, rank, port, timeout, folder, arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)  # `is_alive` also takes leave of a process that has died
    found = []
    for rank, process in enumerate(processes):
        said = folder / f"outcome-{rank}"
        if process.is_alive():
            process.kill()
            found.append("hangs")
        else:
            found.append(said.read_text() if said.exists() else "killed")
        process.join()
    return found


def _run(function, rank, port, timeout, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=timeout),
    )
    said = ""
    try:
        function(rank, *arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"outcome-{rank}").write_text(said)
    os._exit(0)  # as a process does that ends by an error: without waiting for the others


def _build(rank, folder, how):
    def check():
        if how == "rank 0 dies before":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3.5 if how == "all is well" else 0.2)  # longer than a collective may wait
        if how == "rank 0 fails before":
            raise CacheError("rows are damaged")

    def build(temporary):
        if temporary is None:
            if how == "rank 1 fails":
                raise ValueError("no memory")
            return
        if how == "rank 0 dies while it writes":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "rank 0 fails while it writes":
            raise CacheError("no space left")
        if how == "rank 1 fails":
            distributed.barrier()
        time.sleep(3.5)
        write_manifest(temporary, "test", {})

    name = f"artifact-{rank}" if how == "different settings" else "artifact"
    build_together(folder / name, build, check if "before" in how or how == "all is well" else None)


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("all is well", "", ""),
        ("different settings", "ConfigError: what determines", "ConfigError: what determines"),
        (
            "rank 0 fails before",
            "CacheError: rows are damaged",
            "rank 0 failed: CacheError: rows are damaged",
        ),
        ("rank 0 fails while it writes", "CacheError: no space left", "failed: CacheError: no space left"),
        ("rank 0 dies before", "killed", "RuntimeError: rank 0 died or hangs"),
        ("rank 0 dies while it writes", "killed", "RuntimeError: rank 0 died or hangs"),
        ("rank 1 fails", "RuntimeError: rank 0 of 2: another rank has ended", "ValueError: no memory"),
    ],
)
def test_no_rank_waits_for_one_that_will_not_come(how, first, second, tmp_path):
    found = outcomes(_build, tmp_path, tmp_path, how, timeout=3, seconds=40)
    assert (found[0] == first) if not first else (first in found[0])
    assert (found[1] == second) if not second else (second in found[1])
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".lock", ".heartbeat")]
    assert not left or "fails" in how or "dies" in how


def _curate(rank, shards, folder, how):
    config, cache = dict(CONFIG), folder / "cache"
    if how == "configs":
        config["seed"] = rank
    if how == "caches":
        cache = folder / f"cache-{rank}"
        distributed._SHARED_WITHIN = 1.0  # which a network file system may take
    if how == "pools":
        shards = shards[: 2 - rank]
    np.save(folder / f"ids-{rank}.npy", curate(shards, config, embedder="pixels:4", cache_dir=cache).ids)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("configs", "ConfigError: curation: rank 1 was given another than rank 0"),
        ("pools", "ConfigError: pool: rank 1 was given another than rank 0"),
        ("caches", "what rank 0 writes to its cache_dir, rank 1 does not see"),
    ],
)
def test_ranks_that_were_given_different_things_are_told(how, error, write_pool, tmp_path):
    found = outcomes(_curate, tmp_path, write_pool([20, 20]), tmp_path, how)
    assert error in found[0]
    assert error in found[1]
