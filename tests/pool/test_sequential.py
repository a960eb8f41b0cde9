"""Compressed shards and pipes, against the same samples in plain shards."""

import bz2
import gzip
import logging
import lzma
import multiprocessing
import pickle
import shlex

import numpy as np
import pytest

from curated_data.errors import PoolError
from curated_data.pool import ShardPool
from curated_data.pool.sequential import SequentialPool, _Stream


@pytest.fixture(params=["gz", "bz2", "xz", "zst", "plain", "pipe"])
def urls(request, small_pool, tmp_path):
    if request.param == "pipe":
        return [f"pipe:cat {shlex.quote(str(path))}" for path in small_pool]
    if request.param == "plain":
        return [str(path) for path in small_pool]
    if request.param == "zst":
        compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    else:
        compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[request.param]
    folder = tmp_path / "compressed"
    folder.mkdir()
    for path in small_pool:
        (folder / f"{path.name}.{request.param}").write_bytes(compress(path.read_bytes()))
    return str(folder / f"pool-{{000000..000002}}.tar.{request.param}")


def contents(samples):
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]


@pytest.mark.parametrize("cached", [False, True])
def test_gives_what_plain_shards_give(urls, small_pool, tmp_path, cached):
    plain = ShardPool(small_pool)
    pool = SequentialPool(urls, cache_dir=tmp_path / "cache" if cached else None)
    ids = np.array([8, 0, 3, 3, 5, 1])
    assert len(pool) == 9
    assert contents(pool.read(ids)) == contents(plain.read(ids))
    assert contents(pool.read([2], ["cls"])) == contents(plain.read([2], ["cls"]))
    assert pool.keys(ids) == plain.keys(ids)
    assert pool.labels(np.arange(9)).tolist() == plain.labels(np.arange(9)).tolist()
    assert pool.sizes(ids).tolist() == plain.sizes(ids).tolist()
    assert pool.shard_ranges().tolist() == [0, 5, 5, 9]
    found = list(pool.iterate([7, 1, 1, 4]))
    assert [sample_id for sample_id, _ in found] == [1, 4, 7]
    assert contents(sample for _, sample in found) == contents(plain.read([1, 4, 7]))
    assert contents(pickle.loads(pickle.dumps(pool)).read([6])) == contents(plain.read([6]))
    assert pool.shard_fingerprints == plain.shard_fingerprints
    pool.close()


def test_reading_in_order_is_one_pass(small_pool, monkeypatch):
    pool = SequentialPool(small_pool)
    len(pool)
    opened = []
    monkeypatch.setattr(_Stream, "__post_init__", _counting(opened, _Stream.__post_init__))
    for i in range(0, 9, 2):
        pool.read(np.arange(i, min(i + 2, 9)))
    assert len(opened) == 2  # the shard without samples is not opened
    pool.read([0])
    assert len(opened) == 3
    pool.close()


def _counting(calls, method):
    def counted(self):
        calls.append(self.shard.url)
        method(self)

    return counted


def test_a_forked_reader_does_not_disturb_its_parent(urls, small_pool):
    plain = ShardPool(small_pool)
    pool = SequentialPool(urls)
    pool.read([0])
    with multiprocessing.get_context("fork").Pool(1) as workers:
        assert contents(workers.apply(pool.read, ([2, 4],))) == contents(plain.read([2, 4]))
    assert contents(pool.read([1, 3, 8])) == contents(plain.read([1, 3, 8]))
    pool.close()


def test_says_so(small_pool, caplog):
    with caplog.at_level(logging.INFO):
        SequentialPool(small_pool)
    assert "3 shards are read in sequence" in caplog.text


def test_faults_name_the_shard(tmp_path, small_pool):
    path = tmp_path / "cut.tar.gz"
    whole = gzip.compress(small_pool[2].read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PoolError, match=r"cut\.tar\.gz: cannot be read to its end \(EOFError"):
        len(SequentialPool(path))
    with pytest.raises(PoolError, match=r"cut\.tar\.gz: is compressed \(gzip\).*SequentialPool"):
        len(ShardPool(path))
    path.write_bytes(gzip.compress(small_pool[2].read_bytes()[:2000]))
    with pytest.raises(PoolError, match=r"cut\.tar\.gz: truncated"):
        len(SequentialPool(path))
    garbled = bytearray(small_pool[2].read_bytes())
    garbled[1024:1034] = b"garbage!!!"
    path.write_bytes(gzip.compress(garbled))
    with pytest.raises(PoolError, match=r"cut\.tar\.gz: no tar header at offset 1024"):
        len(SequentialPool(path))
    with pytest.raises(PoolError, match=r"cannot be read to its end \(OSError: its command ended with exit"):
        len(SequentialPool(f"pipe:head -c 1024 {shlex.quote(str(small_pool[2]))}; exit 1"))
    with pytest.raises(
        PoolError, match=r"pipe:exit 3: cannot be opened \(its command ended with exit status 3"
    ):
        len(SequentialPool("pipe:exit 3"))


def test_a_pipe_that_gives_something_else_than_it_did(tmp_path, small_pool):
    path = tmp_path / "source.tar"
    path.write_bytes(small_pool[0].read_bytes())
    pool = SequentialPool(f"pipe:cat {shlex.quote(str(path))}")
    assert pool.keys([4]) == ["key004"]
    path.write_bytes(small_pool[2].read_bytes())
    with pytest.raises(PoolError, match=r"source\.tar: changed since it was indexed: sample 4"):
        pool.read([4])
