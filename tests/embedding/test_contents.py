"""A shard is what it contains: wherever it lies and whenever it was written, it is embedded once; any change
to its bytes is noticed.
"""

import gzip
import io
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.cache.artifacts import open_cache
from curated_data.embedding import ModuleEmbedder, embed_pool
from curated_data.embedding import contents as contents_module
from curated_data.embedding.contents import Contents
from curated_data.pipeline.curate import curate
from curated_data.pipeline.extend import extend
from curated_data.pool import ShardPool, build, import_archives
from curated_data.pool.known import Facts
from tests.support.counting import Counting, as_float
from tests.support.server import Server

SETTINGS = {"batch_size": 4, "num_workers": 0, "dtype": "float32"}


class Pool:
    """Embeds a pool in one cache and says how many images that took."""

    def __init__(self, cache):
        self.network, self.root = Counting(), open_cache(cache)
        self.embedder = ModuleEmbedder(self.network, as_float, dimension=3, name="mean colours")

    def embed(self, pool, **how):
        before = self.network.seen
        pool = pool if isinstance(pool, ShardPool) else ShardPool(pool, cache_dir=self.root)
        store = embed_pool(pool, self.embedder, self.root, **SETTINGS | how)
        return self.network.seen - before, store


@pytest.fixture
def cached(tmp_path):
    return Pool(tmp_path / "cache")


def moved(shards, folder):
    folder.mkdir(parents=True)
    return [shutil.move(shard, folder / f"other-{number}.tar") for number, shard in enumerate(shards)]


def copied(shards, folder):
    folder.mkdir(parents=True)
    return [shutil.copyfile(shard, folder / Path(shard).name) for shard in shards]


def mounted(shards, folder):
    folder.symlink_to(Path(shards[0]).parent, target_is_directory=True)
    return [folder / Path(shard).name for shard in shards]


def touched(shards, folder):
    for number, shard in enumerate(shards):
        os.utime(shard, (number, number))
    return shards


def rewritten(shards, folder):
    for shard in shards:
        content = Path(shard).read_bytes()
        Path(shard).unlink()
        Path(shard).write_bytes(content)
    return shards


def padded(shards, folder):
    """As by a tar that writes records of another length."""
    for shard in shards:
        with open(shard, "ab") as file:
            file.write(bytes(5120))
    return shards


@pytest.mark.parametrize("change", [moved, copied, mounted, touched, rewritten, padded])
def test_a_pool_that_was_moved_or_touched_is_not_embedded_again(write_pool, tmp_path, cached, caplog, change):
    shards = write_pool([5, 0, 6, 7])
    first = ShardPool(shards, cache_dir=cached.root)
    count, store = cached.embed(first)
    assert count == 18
    expected, name = store.as_array(), first.fingerprint
    with caplog.at_level(logging.INFO, logger=contents_module.__name__):
        pool = ShardPool(change(shards, tmp_path / "elsewhere" / "deep"
                                if change in (moved, copied) else tmp_path / "elsewhere"),
                         cache_dir=cached.root)  # fmt: skip
        count, again = cached.embed(pool)
    assert count == 0
    assert (again.fingerprint, pool.fingerprint) == (store.fingerprint, name)
    np.testing.assert_array_equal(again.as_array(), expected)
    assert "4 of 4 shards" in caplog.text  # were read, which is said
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=contents_module.__name__):
        assert cached.embed(ShardPool(pool.urls))[0] == 0
    assert not [r for r in caplog.records if r.name == contents_module.__name__]  # once


def test_an_unchanged_pool_is_not_read(write_pool, cached, monkeypatch):
    shards = write_pool([5, 6])
    _, store = cached.embed(shards)
    monkeypatch.setattr(build, "index_shard", None)
    monkeypatch.setattr(ShardPool, "read", None)
    assert cached.embed(shards)[1].fingerprint == store.fingerprint


def flip(path, place):
    """Invert a byte of a member's data; names and sizes stay, and so do the headers."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def data_places(path):
    with tarfile.open(path) as archive:
        return [place for m in archive for place in range(m.offset_data, m.offset_data + m.size)]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_byte_that_changed_is_noticed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    path = folder / "p.tar"
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for number in range(4):
            array = io.BytesIO()
            np.save(array, rng.integers(0, 9, (3, 2, 2)).astype(np.uint8))
            writer.write({"__key__": f"{number}", "npy": array.getvalue(), "txt": "a b"})
    cached = Pool(folder / "cache")
    how = {"decoders": {"npy": lambda content: torch.zeros((3, 2, 2), dtype=torch.uint8)}}
    count, store = cached.embed([path], **how)
    assert count == 4
    place = data.draw(st.sampled_from(data_places(path)))
    if data.draw(st.booleans(), label="moved too"):
        path = path.rename(folder / "q.tar")
    flip(path, place)
    os.utime(path, (1, 1))
    count, again = cached.embed([path], **how)
    assert count == 4
    assert again.fingerprint != store.fingerprint
    flip(path, place)
    os.utime(path, (2, 2))
    count, back = cached.embed([path], **how)
    assert (count, back.fingerprint) == (0, store.fingerprint)


def same_layout(folder, name, seed):
    """A shard whose keys, sizes and times are those of every other one made here."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / name), mtime=0) as writer:
        for number in range(4):
            array = io.BytesIO()
            np.save(array, rng.integers(0, 256, (3, 2, 2)).astype(np.uint8))
            writer.write({"__key__": f"{number}", "npy": array.getvalue()})
    return folder / name


def test_shards_with_equal_headers_are_told_apart(tmp_path, cached):
    how = {"decoders": {"npy": lambda content: torch.from_numpy(np.load(io.BytesIO(content)))}}
    shards = [same_layout(tmp_path / "a", f"{seed}.tar", seed) for seed in range(3)]
    count, store = cached.embed(shards, **how)
    assert count == 12
    assert len(np.unique(store.as_array(), axis=0)) == 12
    twin = same_layout(tmp_path / "b", "new.tar", 9)
    swapped = [shutil.copyfile(shards[number], tmp_path / "b" / f"{number}.tar") for number in (2, 0, 1)]
    count, again = cached.embed([*swapped, twin], **how)
    assert count == 4
    np.testing.assert_array_equal(
        again.as_array()[:12], store.as_array().reshape(3, 4, 3)[[2, 0, 1]].reshape(12, 3)
    )
    assert cached.embed([*swapped, twin], **how)[0] == 0


def test_a_shard_twice_in_a_pool_is_two_shards(write_pool, tmp_path, cached):
    (shard,) = write_pool([5])
    twin = shutil.copyfile(shard, tmp_path / "twin.tar")
    _, store = cached.embed([shard, twin])
    assert store.shape == (10, 3)
    np.testing.assert_array_equal(store.as_array()[:5], store.as_array()[5:])
    assert cached.embed([twin, shard])[0] == 0


def test_another_embedder_need_not_read_a_moved_pool_again(write_pool, tmp_path, cached, monkeypatch):
    shards = write_pool([5, 6])
    cached.embed(shards)
    pool = ShardPool(moved(shards, tmp_path / "elsewhere"), cache_dir=cached.root)
    cached.embed(pool)
    monkeypatch.setattr(Contents, "read", None)
    count, store = cached.embed(pool, dtype="float16")
    assert (count, store.shard_fingerprints) == (11, cached.embed(pool)[1].shard_fingerprints)


def test_samples_that_cannot_be_embedded_are_named_where_they_are_now(write_pool, tmp_path, cached):
    shards = write_pool([5, 6], bad={(1, 2): b"no image"})
    cached.embed(shards)
    now = moved(shards, tmp_path / "elsewhere")
    _, store = cached.embed(now)
    assert [failure["shard"] for failure in store.failures] == [str(now[1])]


def test_bytes_that_changed_behind_an_equal_time_are_noticed_when_embedded(write_pool, cached, caplog):
    """Where embeddings have to be made anyway."""
    (shard,) = write_pool([5])
    _, store = cached.embed([shard])
    status = os.stat(shard)
    flip(shard, data_places(shard)[-1])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    _, other = cached.embed([shard], dtype="float16")
    assert other.shard_fingerprints != store.shard_fingerprints
    assert "bytes have changed" in caplog.text
    assert cached.embed([shard])[0] == 5


def test_what_was_compressed_and_repacked_is_not_embedded_again(write_pool, tmp_path, cached):
    """Where its shards are the same ones."""
    shards = write_pool([5, 6])
    cached.embed(shards)
    repacked = []
    for number, shard in enumerate(shards):
        packed = Path(f"{shard}.gz")
        packed.write_bytes(gzip.compress(Path(shard).read_bytes()))
        repacked += import_archives(packed, tmp_path / f"repacked-{number}")
    assert cached.embed(repacked)[0] == 0


def test_a_part_of_a_pool_is_found_again_too(write_pool, tmp_path, cached):
    shards, ids = write_pool([5, 6, 4]), np.array([0, 3, 12])
    count, store = cached.embed(shards, ids=ids)
    assert count == 3
    now = moved(shards, tmp_path / "elsewhere")
    count, again = cached.embed(now, ids=ids)
    assert (count, again.fingerprint) == (0, store.fingerprint)
    assert cached.embed(now)[1].shard_fingerprints == store.shard_fingerprints


def test_remote_shards_are_known_by_what_they_contain(write_pool, tmp_path, cached):
    shards = write_pool([5, 6])
    (tmp_path / "served").mkdir()
    copies = [shutil.copyfile(shard, tmp_path / "served" / Path(shard).name) for shard in shards]
    server = Server(tmp_path / "served")
    try:
        urls = [f"{server.url}/{path.name}" for path in copies]
        assert cached.embed(shards)[0] == 11
        assert cached.embed(urls)[0] == 0  # uploaded
        for path in copies:
            os.utime(path, (5, 5))  # another ETag
        assert cached.embed(urls)[0] == 0
        flip(copies[1], data_places(copies[1])[0])
        os.utime(copies[1], (7, 7))
        assert cached.embed(urls)[0] == 6
    finally:
        server.close()


def _embed(shards, root, stuck=None):
    """Embed; or tell by a file of the third batch, and hang in it."""
    batches = itertools.count(1)

    def network(batch):
        if stuck and next(batches) == 3:
            stuck.touch()
            time.sleep(600)
        return batch.mean((2, 3))

    network.fingerprint = "mean colours"
    embedder = ModuleEmbedder(network, as_float, dimension=3, name="mean colours")
    embed_pool(ShardPool(shards, cache_dir=root), embedder, open_cache(root), **SETTINGS)


def test_runs_at_once_and_a_killed_one_end_in_the_same(write_pool, tmp_path):
    shards = write_pool([8] * 5)
    elsewhere = copied(shards, tmp_path / "elsewhere")
    alone, shared = Pool(tmp_path / "alone"), Pool(tmp_path / "shared")
    _, expected = alone.embed(shards)
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=_embed, args=(place, shared.root, stuck))
        for place, stuck in ((shards, tmp_path / "stuck"), (elsewhere, None), (shards, None))
    ]
    runs[0].start()
    while not (tmp_path / "stuck").exists():
        time.sleep(0.01)
    for run in runs[1:]:
        run.start()
    os.kill(runs[0].pid, signal.SIGKILL)
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [-signal.SIGKILL, 0, 0]
    for place in (shards, elsewhere):
        count, store = shared.embed(place)
        assert (count, store.fingerprint) == (0, expected.fingerprint)
        np.testing.assert_array_equal(store.as_array(), expected.as_array())


def test_odd_files_among_the_facts_are_ignored(tmp_path):
    facts = Facts(open_cache(tmp_path / "c"), "layouts")
    facts.add("a" * 20, "b" * 20)
    bucket = facts.folder / "aa"
    for name in ("..", "x", "a" * 41, f"{'a' * 20}-{'B' * 20}", f"{'a' * 20}-{'c' * 20}-{'d' * 20}", "a\n"):
        if name != "..":
            (bucket / name).touch()
    (facts.folder / "bb").write_text("no folder")
    assert list(facts.all()) == [("a" * 20, "b" * 20)]
    facts.add("a" * 20, "e" * 20)
    assert facts.starting("a" * 20) == [("a" * 20, "e" * 20)]


def test_curations_of_a_moved_pool_are_look_ups(write_pool, tmp_path):
    """Tree and selection too; `extend` finds old shards in other places, and only embeds what is new."""
    shards, cache = write_pool([20, 20]), tmp_path / "cache"
    config = {"levels": [{"n_clusters": 4}], "target_size": 10, "embedding": {"num_workers": 0}}
    network = Counting()
    embedder = ModuleEmbedder(network, as_float, dimension=3, name="mean colours")
    how = {"embedder": embedder, "cache_dir": cache}
    first = curate(shards, config, **how)
    now = moved(shards, tmp_path / "elsewhere")
    again = curate(now, config, **how)
    assert again.folders == first.folders
    assert network.seen == 40
    new = write_pool([10], name="new", seed=1)
    grown = extend([new[0], now[1], now[0]], config, tree=first.folders["tree"], **how)
    assert network.seen == 50
    assert grown.report["drift"]["n_old"] == 40
    parent = grown.tree.parent[1]
    np.testing.assert_array_equal(parent[10:], np.roll(first.tree.parent[1], 20))
