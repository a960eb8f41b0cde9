"""Weighted k-means and placing new rows, against scikit-learn, and against repeated rows."""

import re

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs

from curated_data import ClusterTree, Level, hierarchical_kmeans, kmeans
from tests.support.ranks import on_ranks


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    return make_blobs(3000, 6, centers=30, cluster_std=3.0, random_state=0)[0].astype(np.float32)


def weights(n: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.where(rng.random(n) < 0.1, 0.0, rng.lognormal(0, 2, n))


@pytest.mark.parametrize("held", [True, False])
def test_weighted_iterations_are_those_of_scikit_learn(blobs, held):
    weight = weights(len(blobs))
    options = {"sample_weight": weight, "seed": 3, "tol": 0, "max_memory": None if held else 40_000}
    start = kmeans(blobs, 12, n_iter=0, **options).centroids
    ours = kmeans(blobs, 12, n_iter=300, **options)
    theirs = KMeans(12, init=start, n_init=1, max_iter=300, tol=0).fit(blobs, sample_weight=weight)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, rtol=1e-3, atol=1e-3)
    assert (ours.assignment == theirs.labels_).mean() > 0.999
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_integer_weights_are_repeated_rows(blobs):
    few = blobs[:300]
    times = np.random.default_rng(0).integers(1, 5, len(few))
    weighted = kmeans(few, 5, sample_weight=times, init="random", n_iter=100, tol=0, seed=1)
    start = kmeans(few, 5, sample_weight=times, init="random", n_iter=0, seed=1).centroids
    repeated = KMeans(5, init=start, n_init=1, max_iter=100, tol=0).fit(np.repeat(few, times, axis=0))
    assert weighted.inertia == pytest.approx(repeated.inertia_, rel=1e-5)


def test_equal_weights_change_nothing(blobs):
    plain = kmeans(blobs, 10, init="random", seed=2)
    weighted = kmeans(blobs, 10, init="random", seed=2, sample_weight=np.full(len(blobs), 2))
    np.testing.assert_array_equal(plain.assignment, weighted.assignment)
    assert weighted.inertia == pytest.approx(2 * plain.inertia, rel=1e-6)


def _on_rank(rank, blobs, folder):
    found = kmeans(blobs, 12, sample_weight=weights(len(blobs)), seed=3)
    np.save(folder / f"{rank}.npy", found.assignment)


def test_two_ranks_find_what_one_does(blobs, tmp_path):
    on_ranks(2, _on_rank, blobs, tmp_path)
    alone = kmeans(blobs, 12, sample_weight=weights(len(blobs)), seed=3).assignment
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), alone)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (np.ones(5), "(3000,)"),
        (np.full(3000, -1.0), "sample_weight[0]"),
        (np.full(3000, np.nan), "sample_weight[0]"),
        (np.zeros(3000), "weight 0"),
        (np.full(3000, "a"), "<U1"),
    ],
)
def test_weights_that_are_none(blobs, bad, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        kmeans(blobs, 3, sample_weight=bad)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_new_rows_go_to_the_nearest_centroid(blobs, metric):
    found = kmeans(blobs[:2000], 12, metric=metric)
    new = blobs[2000:]
    looked = new / np.linalg.norm(new, axis=1, keepdims=True) if metric == "cosine" else new
    gaps = ((looked[:, None].astype(np.float64) - found.centroids) ** 2).sum(-1)
    for form in (new, torch.from_numpy(new), new.astype(np.float64)):
        np.testing.assert_array_equal(found.assign(form), gaps.argmin(1))
    odd = np.stack([new[0], np.full(6, np.nan)])
    assert found.assign(odd).tolist() == [int(gaps[0].argmin()), -1]
    assert found.assign(odd[1:]).tolist() == [-1]
    assert found.assign(new[:0]).tolist() == []
    with pytest.raises(ValueError, match=r"\(m, 6\)"):
        found.assign(new[:, :3])


def test_rows_of_a_tree_go_where_they_were(blobs):
    tree: ClusterTree = hierarchical_kmeans(blobs, [Level(40), Level(6)])
    for level in (1, 2):
        np.testing.assert_array_equal(tree.assign(blobs, level), tree.assignment(level))
    with pytest.raises(ValueError, match=r"1\.\.2"):
        tree.assign(blobs, 3)
