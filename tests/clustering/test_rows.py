"""Rows that are read ahead are the same rows, in the same order, and few at a time."""

import threading
import time

import numpy as np
import pytest
import torch

from curated_data.clustering import Level, hierarchical_kmeans, kmeans
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.lloyd import segment_sums
from tests.oracles.clustering import clouds


class Source:
    """An array on a disk: notes who reads it."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self.reads, self.lock = [], threading.Lock()

    def __len__(self):
        return len(self.array)

    def __getitem__(self, which):
        with self.lock:
            self.reads.append(threading.current_thread().name)
        return self.array[which]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("positions", [None, np.arange(0, 50_000, 3), np.array([7, 3, 49_998])])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rows_read_ahead_are_those_held(threads, positions, metric):
    x = clouds(50_000, 5, 20, seed=0)
    x[11] = np.nan  # so that rows have ids of their own
    settings = {"metric": metric, "device": "cpu", "valid": None, "nonfinite": "exclude"}
    held = prepare(x, max_memory=None, **settings).hold()
    source = Source(x)
    read = prepare(source, max_memory=3000, **settings).hold()
    assert held.held
    assert not read.held
    source.reads.clear()

    def work(start, stop, block):
        return start, stop, block.numpy().copy()

    found, expected = (rows.map(work, 512, positions) for rows in (read, held))
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    for (_, _, ours), (_, _, theirs) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert {name.rpartition("_")[0] for name in source.reads} == {"curated-data-read"}
    assert len(source.reads) == len(found)


def test_reading_and_working_overlap_and_few_blocks_are_ahead(threads):
    """While some blocks are worked on, the one after them is read."""
    source = Source(np.zeros((20 * 64, 2), np.float32))
    rows = prepare(source, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=100)
    source.reads.clear()
    ahead, limit = [], time.monotonic() + 60

    def work(start, stop, block):
        ahead.append(len(source.reads) - len(ahead))
        while len(source.reads) <= len(ahead) < 20:
            assert time.monotonic() < limit, "nothing is read ahead"
            time.sleep(0.001)

    rows.map(work, 64)
    assert max(ahead) <= 2 * threads  # one is read ahead, and each thread may have taken one


def test_a_read_that_fails_says_so():
    class Broken(Source):
        def __getitem__(self, which):
            if len(self.reads) > 5:
                raise OSError("the disk is gone")
            return super().__getitem__(which)

    source = Broken(np.zeros((100_000, 2), np.float32))
    with pytest.raises(OSError, match="the disk is gone"):
        kmeans(source, 5, max_memory=3000)
    assert kmeans(Source(np.zeros((100_000, 2), np.float32)), 5, max_memory=3000).inertia == 0


def test_a_tree_over_rows_on_disk_is_that_over_rows_in_memory(tmp_path, threads):
    """Up to the order of float64 sums, and seeded on as many rows."""
    x = clouds(20_000, 8, 100, seed=0)
    np.save(tmp_path / "x.npy", x)
    levels = [Level(60, 2, 30), Level(8)]
    held = hierarchical_kmeans(x, levels, seed=0, seeding_rows=2000)
    read = hierarchical_kmeans(
        np.load(tmp_path / "x.npy", mmap_mode="r"), levels, seed=0, seeding_rows=2000, max_memory=200_000
    )
    for level in held.centroids:
        np.testing.assert_array_equal(read.parent[level], held.parent[level])
        np.testing.assert_allclose(read.centroids[level], held.centroids[level], rtol=1e-6, atol=1e-6)


def test_sums_of_segments_on_the_processor_are_those_of_an_accelerator():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=(1000, 7)).astype(np.float32))
    first = np.concatenate([[0], np.sort(rng.choice(np.arange(1, 1000), 99, replace=False))])
    lengths = torch.from_numpy(np.diff(first, append=1000))
    theirs = torch.segment_reduce(values.double(), "sum", lengths=lengths, axis=0)
    np.testing.assert_allclose(segment_sums(values, first), theirs.numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_read_ahead_to_the_gpu_are_those_held(dtype):
    x = clouds(200_000, 64, 20, seed=0).astype(dtype)
    settings = {"metric": "cosine", "device": "cuda", "valid": None, "nonfinite": "raise"}
    held, read = (prepare(x, max_memory=m, **settings).hold() for m in (None, 3000))
    assert held.budget == torch.cuda.get_device_properties(0).total_memory // 12
    for _ in range(3):
        found, expected = (rows.map(lambda a, b, block: block * 2, 4096) for rows in (read, held))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    values = held.block(0, 5000)
    first = np.arange(0, 5000, 50)
    np.testing.assert_allclose(segment_sums(values, first), segment_sums(values.cpu(), first), rtol=1e-12)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_blocks_without_a_valid_row_are_not_read(metric):
    """So that a grown pool's old rows are not read again to place the new ones."""
    x = clouds(100_000, 4, 10, seed=0)
    x[70_001] = np.nan
    valid = np.zeros(len(x), bool)
    valid[70_000:71_000] = True
    read = []

    class Watched(Source):
        def __getitem__(self, which):
            read.append(which)
            return super().__getitem__(which)

    rows, plain = (
        prepare(source, metric=metric, device="cpu", valid=valid, nonfinite="exclude", max_memory=None)
        for source in (Watched(x), x)
    )
    assert [(part.start, part.stop) for part in read] == [(65_536, 81_920)]
    np.testing.assert_array_equal(rows.ids, np.setdiff1d(np.arange(70_000, 71_000), 70_001))
    np.testing.assert_array_equal(rows.ids, plain.ids)
    if metric == "l2":
        np.testing.assert_allclose(rows.frame.mean, np.delete(x[70_000:71_000], 1, 0).mean(0), rtol=1e-5)
