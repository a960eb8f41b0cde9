"""Balance figures against scikit-learn and scipy, and against the method's published figures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.neighbors import KernelDensity

from curated_data.clustering.tree import ClusterTree
from curated_data.selection import metrics
from tests.oracles.clustering import two_dimensional

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=30).map(np.array)


@settings(deadline=None)
@given(COUNTS)
def test_entropy_and_perplexity_against_scipy(counts):
    expected = stats.entropy(counts) if counts.any() else 0.0
    assert metrics.entropy(counts) == pytest.approx(expected)
    assert metrics.perplexity(counts) == pytest.approx(np.exp(expected) if counts.any() else 0.0)
    assert metrics.perplexity(counts) <= (counts > 0).sum() + 1e-9


@settings(deadline=None)
@given(COUNTS)
def test_gini_is_half_the_relative_mean_difference(counts):
    if counts.any():
        expected = np.abs(counts[:, None] - counts).mean() / (2 * counts.mean())
        assert metrics.gini(counts) == pytest.approx(expected)
    else:
        assert metrics.gini(counts) == 0


def test_extremes():
    assert metrics.perplexity(np.full(7, 3)) == pytest.approx(7)
    assert metrics.perplexity(np.full(7, 1e-9)) == pytest.approx(7)
    assert metrics.gini(np.full(7, 3)) == pytest.approx(0)
    assert metrics.gini(np.array([0, 0, 0, 5])) == pytest.approx(0.75)
    assert metrics.head_to_tail(np.array([50, 5, 1])) == 50
    assert metrics.head_to_tail(np.array([50, 0])) == np.inf
    with pytest.raises(ValueError, match="not negative"):
        metrics.gini(np.array([1, -1]))


def test_cluster_balance_of_a_tree_counted_by_hand():
    tree = ClusterTree(
        {1: np.zeros((4, 1)), 2: np.zeros((2, 1))},
        {1: np.array([0, 0, 0, 0, 1, 1, 3, -1]), 2: np.array([0, 1, -1, 1])},
    )
    low, high = metrics.cluster_balance(tree, np.array([0, 4, 4, 5]))
    assert (low.level, low.n_clusters, low.n_empty) == (1, 3, 1)
    assert (low.size_min, low.size_median, low.size_max) == (1, 2, 4)
    assert low.covered == pytest.approx(2 / 3)
    assert low.perplexity == pytest.approx(np.exp(stats.entropy([4, 2, 1])))
    assert low.selected_perplexity == pytest.approx(np.exp(stats.entropy([1, 3])))
    assert (high.n_clusters, high.covered) == (2, 1)
    assert metrics.selected_sizes(tree, np.array([0, 4, 4, 5]))[2].tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"0\.\.7.*0\.\.8"):
        metrics.cluster_balance(tree, np.array([0, 8]))


def test_class_balance_leaves_out_what_has_no_label():
    labels = np.array([0, 0, 0, 0, 2, 2, -1])
    balance = metrics.class_balance(labels, np.array([0, 4, 6]))
    assert balance.before.tolist() == [4, 0, 2]
    assert balance.after.tolist() == [1, 0, 1]
    assert balance.entropy_after == pytest.approx(np.log(2))
    assert (balance.ratio_before, balance.ratio_after) == (2, 1)
    assert metrics.class_balance(np.full(3, -1), np.array([0])) is None


def test_class_balance_of_ids_far_apart():
    dense, ids = np.array([0, 0, 0, 2, 2, 1, -1]), np.array([0, 3, 6])
    far = np.array([7, 10**11 + 3, 10**11, -1])[dense]
    balance, expected = metrics.class_balance(far, ids), metrics.class_balance(dense[dense != 1], ids[:1])
    assert balance.classes.tolist() == [7, 10**11, 10**11 + 3]
    assert balance.before.tolist() == [3, 2, 1]
    assert balance.after.tolist() == [1, 1, 0]
    assert balance.places(far).tolist() == [0, 0, 0, 1, 1, 2, -1]
    assert balance.names(None) == ["7", "100000000000", "100000000003"]
    assert balance.entropy_before == pytest.approx(metrics.entropy([3, 2, 1]))
    with pytest.raises(ValueError, match=r"2 class_names.*100000000003"):
        balance.names(["a", "b"])
    assert expected.classes.tolist() == [0, 1, 2]  # ordinary ones stay the places of their counts
    assert expected.names(["a", "b", "c", "d"]) == ["a", "b", "c"]
    for labels in (dense.astype(float), dense.astype(str)):
        with pytest.raises(ValueError, match=f"labels .*{labels.dtype}"):
            metrics.class_balance(labels, ids)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_coverage_distance_against_scipy(metric, at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(metrics, "_SEARCHED_BYTES", at_once * 4 * 12)
    x = np.random.default_rng(0).normal(size=(500, 12)).astype(np.float32) + 3
    ids = np.array([4, 90, 90, 300])
    distance = metrics.coverage_distance(x, ids, metric=metric, block=128)
    expected = cdist(x, x[ids], "euclidean" if metric == "l2" else "cosine").min(axis=1)
    np.testing.assert_allclose(distance, expected, atol=2e-6)
    assert (distance[ids] == 0).all()
    some = np.array([17, 3, 400])
    assert np.array_equal(metrics.coverage_distance(x, ids, metric=metric, queries=some), distance[some])


def test_coverage_far_from_the_origin_and_of_rows_of_zeros():
    x = np.random.default_rng(0).normal(size=(800, 32)) + 1000
    x = x.astype(np.float32)
    ids = np.arange(0, 800, 20)
    expected = cdist(x.astype(np.float64), x[ids].astype(np.float64)).min(axis=1)
    np.testing.assert_allclose(metrics.coverage_distance(x, ids), expected, rtol=1e-5, atol=1e-6)
    x[[0, 7]] = 0
    distance = metrics.coverage_distance(x, np.array([0, 20]), metric="cosine")
    assert distance[7] == 1
    assert distance[8] < 0.01


def test_coverage_of_bad_rows_and_empty_selections():
    x = np.ones((4, 2), np.float16)
    x[1] = np.nan
    assert np.isnan(metrics.coverage_distance(x, np.array([0]))).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="empty selection"):
        metrics.coverage_distance(x, np.array([], int))


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_kl_against_a_kernel_density_of_scikit_learn(dimension):
    x = np.random.default_rng(1).normal(size=(400, dimension))
    centres = -2 + (np.arange(20) + 0.5) * 0.2
    grid = np.stack(np.meshgrid(*[centres] * dimension, indexing="ij"), -1).reshape(-1, dimension)
    shares = np.exp(KernelDensity(bandwidth=0.3).fit(x).score_samples(grid))
    expected = stats.entropy(shares, np.ones(len(shares)))
    got = metrics.kl_to_uniform(x, -2, 2, bandwidth=0.3, step=0.2)
    assert got == pytest.approx(expected, rel=1e-4)  # scikit-learn's own tolerance


def test_kl_on_the_published_data():
    rng, x = np.random.default_rng(0), two_dimensional(0)
    raw = metrics.kl_to_uniform(x, -3, 3)
    assert 0.94 < raw < 0.96
    assert metrics.kl_to_uniform(x, -3, 3, step=0.02) == pytest.approx(raw, abs=1e-3)
    centres = KMeans(300, n_init=1, random_state=0).fit(x).cluster_centers_
    assert 0.30 < metrics.kl_to_uniform(centres, -3, 3) < 0.42
    floor = [metrics.kl_to_uniform(rng.uniform(-3, 3, (300, 2)), -3, 3) for _ in range(20)]
    assert 0.035 < np.mean(floor) < 0.046


def test_kl_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="d of 1 to 3"):
        metrics.kl_to_uniform(np.zeros((5, 8)), -1, 1)
    with pytest.raises(ValueError, match="anywhere near"):
        metrics.kl_to_uniform(np.full((5, 2), 1e6), -1, 1)
