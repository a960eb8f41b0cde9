"""Ranks that fail, die, lag, or were given different things: the others end and say why."""

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

from curated_data import curate, parallel
from curated_data.cache import shared_build
from curated_data.cache.artifacts import write_manifest
from curated_data.cache.shared_build import build_together
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
    # A rank may be about to die: not while the other is still joining.
    (folder / f"joined-{rank}").touch()
    while not (folder / f"joined-{1 - rank}").exists():
        time.sleep(0.01)
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
            parallel.barrier()
        time.sleep(3.5)
        write_manifest(temporary, "test", {})

    name = f"artifact-{rank}" if how == "different settings" else "artifact"
    build_together(folder / name, build, check if "before" in how or how == "all is well" else None)


@pytest.mark.long
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
        ("rank 0 dies before", "killed", "RankError: rank 1 of 2: another rank has ended"),
        ("rank 0 dies while it writes", "killed", "RankError: rank 1 of 2: another rank has ended"),
        ("rank 1 fails", "RankError: rank 1 failed: ValueError: no memory", "ValueError: no memory"),
    ],
)
def test_no_rank_waits_for_one_that_will_not_come(how, first, second, tmp_path):
    found = outcomes(_build, tmp_path, tmp_path, how, timeout=3, seconds=40)
    assert (found[0] == first) if not first else (first in found[0])
    assert (found[1] == second) if not second else (second in found[1])
    left = [path.name for path in tmp_path.rglob("*") if path.suffix == ".lock"]
    assert not left or "dies" in how


def _curate(rank, shards, folder, how):
    config, cache = dict(CONFIG), folder / "cache"
    if how == "configs":
        config["seed"] = rank
    if how == "caches":
        cache = folder / f"cache-{rank}"
        shared_build._VISIBLE_WITHIN = 1.0  # which a network file system may take
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


class _Pixels(torch.nn.Module):
    """An embedder of one rank, which fails, is killed, or is slow at its third batch."""

    dimension, fingerprint, name = 12, "pixels of ranks", "pixels"

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.batches = how, 0

    def preprocess(self, image):
        return torch.nn.functional.interpolate(image[None].float(), (2, 2))[0] / 255

    def forward(self, images):
        self.batches += 1
        time.sleep(0.1)
        if self.batches == 3:
            if self.how == "fails":
                raise ValueError("no memory\nfor this")
            if self.how == "is interrupted":
                raise KeyboardInterrupt
            if self.how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "is slow":
                time.sleep(6)
        return images.flatten(1)


def _embed(rank, shards, folder, how, which):
    embedder = _Pixels(how if rank == which else "")
    began = time.monotonic()
    try:
        curation = curate(shards, CONFIG, embedder=embedder, cache_dir=folder / "cache")
    except BaseException as error:
        (folder / f"seconds-{rank}").write_text(str(time.monotonic() - began))
        if not isinstance(error, Exception):  # the test below catches no others
            raise RuntimeError(type(error).__name__) from error
        raise
    np.save(folder / f"ids-{rank}.npy", curation.ids)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "which", "cause"),
    [
        ("fails", 1, "rank 1 failed: EmbedderError: pixels: fails on a batch"),
        ("fails", 0, "rank 0 failed: EmbedderError: pixels: fails on a batch"),
        ("is interrupted", 1, "rank 1 failed: KeyboardInterrupt"),
        ("is killed", 1, "rank 0 of 2: another rank has ended"),
        ("is killed", 0, "rank 1 of 2: another rank has ended"),
        ("is slow", 1, ""),
    ],
)
def test_a_rank_that_fails_alone_while_it_embeds_ends_the_others(how, which, cause, write_pool, tmp_path):
    shards = write_pool([96, 96, 96, 96])  # 24 batches, of which one rank alone needs 2.4 s
    found = outcomes(_embed, tmp_path, shards, tmp_path, how, which, timeout=3)
    assert (f"RankError: {cause}" in found[1 - which]) if cause else found == ["", ""]
    if how in ("fails", "is interrupted"):
        assert ("no memory" if how == "fails" else "KeyboardInterrupt") in found[which]
    # The next run continues as if nothing had happened; and ends as one process does.
    if cause:
        assert outcomes(_embed, tmp_path, shards, tmp_path, "", 0) == ["", ""]
    alone = curate(shards, CONFIG, embedder=_Pixels(), cache_dir=tmp_path / "alone").ids
    assert all((np.load(tmp_path / f"ids-{rank}.npy") == alone).all() for rank in range(2))


def _fail_and_go_on(rank, folder, how):
    for failing in (1, 0):
        with pytest.raises(ValueError, match="no memory"), parallel.together():  # noqa: PT012
            parallel.barrier()
            if rank == failing:
                raise ValueError("no memory")
            if how == "in a collective call":
                with parallel.together():
                    parallel.all_gather(np.arange(3 + rank))
            elif how == "in long work":
                while True:
                    time.sleep(0.1)
                    parallel.check_ranks()
        assert parallel.all_reduce(np.array([rank]))[0] == 1
    with parallel.together():
        assert [len(part) for part in parallel.all_gather(np.zeros(2 + rank))] == [2, 3]


@pytest.mark.parametrize("how", ["at the end of the block", "in a collective call", "in long work"])
def test_after_a_failure_that_all_heard_of_ranks_go_on_in_step(how, tmp_path):
    assert outcomes(_fail_and_go_on, tmp_path, tmp_path, how) == ["", ""]


def _open_or_not(rank, shards, folder, which):
    shards = ["nowhere.tar"] if which == rank else shards
    try:
        curate(shards, CONFIG, embedder="pixels:4", cache_dir=folder / "cache")
    finally:
        time.sleep(2 * (which == rank))


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_does_not_see_the_pool_tells_the_others(which, write_pool, tmp_path):
    found = outcomes(_open_or_not, tmp_path, write_pool([20]), tmp_path, which)
    assert "PoolError: no shard matches" in found[which]
    assert f"RankError: rank {which} failed: PoolError: no shard matches" in found[1 - which]


def _begin(rank, dies):
    if rank == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    with parallel.together():
        parallel.barrier()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_died_before_the_first_collective_call_ends_the_others(tmp_path, dies):
    found = outcomes(_begin, tmp_path, dies, seconds=50)
    assert found[dies] == "killed"
    assert found[1 - dies].startswith("RankError")
