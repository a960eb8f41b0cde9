"""Whole shards kept on disk: within the limit, one download each, repaired, and nothing of others touched."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from curated_data.cache.locks import locked
from curated_data.errors import CacheError, PoolError
from curated_data.pool.shard import ShardFile
from curated_data.pool.shard_cache import ShardCache

SHARD = ShardFile("http://x/a", 1000, "a")


def shard_cache(tmp_path, limit=1500):
    calls = []

    def download(shard, path):
        calls.append(shard.url)
        with open(path, "r+b") as file:
            file.write(b"x" * shard.size)

    return ShardCache(tmp_path / "shards", limit), download, calls


def content(cache, download, shard=SHARD):
    handle = cache.open(shard, download)
    with open(handle, "rb") as file:
        return file.read()


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "link", "dangling", "pipe"])
def test_what_is_not_the_shard_is_repaired(tmp_path, damage, caplog):
    cache, download, calls = shard_cache(tmp_path)
    content(cache, download)
    (path,) = (tmp_path / "shards").glob("*.tar")
    victim = tmp_path / "victim"
    victim.write_bytes(b"v" * 1000)
    if damage in ("cut", "empty", "longer"):
        os.truncate(path, {"cut": 500, "empty": 0, "longer": 2000}[damage])
    else:
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(victim if damage == "link" else tmp_path / "nowhere")
    before = victim.stat()
    assert content(cache, download) == b"x" * 1000
    assert len(calls) == 2
    assert victim.read_bytes() == b"v" * 1000
    assert victim.stat().st_mtime_ns == before.st_mtime_ns
    assert not (tmp_path / "nowhere").exists()
    assert path.name in caplog.text


def test_a_folder_in_its_place_is_an_error(tmp_path):
    cache, download, _ = shard_cache(tmp_path)
    path = tmp_path / "shards" / f"{SHARD.fingerprint}.tar"
    path.mkdir(parents=True)
    (path / "x").touch()
    with pytest.raises(CacheError, match=path.name):
        cache.open(SHARD, download)
    assert (path / "x").exists()


def test_links_are_evicted_and_not_what_they_point_to(tmp_path):
    cache, download, _ = shard_cache(tmp_path)
    (tmp_path / "shards").mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(10**6))
    names = [f"{'0' * 20}.tar", f".tmp-{'0' * 12}-{'1' * 20}.tar"]
    for name in names:
        (tmp_path / "shards" / name).symlink_to(victim)
    for name in ("mine.tar", ".tmp-x.tar", ".tmp-y-..-z.tar"):  # of others: neither counted nor removed
        (tmp_path / "shards" / name).write_bytes(bytes(5000))
    assert content(cache, download) == b"x" * 1000
    assert content(cache, download, ShardFile("http://x/b", 1000, "b")) == b"x" * 1000
    assert victim.stat().st_size == 10**6
    for name in ("mine.tar", ".tmp-x.tar", ".tmp-y-..-z.tar"):
        assert (tmp_path / "shards" / name).stat().st_size == 5000


def test_waiting_for_room_says_for_what_and_ends(tmp_path, monkeypatch, caplog):
    cache, download, _ = shard_cache(tmp_path)
    monkeypatch.setattr(cache, "patience", 0.3)
    caplog.set_level("INFO")
    begun, end = threading.Event(), threading.Event()

    def hang(shard, path):
        begun.set()
        end.wait(30)
        download(shard, path)

    other = threading.Thread(target=lambda: os.close(cache.open(SHARD, hang)))
    other.start()
    begun.wait(30)
    try:
        wanted = ShardFile("http://x/b", 1000, "b")
        with pytest.raises(PoolError, match=r"http://x/b: .*cache_bytes"):
            cache.open(wanted, download)
        assert "waiting for 1 other download" in caplog.text
    finally:
        end.set()
        other.join()
    assert content(cache, download, wanted) == b"x" * 1000


def sizes_in(folder: Path) -> set[tuple[int, int]]:
    """Inode and size of each file."""
    found = set()
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.stat().st_ino, path.stat().st_size))
    return found


def test_what_killed_downloads_left_is_cleared(tmp_path):
    def shard(name, size):
        return ShardFile(f"http://x/{name}", size, name)

    def download(shard, path):
        path.write_bytes(b"x" * shard.size)

    cache = ShardCache(tmp_path / "shards", 1000)
    (tmp_path / "shards").mkdir()
    left = tmp_path / "shards" / f".tmp-0123456789ab-{shard('a', 900).fingerprint}.tar"
    left.write_bytes(bytes(900))
    for name, size in [("b", 400), ("c", 400), ("d", 400)]:
        os.close(cache.open(shard(name, size), download))
        os.utime(tmp_path / "shards" / f"{shard(name, size).fingerprint}.tar", ns=(1, ord(name)))
    assert not left.exists()
    kept = {path.name for path in (tmp_path / "shards").glob("*.tar")}
    assert kept == {f"{shard(name, 400).fingerprint}.tar" for name in "cd"}


def test_parallel_downloads_stay_within_the_limit(tmp_path):
    """Eight downloads at once, room for two: the others wait until one is complete and can be evicted."""
    folder = tmp_path / "shards"
    cache = ShardCache(folder, 1000)
    most = []

    def download(shard, path):
        time.sleep(0.02)
        path.write_bytes(b"x" * shard.size)
        with locked(folder / "eviction"):  # none is evicted or added while they are counted
            most.append(sum(size for _, size in sizes_in(folder)))

    shards = [ShardFile(f"http://x/{name}", 400, name) for name in "abcdefgh"]
    with ThreadPoolExecutor(8) as threads:
        for handle in threads.map(lambda shard: cache.open(shard, download), shards):
            assert os.fstat(handle).st_size == 400
            os.close(handle)
    assert len(most) == 8
    assert max(most) == 800
