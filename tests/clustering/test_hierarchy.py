"""Hierarchical k-means: the paper's figures on its 2-D data, the reference's defects, splits, hard input."""

import contextlib
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.clustering import ClusterTree, Level, choose_levels, hierarchical_kmeans, hierarchy, kmeans
from curated_data.clustering.hierarchy import _balanced_sample
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.neighbourhoods import loses_little, nearest_nearby, sampled_loss
from curated_data.levels import TooManyClusters
from curated_data.selection.metrics import kl_to_uniform
from tests.oracles.clustering import clouds, squared_distances, two_dimensional


def check(x, tree, valid=None):
    """What holds for any l2 tree: every node lies with its nearest centroid of the level above."""
    nodes, used = np.asarray(x, np.float64), valid
    for level in range(1, tree.n_levels + 1):
        used = np.ones(len(nodes), bool) if used is None else used
        assert (tree.parent[level] >= 0).tolist() == used.tolist()
        gaps = squared_distances(nodes[used], tree.centroids[level])
        own = gaps[np.arange(used.sum()), tree.parent[level][used]]
        assert (own - gaps.min(1)).max() <= 1e-4 * max(gaps.max(), 1e-9)
        if level == 1:
            tolerance = 1e-3 * np.sqrt(gaps.max() + 1e-9)
            np.testing.assert_allclose(tree.distance[used], np.sqrt(own), atol=tolerance)
            assert np.isnan(tree.distance[~used]).all()
        nodes = tree.centroids[level].astype(np.float64)
        used = np.bincount(tree.parent[level][used], minlength=len(nodes)) > 0
    assert tree.sizes(tree.n_levels).sum() == (len(x) if valid is None else valid.sum())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_levels_flatten_the_density_as_in_the_paper(seed):
    x = two_dimensional(seed)
    one = kl_to_uniform(kmeans(x, 300, seed=seed).centroids, -3, 3)
    two = hierarchical_kmeans(x, [Level(1500), Level(300)], seed=seed)
    three = hierarchical_kmeans(x, [Level(3000), Level(1000), Level(300)], seed=seed)
    assert 0.30 < one < 0.42
    assert 0.10 < kl_to_uniform(two.centroids[2], -3, 3) < 0.17
    assert kl_to_uniform(three.centroids[3], -3, 3) < 0.12


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_resampling_flattens_further(seed):
    x = two_dimensional(seed)
    plain = hierarchical_kmeans(x, [Level(3000), Level(1000), Level(300)], seed=seed)
    resampled = hierarchical_kmeans(x, [Level(k, 10, 2) for k in (3000, 1000, 300)], seed=seed)
    assert kl_to_uniform(resampled.centroids[3], -3, 3) < 0.06
    assert kl_to_uniform(resampled.centroids[3], -3, 3) < kl_to_uniform(plain.centroids[3], -3, 3)


@pytest.mark.parametrize("resample", ["closest", "random"])
def test_tree_is_what_it_says(resample):
    x = clouds(3000, 8, 60, seed=0)
    levels = [Level(200, n_resamples=2, sample_size=5), Level(40, n_resamples=1, sample_size=3), Level(8)]
    tree = hierarchical_kmeans(x, levels, resample=resample, seed=1)
    assert isinstance(tree, ClusterTree)
    assert tree.n_clusters == {1: 200, 2: 40, 3: 8}
    check(x, tree)


def test_seeds_reproduce_and_differ():
    x = clouds(1500, 4, 30, seed=0)
    levels = [Level(100, 2, 4), Level(10, 1, 4)]
    first, second, other = (hierarchical_kmeans(x, levels, seed=s, resample="random") for s in (7, 7, 8))
    for level in (1, 2):
        np.testing.assert_array_equal(first.parent[level], second.parent[level])
        np.testing.assert_array_equal(first.centroids[level], second.centroids[level])
    np.testing.assert_array_equal(first.distance, second.distance)
    assert not np.array_equal(first.parent[1], other.parent[1])


def test_balanced_sample_takes_the_closest_of_each_cluster():
    rng = np.random.default_rng(0)
    assignment, squared = rng.integers(0, 20, 500), rng.random(500)
    assignment[assignment == 3] = 4  # an empty cluster
    picked = _balanced_sample(assignment, squared, 20, 7, "closest", rng)
    expected = []
    for c in range(20):
        expected += sorted(np.flatnonzero(assignment == c), key=squared.__getitem__)[:7]
    assert picked.tolist() == sorted(expected)
    random = _balanced_sample(assignment, squared, 20, 7, "random", rng)
    sizes = np.bincount(assignment, minlength=20)
    assert np.bincount(assignment[random], minlength=20).tolist() == np.minimum(sizes, 7).tolist()
    assert len(np.unique(random)) == len(random)
    assert len(_balanced_sample(assignment, squared, 60, 2, "closest", rng)) == 60  # k of them at the least


def test_cosine_tree():
    x = clouds(1000, 6, 20, seed=0) * np.random.default_rng(0).uniform(0.1, 10, (1000, 1)).astype(np.float32)
    tree = hierarchical_kmeans(x, [Level(60, 1, 5), Level(9, 1, 3)], metric="cosine")
    for level in (1, 2):
        np.testing.assert_allclose(np.linalg.norm(tree.centroids[level], axis=1), 1, atol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    gaps = squared_distances(unit, tree.centroids[1])
    assert (gaps[np.arange(1000), tree.parent[1]] - gaps.min(1)).max() < 1e-5


def test_excluded_rows_have_no_parent():
    x = clouds(800, 4, 10, seed=0)
    x[[5, 600]] = np.nan
    valid = np.ones(800, bool)
    valid[:3] = False
    tree = hierarchical_kmeans(x, [Level(50, 1, 4), Level(5)], valid=valid)
    assert np.flatnonzero(tree.parent[1] < 0).tolist() == [0, 1, 2, 5, 600]
    valid[[5, 600]] = False
    check(x, tree, valid)
    with pytest.raises(ValueError, match="5, 600"):
        hierarchical_kmeans(x, [Level(50)], nonfinite="raise")


def test_splits_make_groups_times_splits_clusters():
    x = clouds(4000, 6, 100, seed=0)
    tree = hierarchical_kmeans(x, [Level(12, n_splits=10), Level(10)], seed=3)
    assert tree.n_clusters[1] <= 120
    assert tree.n_clusters[1] > 100
    assert (tree.sizes(1) > 0).all()  # empty ones are dropped
    # Each cluster's centroid is the mean of its members, apart from what the last assignment moved.
    means = np.stack([x[tree.members(1, c)].mean(0) for c in range(tree.n_clusters[1])])
    assert np.abs(means - tree.centroids[1]).mean() < 0.01
    whole = kmeans(x, tree.n_clusters[1], seed=3).inertia
    assert np.square(tree.distance).sum() < 1.3 * whole
    # A group with fewer rows than splits gives one cluster a row.
    sparse = hierarchical_kmeans(clouds(60, 3, 30, seed=1), [Level(10, n_splits=20)])
    assert sparse.n_clusters[1] == 60


def test_repeated_rows_leave_empty_clusters_without_parent():
    """Fewer distinct rows than clusters: the reference fails on the empty ones at the next level."""
    x = np.repeat(np.random.default_rng(0).normal(size=(20, 3)), 10, axis=0)
    tree = hierarchical_kmeans(x, [Level(40, 2, 3), Level(5, 1, 2)])
    assert (tree.sizes(1) == 0).sum() == 20
    assert (tree.parent[2] < 0).sum() == 20
    check(x, tree)
    constant = hierarchical_kmeans(np.ones((30, 4), np.float16), [Level(5, 1, 3), Level(1)])
    assert constant.sizes(2).tolist() == [30]


@pytest.mark.parametrize("d", [1, 3])
def test_equal_sized_clusters_and_as_many_clusters_as_points(d):
    x = np.repeat(np.arange(12) * 10.0, 8)[:, None] + np.random.default_rng(0).normal(size=(96, d)) * 0.1
    tree = hierarchical_kmeans(x, [Level(12, 2, 4), Level(12), Level(1)], seed=1)
    assert tree.sizes(1).tolist() == [8] * 12
    assert tree.sizes(2).tolist() == [8] * 12
    check(x, tree)


def test_one_huge_cluster():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(3000, 4)) * 0.01, rng.normal(size=(200, 4))])
    tree = hierarchical_kmeans(x, [Level(300, 3, 5), Level(30, 2, 5)])
    check(x, tree)


def test_rows_that_repeat_too_often_for_a_level_get_one_clear_error():
    x = np.repeat(clouds(5, 3, 5, seed=0), 40, axis=0)
    assert (hierarchical_kmeans(x, [Level(20, 2, 4), Level(5, 2, 2)]).sizes(2) == 40).all()
    with pytest.raises(ValueError, match=r"level 2 .* 8 .* 5 of the 20"):
        hierarchical_kmeans(x, [Level(20, 2, 4), Level(8, 2, 2)])


def test_resampling_of_many_clusters_ends_exact():
    """Steps before the last may look at neighbourhoods alone; the tree's own assignment does not."""
    x = clouds(9000, 2, 300, seed=0)
    tree = hierarchical_kmeans(x, [Level(1100, 2, 4)], seed=0)
    check(x, tree)
    gaps = squared_distances(x, tree.centroids[1])
    assert (gaps[np.arange(9000), tree.parent[1]] - gaps.min(1)).max() < 1e-4 * gaps.min(1).mean()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "enough"), [("clusters", True), ("noise", False)])
def test_a_sample_tells_what_neighbourhoods_missed(kind, enough):
    rng = np.random.default_rng(0)
    x = clouds(6000, 2, 300, seed=0) if kind == "clusters" else rng.normal(size=(6000, 32)).astype(np.float32)
    rows = prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None)
    centroids = torch.from_numpy(kmeans(x, 1500, seed=0).centroids - rows.frame.mean.astype(np.float32))
    found = nearest_nearby(rows, centroids)
    gaps = squared_distances(rows.block(0, 6000).numpy(), centroids.numpy())
    right, lost = (found == gaps.argmin(1)).mean(), gaps[np.arange(6000), found].sum() / gaps.min(1).sum() - 1
    halves = [
        sampled_loss(rows.part(a, b), centroids, found[a:b], first=a, n=6000)
        for a, b in ((0, 2048), (2048, 6000))
    ]
    loss = sampled_loss(rows, centroids, found, first=0, n=6000)
    np.testing.assert_allclose(np.sum(halves, axis=0), loss, rtol=1e-9)
    assert loss[1] / loss[0] == pytest.approx(right, abs=0.05)
    assert loss[2] / loss[3] == pytest.approx(lost, abs=0.05)
    assert loses_little(loss) == enough
    assert (right > 0.99 and lost < 0.01) == enough


def test_sample_size_of_one_means_no_resampling():
    x = clouds(500, 3, 10, seed=0)
    one, none = (hierarchical_kmeans(x, [level], seed=2) for level in (Level(30, 5, 1), Level(30)))
    np.testing.assert_array_equal(one.parent[1], none.parent[1])


@pytest.mark.parametrize(
    ("levels", "arguments", "message"),
    [
        ([], {}, "at least one Level"),
        ([5], {}, "int at level 1"),
        ("best", {}, "'best'"),
        ([Level(500)], {}, "level 1 .*500 .*200"),
        ([Level(10), Level(11)], {}, "level 2 .*11 .*10 "),
        ([Level(10)], {"resample": "far"}, "^resample: .*'far'"),
        ([Level(10)], {"init": "x"}, "^init: .*'x'"),
        ([Level(10)], {"metric": "x"}, "^metric: .*'x'"),
        ([Level(10)], {"n_iter": -1}, "n_iter: "),
        ([Level(10)], {"n_init": 0}, "n_init: "),
        ([Level(10)], {"tol": -0.1}, "tol .*-0.1"),
        ([Level(10)], {"seed": "one"}, "seed: "),
        ([Level(10)], {"resample_n_iter": 1.5}, "resample_n_iter: "),
        ([Level(10)], {"checkpoint_seconds": -1}, "checkpoint_seconds .*-1"),
        ([Level(10)], {"checkpoint_seconds": "5m"}, "checkpoint_seconds .*'5m'"),
    ],
)
def test_wrong_settings_get_one_clear_error(levels, arguments, message):
    with pytest.raises(ValueError, match=message):
        hierarchical_kmeans(clouds(200, 3, 5, seed=0), levels, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "Level.n_clusters"),
        ({"n_clusters": 5, "n_resamples": -1}, "Level.n_resamples"),
        ({"n_clusters": 5, "sample_size": 0}, "Level.sample_size"),
        ({"n_clusters": 5, "n_splits": 0}, "Level.n_splits"),
        ({"n_clusters": 5, "n_splits": 2, "n_resamples": 1}, "n_splits.*n_resamples|n_resamples.*n_splits"),
    ],
)
def test_wrong_levels_get_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Level(**arguments)


def test_levels_may_be_mappings():
    x = clouds(200, 3, 5, seed=0)
    given = hierarchical_kmeans(x, [{"n_clusters": 10, "n_resamples": 1, "sample_size": 5}])
    np.testing.assert_array_equal(given.parent[1], hierarchical_kmeans(x, [Level(10, 1, 5)]).parent[1])


@pytest.mark.parametrize("n", [1, 5, 50, 1000, 123_456, 10**6, 10**8, 743_000_000])
@pytest.mark.parametrize("target", [None, 1, 1000, 10**7])
def test_automatic_levels_can_be_clustered(n, target):
    levels = choose_levels(n, target)
    assert 1 <= len(levels) <= 4
    below = n
    for level in levels:
        total = level.n_clusters * level.n_splits
        assert 1 <= total <= below
        assert not (level.n_splits > 1 and level.n_resamples)
        if level.n_resamples:
            assert 2 <= level.sample_size <= max(2, below // total)
        below = total


def test_automatic_levels_have_the_published_shape():
    levels = choose_levels(743_000_000, 142_000_000)
    assert levels[0] == Level(100_000, n_splits=100)
    assert [level.n_clusters for level in levels[1:]] == [1_000_000, 100_000, 10_000]
    tree = hierarchical_kmeans(clouds(2000, 4, 30, seed=0), "auto", target_size=100)
    assert tree.n_clusters == {1: 200, 2: 20}
    assert [level.n_clusters for level in choose_levels(10_000, 1_000)] == [2000, 200]
    assert [level.n_clusters for level in choose_levels(100_000)] == [5000, 500, 50]


def test_progress_tells_level_step_iteration_and_inertia(monkeypatch):
    shown = []

    @contextlib.contextmanager
    def progress(description, total, unit=""):
        yield lambda n=1, note="": shown.append((n, note))

    monkeypatch.setattr(hierarchy, "progress", progress)
    hierarchical_kmeans(
        clouds(3000, 3, 10, seed=0), [Level(50, 2, 10), Level(10, n_splits=2), Level(5, 3, 1)]
    )
    assert sum(n for n, _ in shown) == pytest.approx(100)
    notes = [note for _, note in shown if note]
    assert re.fullmatch(r"level 1 of 3, step 0 of 2, iteration 1, inertia [\d.e+]+", notes[0])
    steps = list(dict.fromkeys(note.split(", iteration")[0] for note in notes))
    assert steps[:3] == [f"level 1 of 3, step {step} of 2" for step in range(3)]
    assert "level 2 of 3, portion 10 of 10" in steps
    assert steps[-1] == "level 3 of 3, step 0 of 0"


def test_one_log_line_a_level(caplog):
    with caplog.at_level(logging.INFO, "curated_data.clustering"):
        hierarchical_kmeans(clouds(500, 3, 10, seed=0), [Level(50, 1, 3), Level(5)], max_memory=3 << 30)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert lines.pop(0) == "clustering 500 x 3 rows on cpu, held as float32, 0.00 of 3.00 GiB allowed"
    assert len(lines) == 2
    assert "level 1: 50 clusters of 500 rows, sizes " in lines[0]
    assert "perplexity" in lines[0]
    assert "0 empty" in lines[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 60), st.sampled_from(["l2", "cosine"]), st.integers(0, 5))
def test_automatic_levels_shrink_to_what_repeated_rows_allow(n, distinct, metric, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(distinct, 3))[rng.integers(0, distinct, n)].astype(np.float32)
    x[rng.random(n) < rng.choice([0, 0.5])] = 0  # not usable under cosine
    if metric == "cosine" and not x.any():
        with pytest.raises(ValueError, match="no usable row"):
            hierarchical_kmeans(x, "auto", metric=metric)
        return
    tree = hierarchical_kmeans(x, "auto", metric=metric, seed=seed)
    usable = n if metric == "l2" else x.any(1).sum()
    assert tree.sizes(tree.n_levels).sum() == usable
    assert (np.diff(list(tree.n_clusters.values())) < 0).all()


@pytest.mark.long
def test_levels_shrink_only_where_they_must():
    x = np.repeat(clouds(400, 3, 5, seed=0), 100, axis=0)
    levels = choose_levels(len(x))
    assert [level.n_clusters for level in levels] == [2000, 200]
    assert list(hierarchical_kmeans(x, "auto").n_clusters.values()) == [2000, 200]
    x = np.repeat(clouds(150, 3, 5, seed=0), 267, axis=0)
    assert list(hierarchical_kmeans(x, "auto").n_clusters.values()) == [2002, 15]
    asked = [Level(2000), Level(200), Level(20)]
    assert list(hierarchical_kmeans(x, asked, shrink=True).n_clusters.values()) == [2000, 15]
    with pytest.raises(TooManyClusters, match=r"level 2 .* 200 .* 150"):
        hierarchical_kmeans(x, asked)
