"""Hierarchical and flat sampling against a plain recursive implementation, and the reference's known
defects.
"""

import logging
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from curated_data.clustering import Level, hierarchical_kmeans
from curated_data.clustering.tree import ClusterTree
from curated_data.selection import sampling
from curated_data.selection.quotas import water_fill
from curated_data.selection.sampling import flat_sample, hierarchical_sample
from tests.oracles import recursive_sampling as oracle


def make_tree(
    parents: list[list[int]], n_clusters: list[int], distance=None, dimension: int = 2
) -> ClusterTree:
    rng = np.random.default_rng(0)
    return ClusterTree(
        {level: rng.normal(size=(k, dimension)) for level, k in enumerate(n_clusters, 1)},
        {level: np.array(parent, np.int64) for level, parent in enumerate(parents, 1)},
        distance,
    )


def nodes_of(tree: ClusterTree) -> oracle.Nodes:
    return oracle.Nodes({level: p.tolist() for level, p in tree.parent.items()}, tree.n_clusters)


@st.composite
def trees(draw) -> ClusterTree:
    """One to three levels, with empty clusters, excluded samples, and sizes from none to all."""
    n_levels = draw(st.integers(1, 3))
    n_nodes = [draw(st.integers(1, 60))]
    parents = []
    for level in range(1, n_levels + 1):
        k = draw(st.integers(1, 6))
        lowest = -1 if level == 1 else 0
        parents.append(draw(st.lists(st.integers(lowest, k - 1), min_size=n_nodes[-1], max_size=n_nodes[-1])))
        n_nodes.append(k)
    distance = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 5, n_nodes[0])  # ties on purpose
    return make_tree(parents, n_nodes[1:], distance.astype(np.float32))


@settings(max_examples=300, deadline=None)
@given(
    tree=trees(),
    target=st.integers(0, 200),
    max_repeats=st.integers(1, 4),
    strategy=st.sampled_from(["random", "closest", "furthest"]),
    seed=st.integers(0, 5),
    block=st.sampled_from([1, 4, 1 << 21]),
)
def test_every_node_of_any_tree_is_water_filled(tree, target, max_repeats, strategy, seed, block):
    with mock.patch.object(sampling, "_BLOCK", block):  # a pool of many blocks
        ids = hierarchical_sample(tree, target, strategy=strategy, max_repeats=max_repeats, seed=seed)
    if strategy != "random":
        whole = hierarchical_sample(tree, target, strategy=strategy, max_repeats=max_repeats, seed=seed)
        assert np.array_equal(ids, whole)
    assert ids.dtype == np.int64
    assert (np.diff(ids) >= 0).all()
    assert (tree.parent[1][ids] >= 0).all()
    distance = None if strategy == "random" else tree.distance
    sign = -1 if strategy == "furthest" else 1
    oracle.check(nodes_of(tree), ids, target, max_repeats=max_repeats, distance=distance, sign=sign)


@settings(max_examples=50, deadline=None)
@given(tree=trees(), target=st.integers(0, 200), max_repeats=st.integers(1, 4), seed=st.integers(0, 5))
def test_the_check_accepts_the_recursive_sampler(tree, target, max_repeats, seed):
    nodes = nodes_of(tree)
    ids = oracle.sample(nodes, target, max_repeats=max_repeats, seed=seed)
    oracle.check(nodes, ids, target, max_repeats=max_repeats)


def test_the_check_refuses_an_unfair_selection():
    tree = make_tree([[0] * 6 + [1] * 6], [2])
    with pytest.raises(AssertionError, match="water-filling"):
        oracle.check(nodes_of(tree), [0, 1, 2, 3, 4, 6], 6)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.lists(st.integers(0, 12), max_size=8), st.integers(0, 60)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 9),
)
def test_water_filling_against_a_cut_found_by_counting_up(groups, seed):
    capacity = np.array([c for children, _ in groups for c in children], np.int64)
    parent = np.array([g for g, (children, _) in enumerate(groups) for _ in children], np.int64)
    mixed = np.random.default_rng(seed).permutation(len(capacity))  # children in no particular order
    target = np.array([min(t, sum(children)) for children, t in groups])
    share = water_fill(target, capacity[mixed], parent[mixed], np.random.default_rng(seed))
    for g in range(len(groups)):
        given = share[parent[mixed] == g].tolist()
        bounds, left = oracle.shares(int(target[g]), capacity[mixed][parent[mixed] == g].tolist())
        assert sum(given) == target[g]
        assert all(low <= s <= high for s, (low, high) in zip(given, bounds))
        assert sum(s > low for s, (low, _) in zip(given, bounds)) == left


def test_remainders_and_members_are_drawn_evenly():
    tree = make_tree([np.repeat(np.arange(5), 4).tolist()], [5])
    ids = np.concatenate([hierarchical_sample(tree, 7, seed=seed) for seed in range(2000)])
    clusters = np.bincount(ids // 4, minlength=5)
    assert stats.chisquare(clusters).pvalue > 1e-4
    assert stats.chisquare(np.bincount(ids, minlength=20)).pvalue > 1e-4


def test_same_seed_same_ids_and_another_seed_others():
    tree = make_tree([np.arange(1000) % 37, np.arange(37) % 5], [37, 5])
    first = hierarchical_sample(tree, 300, seed=3)
    assert np.array_equal(first, hierarchical_sample(tree, 300, seed=3))
    assert not np.array_equal(first, hierarchical_sample(tree, 300, seed=4))
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    hierarchical_sample(tree, 300)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_closest_is_sorted_by_distance():
    x = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    cluster = np.arange(200) % 4
    centroids = np.stack([x[cluster == c].mean(0) for c in range(4)])
    tree = ClusterTree({1: centroids}, {1: cluster})
    ids = hierarchical_sample(tree, 40, strategy="closest", embeddings=x)
    distance = np.linalg.norm(x - centroids[cluster], axis=1)
    for c in range(4):
        members = np.flatnonzero(cluster == c)
        nearest = members[np.argsort(distance[members])[:10]]
        assert set(ids[cluster[ids] == c]) == set(nearest)
    stored = ClusterTree({1: centroids}, {1: cluster}, distance)
    assert np.array_equal(ids, hierarchical_sample(stored, 40, strategy="closest"))


def test_repeats_take_a_cluster_whole_before_any_sample_comes_again():
    tree = make_tree([[0] * 3 + [1] * 100], [2], np.arange(103.0))
    ids = hierarchical_sample(tree, 16, strategy="closest", max_repeats=3)
    assert ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, *range(3, 11)]
    assert len(hierarchical_sample(tree, 10**12, max_repeats=2)) == 206


def test_asking_for_more_than_there_is_gives_all_and_says_so(caplog):
    tree = make_tree([[0, 0, -1, 1]], [2])
    with caplog.at_level(logging.WARNING):
        ids = hierarchical_sample(tree, 10)
    assert ids.tolist() == [0, 1, 3]
    assert "target_size=10" in caplog.text
    assert "3 samples" in caplog.text


def test_a_tree_without_samples_gives_none():
    tree = make_tree([[-1, -1], [0, 0]], [2, 1])
    for ids in (hierarchical_sample(tree, 5), flat_sample(tree, 5, level=2)):
        assert ids.dtype == np.int64
        assert ids.size == 0


def test_sums_that_pass_2_to_the_31_stay_exact():
    capacity = np.array([2**40, 2**40 + 1, 3, 2**33])
    share = water_fill(np.array([2**41]), capacity, np.zeros(4, int), np.random.default_rng(0))
    assert share.sum() == 2**41
    assert share[2] == 3
    assert share[3] == 2**33


@pytest.mark.parametrize("level", [None, 1, 2])
def test_flat_sampling_gives_every_cluster_of_a_level_the_same(level):
    rng = np.random.default_rng(0)
    tree = make_tree([rng.choice(12, 2000, p=rng.dirichlet(np.ones(12))), np.arange(12) % 3], [12, 3])
    ids = flat_sample(tree, 300, level=level, seed=1)
    flattened = make_tree([tree.assignment(level or 1)], [tree.n_clusters[level or 1]])
    oracle.check(nodes_of(flattened), ids, 300)


@pytest.mark.parametrize("level", [1, 2])
def test_rows_need_not_be_normalised_for_a_cosine_tree(level):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 8)).astype(np.float32) * rng.lognormal(size=(900, 1)).astype(np.float32)
    tree = hierarchical_kmeans(x, [Level(30), Level(6)], metric="cosine", seed=0)
    ids = flat_sample(tree, 120, level=level, strategy="closest", embeddings=x)
    cluster = tree.assignment(level)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (unit * tree.centroids[level][cluster]).sum(1)
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        count = (cluster[ids] == c).sum()
        assert set(ids[cluster[ids] == c]) == set(members[np.argsort(-cosine[members])[:count]])


def test_flat_closest_at_an_upper_level_measures_to_its_own_centroids():
    x = np.random.default_rng(2).normal(size=(120, 2)).astype(np.float32)
    tree = make_tree([np.arange(120) % 6, np.arange(6) % 2], [6, 2], np.zeros(120))
    with pytest.raises(ValueError, match="embeddings="):
        flat_sample(tree, 20, level=2, strategy="closest")
    ids = flat_sample(tree, 20, level=2, strategy="closest", embeddings=x)
    cluster = tree.assignment(2)
    distance = np.linalg.norm(x - tree.centroids[2][cluster], axis=1)
    for c in range(2):
        members = np.flatnonzero(cluster == c)
        assert set(ids[cluster[ids] == c]) == set(members[np.argsort(distance[members])[:10]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_size": -1}, "target_size: .*-1"),
        ({"target_size": 2.5}, "target_size: .*2.5"),
        ({"target_size": True}, "target_size: .*True"),
        ({"target_size": 2, "max_repeats": 0}, "max_repeats: .*0"),
        ({"target_size": 2, "seed": -1}, "seed: .*-1"),
        ({"target_size": 2, "strategy": "nearest"}, "strategy: .*'nearest'"),
        ({"target_size": 2, "strategy": "closest"}, "embeddings="),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    tree = make_tree([[0, 0, 1]], [2])
    with pytest.raises(ValueError, match=message):
        hierarchical_sample(tree, **arguments)


def test_embeddings_of_another_pool_are_refused():
    tree = make_tree([[0, 0, 1]], [2])
    with pytest.raises(ValueError, match=r"4 rows.* 3 "):
        hierarchical_sample(tree, 2, strategy="closest", embeddings=np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="level=3"):
        flat_sample(tree, 2, level=3)


def test_few_of_a_large_cluster_are_drawn_evenly_from_all_of_it():
    tree = make_tree([np.zeros(200_000, int)], [1])
    ids = hierarchical_sample(tree, 4000, seed=1)
    assert len(np.unique(ids)) == 4000
    assert stats.chisquare(np.bincount(ids // 10_000, minlength=20)).pvalue > 1e-4
