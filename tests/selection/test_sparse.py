"""Selections by how alone a sample lies, against scikit-learn and for any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from curated_data import ClusterTree, Level, hierarchical_kmeans
from curated_data.selection import sparse
from curated_data.selection.sparse import Neighbours, find_neighbours, sparse_sample, sparse_weights


def tree_of(cluster: np.ndarray, k: int | None = None) -> ClusterTree:
    k = k or int(cluster.max(initial=0)) + 1
    return ClusterTree({1: np.zeros((k, 2), np.float32)}, {1: np.asarray(cluster, np.int64)})


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    cluster = rng.integers(-1, 4, 300)
    found = find_neighbours(x, tree_of(cluster))
    kept = cluster >= 0
    for figure in (found.distance, found.listed, found.mutual):
        assert np.isnan(figure[~kept]).all()
    rows = unit(x[kept])
    expected = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows)[0][:, 1]
    np.testing.assert_allclose(found.distance[kept], expected, atol=1e-3)
    rows = unit(rows - rows.mean(axis=0))
    lists = NearestNeighbors(n_neighbors=16).fit(rows).kneighbors_graph().toarray() > 0  # without itself
    np.testing.assert_array_equal(found.listed[kept], lists.sum(axis=0))
    np.testing.assert_array_equal(found.mutual[kept], (lists & lists.T).sum(axis=0))


def test_cells_join_near_clusters_and_cut_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "CELL", 64)
    rng = np.random.default_rng(0)
    places = rng.normal(size=(40, 3)).astype(np.float32)
    size = np.r_[0, 1, 200, rng.integers(1, 30, 37)]
    groups = list(sparse._groups(places, np.arange(40), size))
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.flatnonzero(size))
    assert all(len(group) == 1 or size[group].sum() <= 64 for group in groups)
    assert len(groups) < 2 * size.sum() / 64 + 8

    x = rng.normal(size=(201, 4)).astype(np.float32)
    cluster = np.r_[np.zeros(200, np.int64), 1]
    parts = find_neighbours(x, tree_of(cluster))
    monkeypatch.setattr(sparse, "CELL", 4096)
    whole = find_neighbours(x, tree_of(np.zeros(201, np.int64)))
    assert parts.distance[200] == parts.distance.max()  # alone in its cell
    assert (parts.listed[200], parts.mutual[200]) == (0, 0)
    assert (parts.distance[:200] >= whole.distance[:200] - 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_selection_has_its_size_and_no_sample_too_often(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    cluster = np.array(data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n)))
    distance = np.array(
        data.draw(st.lists(st.sampled_from([0.0, 1e-6, 0.1, 0.5, 2.0]), min_size=n, max_size=n)), np.float32
    )
    counts = np.array(data.draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)), np.float32)
    neighbours = Neighbours(distance, counts, np.minimum(counts, 16))
    for figure in (neighbours.distance, neighbours.listed, neighbours.mutual):
        figure[cluster < 0] = np.nan
    target, repeats = data.draw(st.integers(0, 150)), data.draw(st.integers(1, 3))
    tree = tree_of(cluster, 5)
    ids = sparse_sample(tree, neighbours, target, max_repeats=repeats, seed=1)
    assert len(ids) == min(target, repeats * int((cluster >= 0).sum()))
    assert (np.diff(ids) >= 0).all()
    assert (cluster[ids] >= 0).all()
    assert np.bincount(ids, minlength=1).max() <= repeats
    np.testing.assert_array_equal(ids, sparse_sample(tree, neighbours, target, max_repeats=repeats, seed=1))


def test_samples_are_drawn_as_often_as_their_weights_say() -> None:
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 5, 200)
    counts = rng.integers(0, 17, size=(2, 200)).astype(np.float32)
    neighbours = Neighbours(rng.lognormal(size=200).astype(np.float32), *counts)
    tree = tree_of(cluster)
    times = np.zeros(200)
    for seed in range(3000):
        times[sparse_sample(tree, neighbours, 20, seed=seed)] += 1
    weight = sparse_weights(neighbours, tree)
    expected = weight * 20 / weight.sum()  # none is above 1 here
    assert expected.max() < 1
    np.testing.assert_allclose(times / 3000, expected, atol=5 * np.sqrt(0.25 / 3000))


def test_a_rare_sparse_mode_gains_on_a_dense_one() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.float32([[1, 0, 0], [0, 1, 0]]), [2000, 40], axis=0)
    x = centres + 0.3 * rng.normal(size=centres.shape).astype(np.float32)
    tree = hierarchical_kmeans(x, [Level(4)], metric="cosine", seed=0)
    ids = sparse_sample(tree, find_neighbours(x, tree), 200)
    assert (ids >= 2000).mean() > 2 * 40 / 2040


def test_far_outliers_and_copies_weigh_within_bounds() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8)).astype(np.float32)
    x[:100], x[100] = x[0], -50 * x.mean(axis=0)
    tree = tree_of(np.zeros(400, np.int64))
    weight = sparse_weights(find_neighbours(x, tree), tree)
    np.testing.assert_allclose(weight.min(), weight[:100].max())  # copies weigh least, and alike
    assert weight.min() >= np.exp(-3)
    assert weight.max() <= np.exp(4)


def test_equal_rows_are_drawn_alike() -> None:
    x = np.ones((50, 3), np.float32)
    tree = tree_of(np.zeros(50, np.int64))
    assert set(sparse_weights(find_neighbours(x, tree), tree)) == {1.0}
