"""Clustering metrics and long-tail groups against scikit-learn, scipy and brute force."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.longtail import frequency_groups, longtail
from tests.support.ranks import on_two_ranks

labelings = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n) for _ in range(2)])
)


@settings(max_examples=40, deadline=None)
@given(labelings)
def test_agrees_with_scikit_learn(pair):
    assignment, labels = map(np.array, pair)
    result = clustering(assignment, labels)
    assert result.nmi == pytest.approx(metrics.normalized_mutual_info_score(labels, assignment), abs=1e-9)
    assert result.ari == pytest.approx(metrics.adjusted_rand_score(labels, assignment), abs=1e-9)
    # Brute force over all one-to-one matchings of the five possible clusters and classes.
    best = max(
        (np.array(matching)[assignment] == labels).mean() for matching in itertools.permutations(range(5))
    )
    assert result.accuracy == pytest.approx(best)
    table = np.full(6, 5)
    for cluster, label in result.matching.items():
        table[cluster] = label
    predicted = table[assignment]
    assert (predicted == labels).mean() == pytest.approx(best)
    present = np.unique(labels)
    f1 = metrics.f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert result.macro_f1 == pytest.approx(f1)
    recall = metrics.recall_score(labels, predicted, labels=present, average="macro", zero_division=0)
    assert result.class_accuracy == pytest.approx(recall)


@settings(max_examples=20, deadline=None)
@given(labelings, st.permutations(range(5)))
def test_names_of_clusters_do_not_matter(pair, names):
    assignment, labels = map(np.array, pair)
    one, other = clustering(assignment, labels), clustering(np.array(names)[assignment], labels)
    assert (one.accuracy, one.ari) == (other.accuracy, other.ari)
    assert one.nmi == pytest.approx(other.nmi)


def test_numbers_of_clusters_may_be_large():
    assignment, labels = np.array([3, 3, 0, 0, 7]), np.array([0, 0, 1, 1, 1])
    found = clustering(assignment * 10**12, labels)
    small = clustering(assignment, labels)
    assert found.matching == {c * 10**12: k for c, k in small.matching.items()} == {3 * 10**12: 0, 0: 1}
    assert (found.accuracy, found.macro_f1, found.n_clusters) == (small.accuracy, small.macro_f1, 3)


def test_numbers_of_classes_may_be_large():
    assignment, labels = np.array([3, 3, 0, 0, 7]), np.array([0, 0, 1, 1, 2])
    ids = np.array([7, 47_115, 2**40])
    found, small = clustering(assignment, ids[labels]), clustering(assignment, labels)
    assert found.matching == {3: 7, 0: 47_115, 7: 2**40}
    assert found == dataclasses.replace(small, matching=found.matching)


def test_more_clusters_than_classes_leave_some_unmatched():
    result = clustering(np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1]))
    assert result.accuracy == 0.5
    assert result.n_clusters == 4


def test_head_medium_and_tail():
    counts = np.array([5, 100, 50, 20, 80, 10, 7, 30, 3, 60])
    groups = frequency_groups(counts)
    assert [counts[groups == i].tolist() for i in range(3)] == [[100, 80, 60], [50, 20, 10, 30], [5, 7, 3]]
    labels = np.repeat(np.arange(10), 10)
    predictions = np.where(counts[labels] >= 60, labels, 0)
    result = longtail(predictions, labels, counts)
    assert result.groups == pytest.approx({"head": 1.0, "medium": 0.0, "tail": 1 / 3})
    assert result.accuracy == pytest.approx(0.4)
    assert clustering(labels, labels, train_counts=counts).groups == {"head": 1, "medium": 1, "tail": 1}


def test_groups_are_thirds_of_the_classes_or_other_shares():
    counts = np.arange(100, 70, -1)
    assert np.bincount(frequency_groups(counts)).tolist() == [10, 10, 10]
    assert np.bincount(frequency_groups(counts, (0.3, 0.4))).tolist() == [9, 12, 9]


def test_a_group_without_test_classes_is_undefined(tmp_path):
    result = longtail(np.array([0, 1]), np.array([0, 1]), np.arange(10, 0, -1))
    assert np.isnan(result.groups["tail"])
    assert "-" in result.table()
    result.to_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["groups"]["tail"] is None
    result.to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines()[0] == "accuracy,class average,head,medium,tail"


def _share(rank, assignment, labels, counts):
    part = slice(0, 17) if rank == 0 else slice(17, None)
    result = clustering(assignment[part], labels[part], train_counts=counts)
    tail = longtail(assignment[part], labels[part], counts)
    return [result.accuracy, result.nmi, result.ari, result.macro_f1, *result.groups.values(), tail.accuracy]


def test_two_ranks_get_the_result_of_one():
    generator = np.random.default_rng(0)
    assignment, labels = generator.integers(0, 5, 60), generator.integers(0, 5, 60)
    counts = np.array([9, 5, 4, 3, 1])
    whole = clustering(assignment, labels, train_counts=counts)
    want = [whole.accuracy, whole.nmi, whole.ari, whole.macro_f1, *whole.groups.values()]
    want.append(longtail(assignment, labels, counts).accuracy)
    for got in on_two_ranks(_share, assignment, labels, counts):
        assert got == pytest.approx(want)


@pytest.mark.parametrize(
    ("assignment", "labels", "options", "message"),
    [
        ([0, 1], [0], {}, "2 labels"),
        ([0, -1], [0, 1], {}, "^assignment: "),
        ([0, 1], [0, -1], {}, "leave unlabelled"),
        ([], [], {}, "no samples"),
        ([0, 1], [0, 3], {"train_counts": np.array([1, 2])}, "train_counts.* 2"),
    ],
)
def test_bad_input_is_named(assignment, labels, options, message):
    with pytest.raises(ValueError, match=message):
        clustering(np.array(assignment, int), np.array(labels, int), **options)


def test_labels_must_be_integers():
    with pytest.raises(TypeError, match="integers"):
        clustering(np.array([0, 1]), np.array([0.5, 1]))
