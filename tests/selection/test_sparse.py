"""Selections by the distance to the nearest neighbour, against scikit-learn and for any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from curated_data import ClusterTree, Level, hierarchical_kmeans
from curated_data.selection import sparse
from curated_data.selection.sparse import neighbour_distances, sparse_sample, sparse_weights


def tree_of(cluster: np.ndarray, k: int | None = None) -> ClusterTree:
    k = k or int(cluster.max(initial=0)) + 1
    return ClusterTree({1: np.zeros((k, 2), np.float32)}, {1: np.asarray(cluster, np.int64)})


@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_distances_are_those_of_scikit_learn_within_clusters(budget: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    cluster = rng.integers(-1, 4, 300)
    found = neighbour_distances(x, tree_of(cluster), budget)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.isnan(found[cluster < 0]).all()
    for c in range(4):
        rows = unit[cluster == c]
        expected = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows)[0][:, 1]
        np.testing.assert_allclose(found[cluster == c], expected, atol=1e-3)


def test_large_clusters_are_cut_and_single_members_count_as_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CELL", 16)
    x = np.random.default_rng(0).normal(size=(201, 4)).astype(np.float32)
    cluster = np.r_[np.zeros(200, np.int64), 1]
    found = neighbour_distances(x, tree_of(cluster))
    whole = neighbour_distances(x[:200], tree_of(cluster[:200]))
    assert np.isfinite(found).all()
    assert found[200] == found.max()
    monkeypatch.setattr(sparse, "CELL", 4096)
    assert (found[:200] >= neighbour_distances(x, tree_of(cluster))[:200] - 1e-6).all()
    np.testing.assert_array_equal(found[:200], whole)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_selection_has_its_size_and_no_sample_too_often(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    cluster = np.array(data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n)))
    distance = np.array(
        data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 0.5, 2.0]), min_size=n, max_size=n)), np.float32
    )
    distance[cluster < 0] = np.nan
    target, repeats = data.draw(st.integers(0, 150)), data.draw(st.integers(1, 3))
    tree = tree_of(cluster, 5)
    ids = sparse_sample(tree, distance, target, max_repeats=repeats, seed=1)
    assert len(ids) == min(target, repeats * int((cluster >= 0).sum()))
    assert (np.diff(ids) >= 0).all()
    assert (cluster[ids] >= 0).all()
    assert np.bincount(ids, minlength=1).max() <= repeats
    np.testing.assert_array_equal(ids, sparse_sample(tree, distance, target, max_repeats=repeats, seed=1))


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 5, 200)
    distance = rng.lognormal(size=200).astype(np.float32)
    tree = tree_of(cluster)
    times = np.zeros(200)
    for seed in range(3000):
        times[sparse_sample(tree, distance, 20, seed=seed)] += 1
    weight = sparse_weights(distance, tree)
    expected = weight * 20 / weight.sum()  # none is above 1 here
    assert expected.max() < 1
    np.testing.assert_allclose(times / 3000, expected, atol=5 * np.sqrt(0.25 / 3000))


def test_a_rare_sparse_mode_gains_on_a_dense_one() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.float32([[1, 0, 0], [0, 1, 0]]), [2000, 40], axis=0)
    x = centres + 0.3 * rng.normal(size=centres.shape).astype(np.float32)
    tree = hierarchical_kmeans(x, [Level(4)], metric="cosine", seed=0)
    ids = sparse_sample(tree, neighbour_distances(x, tree), 200)
    assert (ids >= 2000).mean() > 2 * 40 / 2040


def test_equal_rows_are_drawn_alike() -> None:
    x = np.ones((50, 3), np.float32)
    tree = tree_of(np.zeros(50, np.int64))
    assert set(sparse_weights(neighbour_distances(x, tree), tree)) == {1.0}
