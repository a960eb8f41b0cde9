"""Errors that do not come from a sample's bytes stop the embedding, and are not kept as the sample's."""

import errno
import os
import signal

import numpy as np
import pytest
import torch

from curated_data.cache.artifacts import open_cache
from curated_data.embedding import ModuleEmbedder, embed_pool
from curated_data.embedding import batches as batches_module
from curated_data.errors import CuratedDataError, EmbedderError, PoolError, SampleError
from curated_data.pool import ShardPool
from curated_data.streaming.dataset import PoolDataset

PASSING = [
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    TimeoutError("of an alarm"),
    ImportError("no codec"),
]


def mean_colours(batch):
    return batch.mean((2, 3))


def as_float(image):
    return image.float() / 255


def failing_once(function, error, monkeypatch, *, at: int):
    """The function, of which one call raises, and no later one."""
    calls = []

    def once(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return function(*args, **options)

    return once


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_passing_error_stops_the_stage_and_the_next_run_has_all_samples(
    write_pool, tmp_path, monkeypatch, error, num_workers
):
    shards = write_pool([5, 6], bad={(1, 2): b"not an image"})
    root = open_cache(tmp_path / "c")
    embedder = ModuleEmbedder(mean_colours, as_float, dimension=3)

    def run():
        return embed_pool(
            ShardPool(shards), embedder, root, batch_size=2, num_workers=num_workers, dtype="float32"
        )

    decode = batches_module.decode_content
    with monkeypatch.context() as patched:
        patched.setattr(batches_module, "decode_content", failing_once(decode, error, patched, at=8))
        with pytest.raises(CuratedDataError) as caught:
            run()
    assert not isinstance(caught.value, SampleError)
    (folder,) = (root / "embeddings").iterdir()
    assert (
        len(list(folder.glob("*.npy"))) == 1
    )  # the first shard was complete; nothing of the second is there
    store = run()
    assert [failure["id"] for failure in store.failures] == [7]
    expected = embed_pool(
        ShardPool(shards), embedder, open_cache(tmp_path / "d"), num_workers=0, dtype="float32"
    )
    np.testing.assert_array_equal(np.asarray(store), np.asarray(expected))


def test_interrupts_pass(write_pool, tmp_path, monkeypatch):
    root = open_cache(tmp_path / "c")
    decode = batches_module.decode_content
    monkeypatch.setattr(
        batches_module, "decode_content", failing_once(decode, KeyboardInterrupt(), monkeypatch, at=3)
    )
    embedder = ModuleEmbedder(mean_colours, as_float, dimension=3)
    with pytest.raises(KeyboardInterrupt):
        embed_pool(ShardPool(write_pool([5])), embedder, root, num_workers=0)
    assert not list(root.glob("embeddings/*/*.npy"))


def test_a_preprocess_that_runs_out_of_memory(write_pool, tmp_path):
    """The same rule as for decoders."""
    calls = []

    def preprocess(image):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        if len(calls) == 2:
            raise ValueError("too dark")
        return image.float()

    embedder = ModuleEmbedder(mean_colours, preprocess, dimension=3)
    with pytest.raises(CuratedDataError, match=r"sample '000/0003'.*MemoryError"):
        embed_pool(ShardPool(write_pool([5])), embedder, open_cache(tmp_path / "c"), num_workers=0)


def test_a_worker_of_another_loader_that_dies_while_the_network_runs(write_pool, tmp_path):
    """Torch raises it from a signal's handler, in whatever Python is doing; here, in the embedder."""

    def network(batch):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    embedder = ModuleEmbedder(network, as_float, dimension=3)
    with pytest.raises(CuratedDataError, match=r"pid 7\b.*killed") as caught:
        embed_pool(ShardPool(write_pool([5])), embedder, open_cache(tmp_path / "c"), num_workers=0)
    assert not isinstance(caught.value, EmbedderError)


def test_a_real_signal_of_a_dead_worker_is_no_samples(write_pool, tmp_path):
    """A worker of an unrelated loader is killed while this process decodes."""

    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 1 << 20

        def __getitem__(self, item):
            return os.getpid()

    other = iter(torch.utils.data.DataLoader(Endless(), num_workers=1, batch_size=None))
    worker = next(other)

    def preprocess(image):
        os.kill(worker, signal.SIGKILL)
        for _ in range(20_000_000):  # until the signal arrives
            pass
        return image.float()

    embedder = ModuleEmbedder(mean_colours, preprocess, dimension=3)
    root = open_cache(tmp_path / "c")
    with pytest.raises(CuratedDataError, match="DataLoader worker"):
        embed_pool(ShardPool(write_pool([3])), embedder, root, num_workers=0)
    assert not list(root.glob("embeddings/*/*.npy"))
    del other


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_streaming_skips_no_sample_for_them(write_pool, error):
    dataset = PoolDataset(
        ShardPool(write_pool([4])), decoders={"png": failing_once(int, error, None, at=1)}, on_error="skip"
    )
    with pytest.raises(type(error)) as caught:
        dataset.__getitems__([0, 1])
    assert caught.value is error


def test_a_disk_that_fails_is_the_shards(write_pool, monkeypatch):
    pool, other = ShardPool(write_pool([4])), ShardPool(write_pool([3], name="other"))
    len(pool)

    def fails(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(PoolError, match=r"other-000\.tar.*Input/output error"):
        len(other)
    monkeypatch.setattr(pool._reader, "maps", False)
    with pytest.raises(PoolError, match=r"pool-000\.tar.*Input/output error"):
        pool.read([0])
