"""What names of shards stand for: pools joined by `::`, and chains of protocols."""

import zipfile
from pathlib import Path

import pytest
import webdataset

from curated_data.errors import PoolError
from curated_data.pool import RemoteOptions, ShardPool
from curated_data.pool.urls import expand_urls
from tests.support.small_shards import write

QUICK = RemoteOptions(attempts=2, backoff=0.01)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{0}/a-0.tar::{0}/b-0.tar", ["a-0", "b-0"]),
        ("{0}/a-{{0..1}}.tar::{0}/b-*.tar", ["a-0", "a-1", "b-0", "b-1"]),
        ("{0}/b-?.tar::file://{0}/a-1.tar::{0}/c.tar", ["b-0", "b-1", "a-1", "c"]),
    ],
)
def test_pools_are_joined_in_their_order(tmp_path, pattern, expected):
    for name in ("a-0", "a-1", "b-0", "b-1", "c"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            writer.write({"__key__": name, "txt": "x"})
    pattern = pattern.format(tmp_path)
    found = expand_urls(pattern)
    assert [Path(path).stem for path in found] == expected
    assert ShardPool(pattern).keys(range(len(expected))) == expected
    if "*" not in pattern and "?" not in pattern:
        assert found == webdataset.shardlists.expand_urls(pattern)


def test_pipes_are_joined():
    found = expand_urls("pipe:cat a.tar::pipe:cat b-{0..1}.tar", pipes=True)
    assert found == ["pipe:cat a.tar", "pipe:cat b-0.tar", "pipe:cat b-1.tar"]


def test_urls_are_joined(bucket, tmp_path):
    local, stored = write(tmp_path / "l", 2), write(bucket, 4, first=50)
    pool = ShardPool(f"{local[0]}::{bucket}/shard-*.tar")
    assert pool.keys(range(6)) == ["000", "001", "050", "051", "052", "053"]
    assert ShardPool(f"{stored[0]}::{stored[1]}::{local[0]}").keys([0, 2, 4]) == ["050", "052", "000"]


def test_a_chain_is_one_shard(bucket, tmp_path):
    stored, local = write(bucket, 4), write(tmp_path / "l", 2, first=9)
    for chain in ("simplecache::", "filecache::"):
        pool = ShardPool(chain + stored[1], remote=QUICK)
        assert pool.urls == [chain + stored[1]]
        assert pool.keys([0, 1]) == ["002", "003"]
    joined = ShardPool(f"simplecache::{stored[1]}::{local[0]}", remote=QUICK)
    assert joined.urls == [f"simplecache::{stored[1]}", str(local[0])]
    assert joined.keys(range(4)) == ["002", "003", "009", "010"]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(local[0], "in.tar")
    inside = ShardPool(f"zip://in.tar::{tmp_path}/z.zip::{stored[0]}", remote=QUICK)
    assert inside.keys(range(4)) == ["009", "010", "000", "001"]


def test_a_file_of_such_a_name_is_itself(tmp_path):
    shard = write(tmp_path / "l", 2)[0].rename(tmp_path / "a::b.tar")
    assert ShardPool(shard).keys([1]) == ["001"]


@pytest.mark.parametrize("pattern", ["A.tar::", "::A.tar", "A.tar::::B.tar"])
def test_nothing_before_or_after(pattern):
    with pytest.raises(PoolError, match=repr(pattern)):
        ShardPool(pattern)


def test_a_missing_part_is_named(tmp_path):
    write(tmp_path, 2)
    with pytest.raises(PoolError, match=r"B\.tar"):
        ShardPool(f"{tmp_path}/shard-000000.tar::{tmp_path}/B.tar")
