"""Runs that are ended from outside: their workers end too, Ctrl-C gives one line, the next run continues."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from curated_data import ShardPool, curate
from curated_data.pool.build import build_in_memory
from curated_data.pool.shard import ShardFile

CONTEXT = multiprocessing.get_context("fork")


def _slow(shard: ShardFile) -> None:
    (Path(shard.url).parent / f"{os.getpid()}.worker").touch()
    time.sleep(60)


def _index_slowly(shards: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another test's Trainer may have left a handler
    pool = ShardPool(shards)
    build_in_memory(pool.shards, _slow, 2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_indexing_workers_end_with_the_process_they_work_for(write_pool, tmp_path, by):
    shards, deadline = write_pool([2, 2, 2]), time.monotonic() + 30
    process = CONTEXT.Process(target=_index_slowly, args=(shards,))
    process.start()
    while len(workers := [int(path.stem) for path in tmp_path.glob("*.worker")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, by)
    if by != signal.SIGINT:  # which waits for what its workers have begun
        process.join()
        while any(map(_runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_runs, workers))
    for pid in [process.pid, *workers]:
        if _runs(pid):
            os.kill(pid, signal.SIGKILL)
    process.join()


COMMAND = """
import sys, time
from curated_data import cli, embedding
from curated_data.pool import ShardPool
make = embedding.resolve_embedder

def slow(spec):
    embedder = make(spec)
    forward = embedder.forward
    embedder.forward = lambda batch: (print("embedding", flush=True), time.sleep(0.3), forward(batch))[2]
    return embedder

from curated_data.pipeline import curate as pipeline
pipeline.resolve_embedder = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_says_so_and_the_next_goes_on(write_pool, tmp_path, by, code):
    shards, cache = write_pool([20, 20, 20]), tmp_path / "cache"
    settings = ["levels=[{n_clusters: 6}]", "embedding.batch_size=4", "embedding.num_workers=2"]
    arguments = ["-q", "curate", *shards, "--cache-dir", str(cache), "--embedder", "pixels:4"]
    arguments += ["--target-size", "10", "--set", *settings]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert [process.stdout.readline() for _ in range(4)] == ["embedding\n"] * 4
    if by == signal.SIGINT:
        os.killpg(process.pid, by)  # as a terminal does, to the workers too
    else:
        process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == ("curated-data curate: stopped; run it again to continue\n" if by == signal.SIGINT else "")
    assert not list(cache.rglob(".tmp-*"))
    config = {"target_size": 10, "levels": [{"n_clusters": 6}], "embedding": {"batch_size": 4}}
    found = [
        curate(shards, config, embedder="pixels:4", cache_dir=tmp_path / name) for name in ("cache", "b")
    ]
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
