"""Exported shards, read by webdataset itself: the same members, and a way back to the pool."""

import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from curated_data.clustering import ClusterTree
from curated_data.errors import ConfigError, PoolError
from curated_data.pipeline.export import export
from curated_data.pool import ShardPool


@pytest.fixture
def pool(fashion_train) -> ShardPool:
    return ShardPool(fashion_train)


@pytest.fixture
def ids(pool) -> np.ndarray:
    """Some of the pool, one sample thrice, as a sampling with repeats gives them."""
    chosen = np.sort(np.random.default_rng(0).choice(len(pool), 57, replace=False))
    return np.repeat(chosen, np.where(np.arange(57) == 20, 3, 1))


def read_back(shards: list[Path]) -> list[dict]:
    return list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))


@pytest.mark.parametrize("order", ["shuffled", "pool", "given"])
def test_members_are_the_same_bytes_and_the_manifest_leads_back(pool, ids, tmp_path, order):
    ids = ids[::-1]
    shards = export(pool, ids, tmp_path / "out", order=order, max_samples=25)
    exported = read_back(shards)
    back = np.load(tmp_path / "out" / "ids.npy")
    assert [path.name for path in shards] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert len(exported) == len(back) == 59
    assert np.array_equal(np.sort(back), np.sort(ids))
    for sample, original in zip(exported, pool.read(back), strict=True):
        assert {name: data for name, data in sample.items() if name[0] != "_"} == {
            name: data for name, data in original.items() if name[0] != "_"
        }
        assert sample["__key__"].split("~")[0] == original["__key__"]
    if order == "pool":
        assert np.array_equal(back, np.sort(ids))
    elif order == "given":
        assert np.array_equal(back, ids)
    else:
        assert not np.array_equal(back, ids)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["first"] for shard in manifest["shards"]] == [0, 25, 50]
    assert manifest["pool"]["fingerprint"] == pool.fingerprint
    assert manifest["samples"] == 59


def test_keys_are_kept_and_made_distinct_within_a_shard(pool, ids, tmp_path):
    shards = export(pool, ids, tmp_path, order="pool", max_samples=30)
    for path in shards:
        with tarfile.open(path) as archive:
            names = archive.getnames()
        keys = [key for key, _ in itertools.groupby(name.split(".")[0] for name in names)]
        assert len(set(keys)) == len(keys)
    keys = [sample["__key__"] for sample in read_back(shards)]
    assert [key for key in keys if "~" not in key] == pool.keys(np.unique(ids))
    assert sum("~" in key for key in keys) == 2


def test_equal_arguments_give_equal_shards(pool, ids, tmp_path):
    first = export(pool, ids, tmp_path / "a", max_samples=25)
    second = export(pool, ids, tmp_path / "b", max_samples=25)
    other = export(pool, ids, tmp_path / "c", max_samples=25, seed=1)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.read_bytes() for path in first] != [path.read_bytes() for path in other]


def test_clusters_of_every_level_are_exported(pool, ids, tmp_path):
    rng = np.random.default_rng(1)
    level_1, level_2 = rng.integers(0, 9, len(pool)), rng.integers(0, 3, 9)
    tree = ClusterTree(
        centroids={1: np.zeros((9, 2), np.float32), 2: np.zeros((3, 2), np.float32)},
        parent={1: level_1, 2: level_2},
    )
    export(pool, ids, tmp_path, tree=tree)
    back, clusters = np.load(tmp_path / "ids.npy"), np.load(tmp_path / "clusters.npy")
    assert np.array_equal(clusters[:, 0], level_1[back])
    assert np.array_equal(clusters[:, 1], level_2[level_1[back]])


def test_an_exported_selection_is_a_pool(pool, ids, tmp_path):
    shards = export(pool, ids, tmp_path, max_samples=25)
    exported = ShardPool(shards)
    back = np.load(tmp_path / "ids.npy")
    assert len(exported) == 59
    assert np.array_equal(exported.labels(range(59)), pool.labels(back))


def test_an_earlier_export_is_replaced_only_when_asked(pool, ids, tmp_path):
    export(pool, ids, tmp_path, max_samples=25)
    before = (tmp_path / "ids.npy").read_bytes()
    with pytest.raises(PoolError, match=r"shard-000000\.tar"):
        export(pool, ids[:5], tmp_path)
    assert (tmp_path / "ids.npy").read_bytes() == before
    shards = export(pool, ids[:5], tmp_path, overwrite=True)
    assert len(read_back(shards)) == 5
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_killed_export_is_started_over(pool, ids, tmp_path, monkeypatch):
    expected = [path.read_bytes() for path in export(pool, ids, tmp_path / "whole", max_samples=25)]

    monkeypatch.setattr("curated_data.pipeline.export._BLOCK", 30)
    read, calls = pool.read, []

    def read_once(asked):
        calls.append(asked)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(asked)

    monkeypatch.setattr(pool, "read", read_once)
    with pytest.raises(KeyboardInterrupt):
        export(pool, ids, tmp_path / "killed", max_samples=25)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    monkeypatch.undo()
    shards = export(pool, ids, tmp_path / "killed", max_samples=25)
    assert [path.read_bytes() for path in shards] == expected


def test_wrong_arguments_are_named(pool, tmp_path):
    with pytest.raises(ConfigError, match=r"^order: "):
        export(pool, [0], tmp_path, order="sorted")
    with pytest.raises(ConfigError, match=r"^selection: "):
        export(pool, np.array([], np.int64), tmp_path)
    with pytest.raises(PoolError, match="99999"):
        export(pool, [0, 99999], tmp_path)
