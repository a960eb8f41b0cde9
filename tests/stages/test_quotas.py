"""Quotas, nested selections and included samples through the whole of a curation."""

from pathlib import Path

import numpy as np
import pytest

from curated_data import curate_embeddings
from curated_data.config import load_config
from curated_data.errors import ConfigError
from curated_data.pipeline.reopen import reopen
from curated_data.report.explain import explain
from curated_data.stages.selection import Selection
from tests.support.long_tailed import long_tailed_rows

LEVELS = [{"n_clusters": 20}, {"n_clusters": 5}]


@pytest.fixture(scope="module")
def rows():
    return long_tailed_rows()


def run(rows, tmp_path, **changes):
    return curate_embeddings(rows, {"target_size": 200, **changes}, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampling": "hierarchical", "levels": LEVELS},
        {"sampling": "flat", "levels": LEVELS, "strategy": "closest", "quotas": {"level": 2}},
        {"quotas": {"temperature": 0.5, "cap": 40}},
        {"sampling": "hierarchical", "levels": LEVELS, "quotas": {"cap": 0.15, "weights": {0: 0, 3: 4}}},
        {"sampling": "greedy"},
    ],
    ids=["sparse", "hierarchical", "flat", "sparse by size", "caps and weights", "greedy"],
)
def test_nested_selections_hold_each_other_and_what_is_included(rows, tmp_path, how):
    included = [5, 77, 1400]
    curation = run(rows, tmp_path, nested_sizes=[20, 90], include=included, **how)
    small, middle = curation.nested[20], curation.nested[90]
    assert (len(small), len(middle)) == (20, 90)
    assert set(included) <= set(small) <= set(middle) <= set(curation.ids)
    again = reopen(tmp_path / "cache", curation.folders["selection"].name)
    assert {size: ids.tolist() for size, ids in again.nested.items()} == {
        20: small.tolist(),
        90: middle.tolist(),
    }
    lines = explain(again, 5)
    assert lines[-2:] == [
        "It was to be included, and counts in the quota of its cluster.",
        "Of the nested selections, it is in those of 20, 90.",
    ]
    largest_alone = run(rows, tmp_path, include=included, **how)
    assert np.array_equal(largest_alone.ids, curation.ids)


@pytest.mark.parametrize("sampling", ["hierarchical", "flat", "greedy"])
def test_curations_of_one_tree_contain_each_other(rows, tmp_path, sampling):
    how = {"sampling": sampling, "levels": LEVELS}
    large, small = (run(rows, tmp_path, target_size=size, **how) for size in (200, 90))
    assert large.folders["tree"] == small.folders["tree"]
    assert set(small.ids) < set(large.ids)


def test_caps_and_weights_are_kept_and_told(rows, tmp_path):
    first = run(rows, tmp_path, sampling="hierarchical", levels=LEVELS)
    top = first.tree.assignment(2)
    most = int(np.argmax(first.tree.sizes(2)))
    rules = {"cap": 30, "weights": {most: 0}, "level": 2}
    capped = run(rows, tmp_path, sampling="hierarchical", levels=LEVELS, quotas=rules)
    assert capped.folders["tree"] == first.folders["tree"]
    given = np.bincount(top[capped.ids], minlength=5)
    assert given[most] == 0
    assert given.max() <= 30
    assert len(capped.ids) == sum(min(30, n) for c, n in enumerate(first.tree.sizes(2)) if c != most)
    sample = int(np.flatnonzero(top == most)[0])
    assert "and gave 0 (weight 0, at most 30)." in explain(capped, sample)[0]
    # A file of weights is the same run as the numbers in it.
    np.save(tmp_path / "weights.npy", np.where(np.arange(5) == most, 0.0, 1.0))
    path = str(tmp_path / "weights.npy")
    by_file = run(rows, tmp_path, sampling="hierarchical", levels=LEVELS, quotas=rules | {"weights": path})
    assert np.array_equal(by_file.ids, capped.ids)


def test_included_samples_count_in_the_quota_of_their_cluster(rows, tmp_path):
    how = {"sampling": "hierarchical", "levels": LEVELS, "quotas": {"cap": 12}}
    first = run(rows, tmp_path, **how)
    cluster = int(np.argmax(first.tree.sizes(1)))
    included = first.tree.members(1, cluster)[:10].tolist()
    second = run(rows, tmp_path, include=included, **how)
    given = np.bincount(first.tree.parent[1][second.ids], minlength=20)
    assert np.array_equal(given, np.bincount(first.tree.parent[1][first.ids], minlength=20))
    assert set(included) <= set(second.ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quotas": {"level": 2, "cap": 3}}, "quotas.level: .* 2"),
        ({"quotas": {"weights": {99: 1}}}, "quotas.weights: .* 0 to 4.* 99"),
        ({"quotas": {"weights": [1] * 9}}, "quotas.weights: .* 5 .* 9 "),
        ({"quotas": {"weights": [0] * 5}}, "quotas.weights: .* 0"),
        ({"quotas": {"weights": "none.npy"}}, "quotas.weights: .*none.npy"),
        ({"sampling": "greedy", "max_repeats": 2}, "max_repeats: .*'greedy'"),
        ({"sampling": "greedy", "quotas": {"cap": 5}}, "quotas: .*'greedy'"),
        ({"sampling": "greedy", "strategy": "closest"}, "strategy: 'closest'"),
        ({"nested_sizes": [2], "include": [1, 2, 3]}, "include: 3 .*nested_sizes, 2"),
    ],
)
def test_what_the_tree_does_not_have_is_named(rows, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(rows, tmp_path, levels=[{"n_clusters": 5}], **changes)


def test_quotas_that_say_nothing_leave_the_name_of_a_selection():
    names = [
        Selection(Path("."), load_config({"target_size": 20, **more}), {"tree": "x"}).name
        for more in ({}, {"levels": [{"n_clusters": 4}], "include": [3]}, {"quotas": {"level": 1}})
    ]
    assert names[0] == names[2]
    assert names[0] != names[1]
