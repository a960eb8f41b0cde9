"""Locks: one holder at a time however many processes come and go, and nothing left behind."""

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import multiprocessing.dummy
import os
import time
from pathlib import Path

import numpy as np
import pytest

from curated_data import ShardPool
from curated_data.cache import locks
from curated_data.cache.artifacts import open_cache
from curated_data.cache.locks import locked
from curated_data.cache.publishing import atomic_save, new_array
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import CacheError
from curated_data.pool.known import turns

CONTEXT = multiprocessing.get_context("fork")


def _count(folder: Path, times: int) -> None:
    for _ in range(times):
        with locked(folder / "counter"):
            value = int((folder / "value").read_text())
            time.sleep(0.0005)
            (folder / "value").write_text(str(value + 1))


def test_no_two_hold_a_lock_whose_file_comes_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL", 0.0)
    (tmp_path / "value").write_text("0")
    processes = [CONTEXT.Process(target=_count, args=(tmp_path, 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "value").read_text() == "400"
    assert list((tmp_path / ".locks").iterdir()) == []


def test_a_lock_is_refused_and_broken_by_hand(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_REMIND", 0.3)
    with locked(tmp_path / "a"):
        with locked(tmp_path / "a", wait=False) as held:
            assert not held
        (lock,) = (tmp_path / ".locks").iterdir()

        def wait():
            with caplog.at_level(logging.INFO), locked(tmp_path / "a"):
                pass

        waiting = multiprocessing.dummy.Process(target=wait)
        waiting.start()
        limit = time.monotonic() + 60
        while "if it is gone for good" not in caplog.text:
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert waiting.is_alive()
        lock.unlink()  # as the log says to do where the holder's host is gone for good
        waiting.join(60)
        assert not waiting.is_alive()
    assert f"pid {os.getpid()}, which builds a" in caplog.text
    assert f"if it is gone for good, remove {lock}" in caplog.text
    assert list((tmp_path / ".locks").iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CacheError, match=r"file locks .*cache_dir"), locked(tmp_path / "a"):
        pass


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "free some"),
        (errno.EFBIG, "no space"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, os.strerror(errno.EIO)),
        (errno.EROFS, "another place"),
    ],
)
def test_what_the_system_refuses_is_one_error(code, message, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CacheError, match=rf"a\.npy: .*{message}"):
        atomic_save(tmp_path / "a.npy", np.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_array_reserves_its_space(tmp_path, monkeypatch):
    array = new_array(tmp_path / "a.npy", np.int64, (1000,))
    array[:] = 3
    array.flush()
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 8000
    assert (np.load(tmp_path / "a.npy") == 3).all()
    assert len(new_array(tmp_path / "empty.npy", np.uint8, (0,))) == 0

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CacheError, match=r"b\.npy: .*no space"):
        new_array(tmp_path / "b.npy", np.int64, (1000,))


def _embed(shards, root, start):
    start.wait()
    embed_pool(ShardPool(shards), resolve_embedder("pixels:2"), root, num_workers=1, batch_size=64)


def test_runs_that_wait_for_several_shards_never_wait_for_each_other(write_pool, tmp_path):
    """Each fetches ahead, so it holds one shard while it waits for the next: all must go in one order."""
    shards, root = write_pool([3, 3, 3, 3]), open_cache(tmp_path / "cache")
    pool = ShardPool(shards)
    folder = embed_pool(pool, resolve_embedder("pixels:2"), root, num_workers=0).folder
    for path in [*folder.glob("*.npy"), *folder.glob("*.json")]:
        path.unlink()
    start = CONTEXT.Event()
    with contextlib.ExitStack() as held:
        for name in turns(pool.shard_fingerprints):
            held.enter_context(locked(folder / name))
        orders = (shards, shards[::-1])
        processes = [CONTEXT.Process(target=_embed, args=(order, root, start)) for order in orders]
        for process in processes:
            process.start()
        start.set()
        time.sleep(2)  # both have passed by and wait now
    for process in processes:
        process.join(120)
        alive = process.is_alive()
        process.kill()
        assert not alive, "the runs wait for each other"
        assert process.exitcode == 0


def test_a_planted_link_is_not_followed(tmp_path):
    """Not by a lock, nor by what looks for one: the file that it leads to keeps every byte."""
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    (tmp_path / "cache" / ".locks").mkdir(parents=True)
    lock = tmp_path / "cache" / ".locks" / "a.lock"
    for plant in (lambda: lock.symlink_to(victim), lambda: os.link(victim, lock)):
        plant()
        with pytest.raises(CacheError, match=r"a\.lock: "), locked(tmp_path / "cache" / "a"):
            pass
        locks.remove_if_free(lock, older_than=time.time() + 10)
        assert victim.read_text() == "years of work"
        lock.unlink()
    lock.symlink_to(tmp_path / "made")
    with pytest.raises(CacheError, match=r"a\.lock: .*link"), locked(tmp_path / "cache" / "a"):
        pass
    assert not (tmp_path / "made").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.lock").write_text("years of work")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"\.locks: .*link"), locked(tmp_path / "linked" / "a"):
        pass
    assert (tmp_path / "elsewhere" / "a.lock").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_lock_file_neither_blocks_nor_is_written(kind, tmp_path):
    (tmp_path / ".locks").mkdir()
    lock = tmp_path / ".locks" / "a.lock"
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/full")}[kind](lock)
    with pytest.raises(CacheError, match=r"a\.lock: "), locked(tmp_path / "a"):
        pass


def test_a_sweep_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / ".tmp-old").write_text("years of work")
    os.utime(victim / ".tmp-old", (0, 0))
    (tmp_path / "day").touch()
    os.utime(tmp_path / "day", (0, 0))
    root = open_cache(tmp_path / "cache")
    (root / ".swept").unlink()
    (root / ".swept").symlink_to(tmp_path / "day")
    (root / "tree").symlink_to(victim)
    (root / "embeddings").mkdir()
    (root / "embeddings" / "x").symlink_to(victim)
    (root / ".tmp-link").symlink_to(victim)
    os.utime(root / ".tmp-link", (0, 0), follow_symlinks=False)
    open_cache(root)
    assert (tmp_path / "day").stat().st_mtime == 0
    (root / ".swept").unlink()
    open_cache(root)
    assert not (root / ".tmp-link").is_symlink()
    assert (victim / ".tmp-old").read_text() == "years of work"


@pytest.mark.parametrize("name", ["open", "ftruncate", "pwrite"])
def test_a_full_disk_is_one_error_or_none(name, tmp_path, monkeypatch):
    """A lock is held without its note of who holds it; it cannot be held without its file."""
    original = getattr(os, name)

    def refuse(path, *arguments, **named):
        if name != "open" or str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, name, refuse)
    if name == "open":
        with pytest.raises(CacheError, match=r"a\.lock: .*no space"), locked(tmp_path / "a"):
            pass
    else:
        with locked(tmp_path / "a") as held:
            assert held
