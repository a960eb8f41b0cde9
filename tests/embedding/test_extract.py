"""Embedding a pool: right rows, counted failures, and the same result whoever does the work and whenever it
stops.
"""

import io
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from curated_data.cache import open_cache
from curated_data.embedding import EmbeddingStore, ModuleEmbedder, embed_pool, resolve_embedder
from curated_data.errors import CacheError, EmbedderError
from curated_data.pool import ShardPool


def mean_colours(batch):
    """A (B, 3) embedding that can be checked by hand."""
    return batch.mean((2, 3))


def as_float(image):
    """Images in 0..1, at their own size."""
    return image.float() / 255


@pytest.fixture
def embedder():
    return ModuleEmbedder(mean_colours, as_float, dimension=3)


def test_rows_are_the_pools_images_in_order(write_pool, tmp_path, embedder):
    pool = ShardPool(write_pool([10, 0, 7]))
    store = embed_pool(
        pool, embedder, open_cache(tmp_path / "c"), batch_size=4, num_workers=0, dtype="float32"
    )
    expected = [
        np.asarray(Image.open(io.BytesIO(sample["png"])), np.float64).mean((0, 1)) / 255
        for sample in pool.read(np.arange(17))
    ]
    assert store.shape == (17, 3)
    np.testing.assert_allclose(np.asarray(store), expected, rtol=1e-6)
    ids = np.array([16, 0, 9, 9, 3])
    np.testing.assert_array_equal(store.rows(ids), np.asarray(store)[ids])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.blocks()]), np.asarray(store))
    for which in (
        slice(None),
        slice(3, 12),
        slice(9, 11),
        slice(10, 10),
        slice(-4, None),
        slice(0, 17, 5),
        ids,
    ):
        np.testing.assert_array_equal(store[which], np.asarray(store)[which])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).rows(ids), store.rows(ids))
    with pytest.raises(IndexError, match=r"0\.\.16, found 0\.\.17"):
        store.rows([0, 17])
    assert store.valid.all()
    assert store.failures == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_are_counted_and_named(write_pool, tmp_path, num_workers):
    shards = write_pool([6, 5], bad={(0, 2): b"not an image", (1, 0): b"", (1, 4): b"\x89PNG\r\n\x1a\n"})

    def grows(batch):
        values = batch.mean((2, 3))
        values[:, 0] = torch.where(
            values[:, 1] > values[:, 1].median(), 1e6, values[:, 0]
        )  # more than float16 holds
        return values

    pool = ShardPool(shards)
    embedder = ModuleEmbedder(grows, as_float, dimension=3)
    store = embed_pool(
        pool, embedder, open_cache(tmp_path / "c"), batch_size=3, num_workers=num_workers, dtype="float16"
    )
    failures = {failure["id"]: failure for failure in store.failures}
    assert {2, 6, 10} <= set(failures)
    assert len(failures) > 3
    assert sorted(failures) == np.flatnonzero(~store.valid).tolist()
    for number, failure in failures.items():
        assert failure["key"] == pool.keys([number])[0]
        assert failure["shard"] == shards[number >= 6]
        assert failure["reason"]
        if number not in (2, 6, 10):
            assert failure["reason"] == "its embedding is not finite"
    assert np.isfinite(np.asarray(store)).all()
    assert (np.asarray(store)[~store.valid] == 0).all()


def test_second_call_and_new_shards_embed_only_what_is_missing(write_pool, tmp_path):
    seen = []

    class Counting(torch.nn.Module):
        fingerprint = "counting"

        def forward(self, batch):
            seen.append(len(batch))
            return batch.mean((2, 3))

    embedder = ModuleEmbedder(Counting(), as_float, dimension=3)
    shards = write_pool([5, 6, 7])
    root = open_cache(tmp_path / "c")
    settings = {"batch_size": 100, "num_workers": 0}
    first = embed_pool(ShardPool(shards[:2]), embedder, root, **settings)
    assert seen == [5, 6]
    embed_pool(ShardPool(shards[:2]), embedder, root, **settings)
    assert seen == [5, 6]
    grown = embed_pool(ShardPool(shards), embedder, root, **settings)
    assert seen == [5, 6, 7]
    np.testing.assert_array_equal(np.asarray(grown)[:11], np.asarray(first))
    assert grown.fingerprint != first.fingerprint
    os.utime(shards[1], (1, 1))
    embed_pool(ShardPool(shards), embedder, root, **settings)
    assert seen == [5, 6, 7, 6]


def _slow(batch):
    time.sleep(0.02)
    return batch.mean((2, 3))


def _embed(shards, root, log):
    store = embed_pool(
        ShardPool(shards),
        ModuleEmbedder(_slow, as_float, dimension=3),
        open_cache(root),
        batch_size=4,
        num_workers=0,
    )
    np.save(log, np.asarray(store))


def test_killed_and_shared_work_ends_in_the_same_rows(write_pool, tmp_path):
    """Two processes share the shards, one is killed midway, a third comes late: all read the same rows."""
    shards = write_pool([12] * 6)
    embedder = ModuleEmbedder(_slow, as_float, dimension=3)
    alone = embed_pool(ShardPool(shards), embedder, open_cache(tmp_path / "a"), batch_size=4, num_workers=0)
    context = multiprocessing.get_context("fork")
    root = tmp_path / "b"
    torch.set_num_threads(1)
    processes = [
        context.Process(target=_embed, args=(shards, root, tmp_path / f"{number}.npy")) for number in range(3)
    ]
    processes[0].start()
    processes[1].start()
    while not list(root.glob("embeddings/*/*.json")):
        time.sleep(0.005)
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[2].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    for number in (1, 2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), np.asarray(alone))


def test_wrong_embedders_stop_at_once(write_pool, tmp_path):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    with pytest.raises(EmbedderError, match=r"gave shape \(4, 3\), expected \(4, 5\)"):
        embed_pool(pool, ModuleEmbedder(mean_colours, as_float, dimension=5), root, num_workers=0)
    crop = iter(range(100))

    def uneven(image):
        return image.float()[:, : 1 + next(crop) % 2]

    uneven.fingerprint = "uneven"
    with pytest.raises(EmbedderError, match="must fix the size"):
        embed_pool(pool, ModuleEmbedder(mean_colours, uneven, dimension=3), root, num_workers=0)


def test_damaged_files_of_the_store_are_named(write_pool, tmp_path, embedder):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    store = embed_pool(pool, embedder, root, num_workers=0)
    array = store.folder / f"{pool.shard_fingerprints[0]}.npy"
    array.write_bytes(array.read_bytes()[:40])
    again = EmbeddingStore(store.folder, pool.shard_fingerprints, 3, "float16")
    with pytest.raises(CacheError, match=r"remove the shard's .npy and .json there"):
        again.rows([0])


def test_real_images_separate_by_class(fashion_train, tmp_path):
    """Same-class images are nearer each other than others, by EfficientNet-Lite0 on one real shard."""
    from sklearn.neighbors import KNeighborsClassifier

    pool = ShardPool(fashion_train[:1])
    store = embed_pool(pool, resolve_embedder("efficientnet_lite0:32"), open_cache(tmp_path), num_workers=2)
    x, labels = store.as_array(), pool.labels(np.arange(len(pool)))
    half = len(x) // 2
    accuracy = (
        KNeighborsClassifier(5, metric="cosine").fit(x[:half], labels[:half]).score(x[half:], labels[half:])
    )
    assert accuracy > 0.7
