"""The pool: what its names stand for, reading in any order, and what it refuses."""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from curated_data.cache.locks import locked
from curated_data.errors import PoolError, SampleError
from curated_data.pool import ShardPool, build
from curated_data.pool.index import index_shard


def test_a_folder_of_many_shards(tmp_path):
    """As many as are looked at by several threads: in order, and each missing one is named."""
    paths = [tmp_path / f"p-{number:04d}.tar" for number in range(1000)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number))
    pool = ShardPool(tmp_path / "p-{0000..0999}.tar")
    assert pool.urls == list(map(str, paths))
    assert [shard.size for shard in pool.shards] == list(range(1000))
    paths[700].unlink()
    with pytest.raises(PoolError, match=r"p-0700\.tar.*1 of the 1000"):
        ShardPool(tmp_path / "p-{0000..0999}.tar")


def everything(pool: ShardPool) -> list[dict]:
    return pool.read(np.arange(len(pool)))


def test_reads_what_webdataset_reads(small_pool, read_by_webdataset):
    pool = ShardPool(small_pool)
    expected = [sample for path in small_pool for sample in read_by_webdataset(path)]
    assert everything(pool) == expected
    assert len(pool) == 9
    assert pool.shard_ranges().tolist() == [0, 5, 5, 9]
    assert pool.shard_of([8, 0, 5, 4]).tolist() == [2, 0, 2, 0]
    assert pool.keys([3, 3, 0]) == ["key003", "key003", "key000"]


def test_reads_in_the_order_asked_with_repeats(small_pool):
    pool = ShardPool(small_pool)
    ids = np.array([7, 0, 7, 3, 8, 0])
    samples = pool.read(ids)
    assert [sample["__key__"] for sample in samples] == [f"key{i:03d}" for i in ids]
    assert samples == [pool.read([i])[0] for i in ids]
    samples[0]["txt"] = b"changed"  # repeats do not share a dict
    assert samples[2]["txt"] != b"changed"
    assert pool.read([]) == []


def test_reads_only_the_extensions_asked_for(small_pool):
    pool = ShardPool(small_pool)
    pool.read([0])
    before = pool.counters.bytes_needed
    first, last = pool.read([0, 8], ["CLS", "png"])
    assert first == {"__key__": "key000", "__url__": str(small_pool[0]), "cls": b"0"}
    assert last == {"__key__": "key008", "__url__": str(small_pool[2]), "__members__": ["txt"]}
    assert pool.counters.bytes_needed - before == 1
    assert pool.read([0], "cls") == [first]
    assert pool.sizes([0, 8, 1]).tolist() == [8, 63, 15]
    assert pool.sizes([8, 1], ["cls"]).tolist() == [0, 1]
    with pytest.raises(PoolError, match=r"'jpg' or 'jpeg'.*'txt', 'cls'"):
        pool.read([0], ["jpg", "jpeg"])


def test_labels(small_pool, write_tar):
    pool = ShardPool(small_pool)
    assert pool.labels(np.arange(9)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, -1]
    assert pool.labels([8, 1, 1]).tolist() == [-1, 1, 1]
    assert ShardPool(write_tar("plain.tar", [("a.jpg", b"")])).labels([0]).tolist() == [-1]
    bad = ShardPool(write_tar("bad.tar", [("a.cls", b" 7\n"), ("b.cls", b"cat")]))
    assert bad.labels([0]).tolist() == [7]
    with pytest.raises(SampleError, match=r"bad\.tar: sample 'b': .*cls.*b'cat'"):
        bad.labels([0, 1])


@pytest.mark.parametrize("ids", [[9], [-1], [0, 100]])
def test_ids_outside_the_pool_are_refused(small_pool, ids):
    with pytest.raises(PoolError, match=rf"id {ids[-1]} .* 0 to 8"):
        ShardPool(small_pool).read(ids)


@pytest.mark.parametrize("ids", [[0.5], [[1, 2]], ["a"]])
def test_ids_that_are_no_list_of_integers_are_refused(small_pool, ids):
    with pytest.raises(PoolError, match=f"^ids .*{np.asarray(ids).dtype}"):
        ShardPool(small_pool).read(ids)


class TestUrls:
    def test_every_way_to_name_the_same_pool(self, small_pool):
        folder = small_pool[0].parent
        expected = [str(path) for path in small_pool]
        for urls in (
            str(folder / "pool-{000000..000002}.tar"),
            str(folder / "pool-*.tar"),
            folder / "pool-?????[0-2].tar",
            [str(folder / "pool-{000000,000001}.tar"), small_pool[2]],
            "file://" + str(folder / "*.tar"),
            str(folder) + "/**/pool-*.tar",
        ):
            assert ShardPool(urls).urls == expected

    def test_the_order_is_as_given_and_sorted_in_a_glob(self, small_pool):
        assert ShardPool(small_pool[::-1]).urls == [str(path) for path in small_pool[::-1]]

    def test_a_file_may_be_called_like_a_pattern(self, write_tar):
        path = write_tar("odd[1]{a,b}*.tar", [("a.jpg", b"x")])
        assert ShardPool(path).urls == [str(path)]

    @pytest.mark.parametrize("pattern", ["pool-*.tar", "pool-{000000..000002}.tar", "pool-00000[0-2].tar"])
    def test_a_folder_may_be_called_like_a_pattern(self, small_pool, tmp_path, pattern):
        folder = tmp_path / "runs [1] ü"
        other = tmp_path / "runs 1 ü"  # what a pattern would find
        for place in (folder, other):
            place.mkdir()
        for path in small_pool:
            shutil.copy(path, folder)
        shutil.copy(small_pool[0], other)
        assert ShardPool(folder / pattern).urls == [str(folder / path.name) for path in small_pool]

    @pytest.mark.parametrize(
        ("urls", "message"),
        [
            ([], "the pool is empty"),
            ("pol-*.tar", r"pol-\*\.tar'.*'pool-0"),
            ("pool-{000001..000003}.tar", r"'pool-000003\.tar'.*1 of the 3 "),
            ("nowhere/pool-*.tar", "'nowhere'"),
            (".", r"'\./\*\.tar'"),
            (["pool-000000.tar", "pool-{000000..000001}.tar"], r"^pool-000000\.tar: .*twice"),
            ("pipe:cat pool-000000.tar", "`curated-data import 'pipe:cat pool-000000.tar' NEW`"),
            ([3], r"3 \(int\)"),
        ],
    )
    def test_bad_urls(self, small_pool, monkeypatch, urls, message):
        monkeypatch.chdir(small_pool[0].parent)
        with pytest.raises(PoolError, match=message):
            ShardPool(urls)


def test_a_pool_without_samples_is_refused(write_tar, tmp_path):
    pool = ShardPool(write_tar("none.tar", [("README", b"text")]), cache_dir=tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(PoolError, match=r"none\.tar"):
            len(pool)


def test_duplicate_keys_are_counted_and_reported_once(write_tar, caplog, tmp_path):
    paths = [write_tar(f"{i}.tar", [("0000.jpg", b"a"), (f"x{i}.jpg", b"b")]) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        pool = ShardPool(paths, cache_dir=tmp_path / "cache")
        assert (pool.index().n_duplicate_keys, pool.index().duplicate_example) == (2, "0000")
    assert caplog.text.count("2 of 6 samples have the key of an earlier one, for example '0000'") == 1
    caplog.clear()
    again = ShardPool(paths, cache_dir=tmp_path / "cache")
    assert again.index().n_duplicate_keys == 2
    assert not caplog.text


class TestFaults:
    """A shard that is no longer what was indexed is an error that names it, read before or not."""

    @pytest.mark.parametrize("was_read", [False, True])
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes()[:4096]),
            lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
            lambda path: os.utime(path, ns=(1, 1)),
            lambda path: os.replace(shutil.copy(path, f"{path}.new"), path),
        ],
        ids=["removed", "shortened", "grown", "touched", "replaced"],
    )
    def test_after_indexing(self, small_pool, spoil, was_read):
        pool = ShardPool(small_pool)
        len(pool)
        if was_read:
            pool.read([6])
        spoil(small_pool[2])
        assert pool.read([1])[0]["__key__"] == "key001"  # the others are still there
        with pytest.raises(PoolError, match=f"{small_pool[2]}: .* since"):
            pool.read([1, 6])

    def test_before_indexing(self, small_pool, tmp_path):
        pool = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        assert pool.shards
        small_pool[0].write_bytes(small_pool[0].read_bytes() + bytes(512))
        with pytest.raises(PoolError, match=r"pool-000000\.tar: changed"):
            pool.index()

    def test_a_bad_shard_loses_nothing_of_the_others(self, small_pool, tmp_path, monkeypatch):
        good = small_pool[1].read_bytes()
        small_pool[1].write_bytes(b"no tar" * 200)
        with pytest.raises(PoolError, match=r"pool-000001\.tar: .*b'no tar"):
            len(ShardPool(small_pool, cache_dir=tmp_path / "cache", num_workers=2))
        small_pool[1].write_bytes(good)
        indexed = []
        monkeypatch.setattr(
            build, "index_shard", lambda source: indexed.append(source.name) or index_shard(source)
        )
        assert len(ShardPool(small_pool, cache_dir=tmp_path / "cache", num_workers=1)) == 9
        assert str(small_pool[0]) not in indexed


class TestCache:
    def test_same_pool_with_and_without(self, small_pool, tmp_path):
        plain = ShardPool(small_pool)
        cached = plain.with_cache(tmp_path / "cache")
        assert everything(cached) == everything(plain)
        assert cached.fingerprint == plain.fingerprint
        assert cached.shard_fingerprints == plain.shard_fingerprints
        assert plain.cache_dir is None
        folders = {path.name for path in (tmp_path / "cache" / "index").iterdir() if path.name[0] != "."}
        assert folders == set(plain.shard_fingerprints)
        assert all(len(name) == 20 for name in folders)

    def test_a_pool_without_a_cache_uses_the_index_of_the_same_with_one(
        self, small_pool, tmp_path, monkeypatch
    ):
        plain = ShardPool(small_pool)
        cached = plain.with_cache(tmp_path / "cache")
        assert cached.with_cache(tmp_path / "cache") is cached
        assert len(cached) == 9
        for name in ("build_in_memory", "build_in_cache", "stat_shards"):
            monkeypatch.setattr(f"curated_data.pool.shards.{name}", None)
        assert everything(plain) == everything(cached)
        assert everything(pickle.loads(pickle.dumps(plain))) == everything(cached)
        assert len(pickle.dumps(plain)) < 5_000

    def test_an_index_of_shards_that_changed_is_not_taken_over(self, small_pool, tmp_path, write_tar):
        plain = ShardPool(small_pool)
        cached = plain.with_cache(tmp_path / "cache")
        assert len(plain.shards) == 3
        small_pool[2].write_bytes(write_tar("other.tar", [("new.txt", b"new")]).read_bytes())
        cached.index()
        assert plain._index is None

    def test_a_second_look_indexes_nothing(self, small_pool, tmp_path, monkeypatch):
        len(ShardPool(small_pool, cache_dir=tmp_path / "cache"))
        monkeypatch.setattr(build, "index_shard", None)
        assert len(ShardPool(small_pool, cache_dir=tmp_path / "cache")) == 9

    def test_a_pool_that_grows_indexes_the_new_shard_alone(
        self, small_pool, write_tar, tmp_path, monkeypatch
    ):
        len(ShardPool(small_pool, cache_dir=tmp_path / "cache"))
        new = write_tar("pool-000003.tar", [("new.txt", b"new")])
        indexed = []
        monkeypatch.setattr(
            build, "index_shard", lambda source: indexed.append(source.name) or index_shard(source)
        )
        pool = ShardPool([*small_pool, new], cache_dir=tmp_path / "cache")
        assert pool.read([9])[0]["txt"] == b"new"
        assert indexed == [str(new)]

    def test_a_changed_shard_is_indexed_again(self, small_pool, write_tar, tmp_path):
        first = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        len(first)
        write_tar(small_pool[1].name, [("extra.txt", b"extra")])
        second = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        assert len(second) == 10
        assert second.read([5])[0]["__key__"] == "extra"
        same = [a == b for a, b in zip(first.shard_fingerprints, second.shard_fingerprints)]
        assert same == [True, False, True]
        assert first.fingerprint != second.fingerprint

    def test_parallel_indexing_gives_the_same(self, small_pool, tmp_path):
        serial = ShardPool(small_pool).index()
        for pool in (
            ShardPool(small_pool, num_workers=2),
            ShardPool(small_pool, num_workers=2, cache_dir=tmp_path),
        ):
            index = pool.index()
            assert index.keys() == serial.keys()
            assert np.array_equal(index.member_offset, serial.member_offset)

    def test_processes_share_the_work(self, small_pool, tmp_path, monkeypatch):
        """Two runs at once, and a shard that a third process holds: each is indexed once."""
        journal = tmp_path / "journal"
        monkeypatch.setattr(build, "index_shard", lambda source: _noted(source, journal))
        pool = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        processes = multiprocessing.get_context("fork")
        results = processes.Queue()
        with locked(tmp_path / "cache" / "index" / pool.shards[1].fingerprint):
            runs = [processes.Process(target=lambda: results.put(len(pool))) for _ in range(2)]
            for run in runs:
                run.start()
            while not journal.exists() or len(journal.read_text().split()) < 2:
                time.sleep(0.01)
        assert [results.get(timeout=60) for _ in runs] == [9, 9]
        for run in runs:
            run.join()
        assert sorted(journal.read_text().split()) == [str(path) for path in small_pool]

    def test_a_killed_run_goes_on(self, small_pool, tmp_path, monkeypatch):
        """Killed while it indexes the last shard, the next run indexes that one alone."""
        journal = tmp_path / "journal"
        monkeypatch.setattr(
            build, "index_shard", lambda source: _noted(source, journal, last=str(small_pool[2]))
        )
        pool = ShardPool(small_pool, cache_dir=tmp_path / "cache", num_workers=1)
        run = multiprocessing.get_context("fork").Process(target=lambda: len(pool))
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        monkeypatch.setattr(build, "index_shard", lambda source: _noted(source, journal))
        assert len(pool) == 9
        assert journal.read_text().split() == [str(path) for path in small_pool]


def _noted(source, journal, last=None):
    """Index a shard and note its name; die at the `last`."""
    if source.name == last:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(journal, "a") as file:
        file.write(f"{source.name}\n")
    return index_shard(source)


class TestWorkers:
    def test_pickles_small_and_without_open_files(self, small_pool, tmp_path):
        pool = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        expected = everything(pool)
        data = pickle.dumps(pool)
        assert len(data) < 3000
        copy = pickle.loads(data)
        assert everything(copy) == expected
        in_memory = pickle.loads(pickle.dumps(ShardPool(small_pool)))
        assert everything(in_memory) == expected

    @pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_reads_in_worker_processes(self, small_pool, tmp_path, method):
        pool = ShardPool(small_pool, cache_dir=tmp_path / "cache")
        pool.read([0])  # a file is open in the parent
        with multiprocessing.get_context(method).Pool(1) as workers:
            assert workers.map(pool.read, [[0, 8], [4]]) == [pool.read([0, 8]), pool.read([4])]

    def test_files_stay_bounded_over_many_shards(self, write_tar):
        paths = [write_tar(f"{i:03d}.tar", [(f"{i}.txt", str(i).encode())]) for i in range(60)]
        pool = ShardPool(paths)
        pool._reader.max_open = 7
        names = set(map(os.path.realpath, paths))

        def n_open() -> int:  # of these shards alone: the collector may close what earlier tests left open
            opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
            return max(sum(name in names for name in found) for found in (opened, mapped))

        rng = np.random.default_rng(0)
        for _ in range(5):
            ids = rng.permutation(60)
            assert [int(sample["txt"]) for sample in pool.read(ids)] == ids.tolist()
            assert 0 < n_open() <= 7
        pool.close()
        assert n_open() == 0

    def test_threads_share_a_pool(self, small_pool):
        pool = ShardPool(small_pool)
        pool._reader.max_open = 1
        expected = everything(pool)
        with ThreadPoolExecutor(4) as threads:
            for found in threads.map(
                lambda seed: (seed, pool.read(np.random.default_rng(seed).permutation(9))), range(200)
            ):
                order = np.random.default_rng(found[0]).permutation(9)
                assert found[1] == [expected[i] for i in order]


def test_relative_and_absolute_paths_name_the_same_shard(small_pool, monkeypatch):
    absolute = ShardPool(small_pool).fingerprint
    monkeypatch.chdir(small_pool[0].parent)
    assert ShardPool([Path(path.name) for path in small_pool]).fingerprint == absolute


@pytest.mark.parametrize("cached", [True, False])
def test_a_relative_pool_stays_where_it_was(small_pool, tmp_path, monkeypatch, cached):
    """When the process changes its working directory, before the pool is first looked at and after."""
    expected = everything(ShardPool(small_pool))
    place = tmp_path / "here"
    place.mkdir()
    for path in small_pool:
        shutil.copy(path, place)
    monkeypatch.chdir(place)
    names = [path.name for path in small_pool]
    pools = [ShardPool(names, cache_dir="cache" if cached else None) for _ in range(2)]
    assert len(pools[0]) == 9
    monkeypatch.chdir(tmp_path)
    for pool in pools:
        assert [sample["__url__"] for sample in pool.read([0, 8])] == [names[0], names[-1]]
        assert [without_url(s) for s in pool.read(range(9))] == [without_url(s) for s in expected]
    assert (place / "cache").is_dir() == cached
    assert not (tmp_path / "cache").exists()


def without_url(sample):
    return {name: value for name, value in sample.items() if name != "__url__"}
