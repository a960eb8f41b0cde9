"""The draw of a configuration: its ways of sampling, selections inside each other, and first samples."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import Level, flat_sample, hierarchical_kmeans, hierarchical_sample
from curated_data.config import load_config
from curated_data.selection.draw import draw_all, first_of, sizes_of
from curated_data.selection.greedy import greedy_order
from curated_data.selection.quotas import Quotas
from curated_data.selection.retrieval import Retrieved
from curated_data.selection.sparse import find_neighbours, sparse_sample

WAYS = ("hierarchical", "flat", "sparse", "greedy")
NONE = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(8, 5))[rng.choice(8, 300)] + 0.2 * rng.normal(size=(300, 5))).astype(np.float32)


@pytest.fixture(scope="module")
def tree(rows):
    return hierarchical_kmeans(rows, [Level(12), Level(4)], metric="cosine")


def config_of(sampling: str, **more):
    return load_config({"target_size": 60, "sampling": sampling, "metric": "cosine", **more})


def test_each_way_is_its_sampling_alone(rows, tree):
    expected = {
        "hierarchical": hierarchical_sample(tree, 60, seed=3),
        "flat": flat_sample(tree, 60, seed=3),
        "sparse": sparse_sample(tree, find_neighbours(rows, tree), 60, seed=3),
        "greedy": np.sort(greedy_order(rows, tree, 60)),
    }
    for sampling in WAYS:
        (ids,) = draw_all(tree, rows, config_of(sampling, seed=3), NONE, None)
        np.testing.assert_array_equal(ids, expected[sampling])


def test_flat_samples_near_centroids_of_an_upper_level_are_the_nearest(rows, tree):
    config = config_of("flat", strategy="closest")
    (ids,) = draw_all(tree, rows, config, NONE, Quotas(level=2))
    expected = flat_sample(tree, 60, strategy="closest", embeddings=rows, level=2)
    np.testing.assert_array_equal(ids, expected)


@settings(max_examples=60, deadline=None)
@given(
    sampling=st.sampled_from(WAYS),
    nested=st.lists(st.integers(1, 59), max_size=4),
    first=st.lists(st.integers(0, 299), max_size=20, unique=True),
    repeats=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_selections_lie_inside_each_other(rows, tree, sampling, nested, first, repeats, seed):
    repeats = 1 if sampling == "greedy" else repeats
    config = config_of(sampling, nested_sizes=nested, seed=seed, max_repeats=repeats)
    drawn = draw_all(tree, rows, config, np.array(first, np.int64), None)
    assert [len(ids) for ids in drawn] == sizes_of(config) == [60, *sorted(set(nested), reverse=True)]
    for ids, size in zip(drawn, sizes_of(config), strict=True):
        assert (np.diff(ids) >= 0).all()
        assert set(first[:size]) <= set(ids.tolist())
        assert np.bincount(ids).max() <= repeats
    for larger, smaller in itertools.pairwise(drawn):
        assert (np.bincount(smaller, minlength=300) <= np.bincount(larger, minlength=300)).all()


def test_what_is_included_comes_before_what_was_retrieved(caplog):
    config = dataclasses.replace(config_of("sparse"), include=[7, 2, 5])
    valid = np.ones(20, bool)
    valid[2] = False
    assert first_of(config, valid).tolist() == [7, 5]
    assert "include: 1 samples are not selected" in caplog.text
    integers = {name: np.zeros(4, np.int64) for name in ("seed_set", "seed", "cluster")}
    found = Retrieved(
        names=("a",), ids=np.array([3, 5, 11, 19]), rank=np.array([1, 0, 2, 0]),
        cosine=np.array([0.9, 0.5, 0.4, 0.8]), **integers,
    )  # fmt: skip
    assert first_of(config, valid, found).tolist() == [7, 5, 19, 3, 11]
