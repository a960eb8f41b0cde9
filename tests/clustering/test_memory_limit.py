"""A memory limit may cost time, never quality: results are the same to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.clustering import Level, hierarchical_kmeans, kmeans
from tests.oracles.clustering import clouds


def assert_same(a, b):
    np.testing.assert_array_equal(a.assignment, b.assignment)
    np.testing.assert_array_equal(a.centroids, b.centroids)
    np.testing.assert_array_equal(a.distance, b.distance)
    assert a.inertia == b.inertia
    assert a.n_iter == b.n_iter


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 7), st.integers(1, 300), st.sampled_from(["l2", "cosine"]), st.integers(1, 40),
    st.sampled_from([np.float16, np.float32, np.float64]), st.integers(0, 5),
)  # fmt: skip
def test_any_limit_gives_the_same(magnitude, k, metric, d, dtype, seed):
    x = clouds(4000, d, 50, seed=seed).astype(dtype)
    x[::97] = np.nan
    free = kmeans(x, k, metric=metric, seed=seed, n_iter=15)
    assert_same(free, kmeans(x, k, metric=metric, seed=seed, n_iter=15, max_memory=10**magnitude))


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("k", "d"), [(150, 16), (1100, 7), (3000, 16)])
def test_many_clusters_under_any_limit_are_those_without(k, d, threads):
    """In cells and neighbourhoods, on several threads: some of the arrays fit, or none."""
    rng = np.random.default_rng(0)
    middle = 10 * rng.normal(size=(k, d))
    x = (middle[rng.integers(0, k, 12_000)] + rng.normal(size=(12_000, d))).astype(np.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        free = kmeans(x, k, seed=0)
        for memory in (1, 3 * 4 * d * 7_000, 3 * 4 * d * 12_000):
            assert_same(free, kmeans(x, k, seed=0, max_memory=memory))
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
def test_a_tree_under_any_limit_is_that_without():
    x = clouds(9000, 8, 100, seed=0)
    for levels in ([Level(1200, 2, 3), Level(100, 1, 5), Level(9)], [Level(12, n_splits=20), Level(12)]):
        free = hierarchical_kmeans(x, levels, seed=1)
        for memory in (1, 200_000):
            limited = hierarchical_kmeans(x, levels, seed=1, max_memory=memory)
            for level in free.centroids:
                np.testing.assert_array_equal(free.parent[level], limited.parent[level])
                np.testing.assert_array_equal(free.centroids[level], limited.centroids[level])
            np.testing.assert_array_equal(free.distance, limited.distance)


def test_a_limit_that_cannot_be_met_is_one_clear_error():
    x = np.zeros((200_000, 8), np.float32)
    x[:, 0] = np.arange(len(x))
    with pytest.raises(ValueError, match=r"max_memory=.*seeding_rows"):
        kmeans(x, 5, seeding_rows=200_000, max_memory=1_000_000)
    kmeans(x, 5, seeding_rows=200_000, max_memory=3 * 4 * 8 * 200_000, n_iter=1)
