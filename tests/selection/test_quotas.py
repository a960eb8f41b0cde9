"""Quotas against a division in exact fractions, and their properties on any tree."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from curated_data.clustering.tree import ClusterTree
from curated_data.selection.nested import nested_sample
from curated_data.selection.quotas import Quotas, tree_quotas, water_fill
from curated_data.selection.sampling import flat_sample, hierarchical_sample
from curated_data.selection.sparse import Neighbours, sparse_sample
from tests.selection.test_sampling import make_tree, trees

WEIGHTS = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 4).map(float))


def exact_shares(target: int, capacities: list[int], weights: list[float]) -> list[Fraction]:
    """Each child's share as a fraction: children are taken off as they are exhausted, one at a time."""
    shares = [Fraction(0)] * len(capacities)
    waiting = {i for i, (c, w) in enumerate(zip(capacities, weights)) if c and w}
    left = Fraction(min(target, sum(capacities[i] for i in waiting)))
    while waiting:
        cut = left / sum(Fraction(weights[i]) for i in waiting)
        full = {i for i in waiting if cut * Fraction(weights[i]) >= capacities[i]}
        for i in full or waiting:
            shares[i] = Fraction(capacities[i]) if full else cut * Fraction(weights[i])
        left -= sum(shares[i] for i in full)
        waiting = waiting - full if full else set()
    return shares


@settings(max_examples=500, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.lists(st.tuples(st.integers(0, 30), WEIGHTS), max_size=8), st.integers(0, 90)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 9),
)
def test_weighted_water_filling_is_the_exact_division_rounded(groups, seed):
    capacity = np.array([c for children, _ in groups for c, _ in children], np.int64)
    weight = np.array([w for children, _ in groups for _, w in children], np.float64)
    parent = np.array([g for g, (children, _) in enumerate(groups) for _ in children], np.int64)
    mixed = np.random.default_rng(seed).permutation(len(capacity))
    target = np.array([t for _, t in groups])
    share = np.empty(len(capacity), np.int64)
    share[mixed] = water_fill(
        target, capacity[mixed], parent[mixed], np.random.default_rng(seed), weight[mixed]
    )
    for g, (children, t) in enumerate(groups):
        given_ = share[parent == g].tolist()
        exact = exact_shares(t, [c for c, _ in children], [w for _, w in children])
        assert sum(given_) == sum(exact)
        # Rounded down or up; a share within rounding of an integer may be either side of it.
        assert all(abs(s - e) < 1 + 1e-6 for s, e in zip(given_, exact)), (given_, exact)
        assert all(s <= c for s, (c, _) in zip(given_, children))


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    target=st.integers(0, 200),
    seed=st.integers(0, 5),
)
def test_equal_weights_divide_as_none(capacity, target, seed):
    capacity = np.array(capacity)
    parent = np.zeros(len(capacity), np.int64)
    target = np.array([min(target, capacity.sum())])
    plain = water_fill(target, capacity, parent, np.random.default_rng(seed))
    weighted = water_fill(target, capacity, parent, np.random.default_rng(seed), np.full(len(capacity), 2.5))
    assert (np.abs(plain - weighted) <= 1).all()
    assert plain.sum() == weighted.sum()


def test_remainders_come_with_the_probability_of_what_was_cut_off():
    weight = np.array([1.0, 2.0, 3.0, 4.0])
    total = np.zeros(4)
    n = 4000
    for seed in range(n):
        total += water_fill(
            np.array([2]), np.full(4, 50), np.zeros(4, int), np.random.default_rng(seed), weight
        )
    assert total.sum() == 2 * n
    expected = 2 * n * weight / 10
    # With so few drawn, Pareto sampling is off by up to 7 per cent; a sample of this size by 3.
    np.testing.assert_allclose(total, expected, rtol=0.11)


RULES = st.builds(
    lambda temperature, cap, weighted, seed: (temperature, cap, weighted, seed),
    st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])),
    st.one_of(st.none(), st.integers(1, 20), st.sampled_from([0.05, 0.3])),
    st.booleans(),
    st.integers(0, 99),
)


def rules_for(tree: ClusterTree, drawn, level: int) -> Quotas:
    temperature, cap, weighted, seed = drawn
    k = len(tree.centroids[level])
    weights = np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 3.0], k) if weighted else None
    return Quotas(temperature, cap, weights, level)


def select(kind: str, tree: ClusterTree, target: int, repeats: int, seed: int, rules: Quotas):
    if kind == "sparse":
        return sparse_sample(tree, neighbours_of(tree), target, max_repeats=repeats, seed=seed, quotas=rules)
    sample = flat_sample if kind == "flat" else hierarchical_sample
    return sample(tree, target, max_repeats=repeats, seed=seed, quotas=rules)


def nest(kind: str, tree: ClusterTree, ids, target: int, repeats: int, seed: int, rules: Quotas | None):
    if kind == "sparse":
        how = {"max_repeats": repeats, "seed": seed, "quotas": rules, "within": ids}
        return sparse_sample(tree, neighbours_of(tree), target, **how)
    return nested_sample(tree, ids, target, flat=kind == "flat", seed=seed, quotas=rules)


def neighbours_of(tree: ClusterTree) -> Neighbours:
    rng = np.random.default_rng(0)
    figures = rng.uniform(0.1, 1, (3, tree.n_samples)).astype(np.float32)
    figures[:, tree.parent[1] < 0] = np.nan
    return Neighbours(*figures)


def allowed(tree: ClusterTree, target: int, repeats: int, rules: Quotas) -> int:
    """What caps and weights allow of a target, cluster by cluster."""
    if rules.cap is None:
        most = np.inf
    else:
        most = rules.cap if rules.cap >= 1 else max(1, int(rules.cap * target))
    total = 0
    for cluster, size in enumerate(tree.sizes(rules.level)):
        if rules.weights is None or rules.weights[cluster] > 0:
            total += min(size * repeats, most)
    return int(min(target, total))


@settings(max_examples=300, deadline=None)
@given(
    tree=trees(),
    kind=st.sampled_from(["hierarchical", "flat", "sparse"]),
    targets=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    repeats=st.integers(1, 3),
    drawn=RULES,
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_selections_meet_the_target_or_all_that_caps_allow_and_nest(
    tree, kind, targets, repeats, drawn, seed, data
):
    level = data.draw(st.integers(1, tree.n_levels))
    rules = rules_for(tree, drawn, level)
    most_of_tree = int((tree.parent[1] >= 0).sum()) * repeats
    small, large = (min(target, most_of_tree) for target in sorted(targets))
    ids = select(kind, tree, large, repeats, seed, rules)
    assert len(ids) == allowed(tree, large, repeats, rules)
    assert (np.diff(ids) >= 0).all()
    assert (tree.parent[1][ids] >= 0).all()
    assert np.bincount(ids, minlength=1).max() <= repeats
    given_ = np.bincount(tree.assignment(level, ids), minlength=len(tree.centroids[level]))
    if rules.cap is not None:
        most = rules.cap if rules.cap >= 1 else max(1, int(rules.cap * large))
        assert given_.max(initial=0) <= most
    if rules.weights is not None:
        assert not given_[rules.weights == 0].any()
    inner = nest(kind, tree, ids, small, repeats, seed, rules)
    counts = np.bincount(ids, minlength=tree.n_samples) - np.bincount(inner, minlength=tree.n_samples)
    assert (counts >= 0).all()
    if rules.cap is None or rules.cap >= 1:
        assert len(inner) == min(small, len(ids))
    assert np.array_equal(inner, nest(kind, tree, ids, small, repeats, seed, rules))


def test_no_rules_change_nothing():
    tree = make_tree([np.arange(1000) % 37, np.arange(37) % 5], [37, 5])
    for sample in (hierarchical_sample, flat_sample):
        assert np.array_equal(sample(tree, 300, seed=3), sample(tree, 300, seed=3, quotas=Quotas()))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_quotas_are_proportional_to_a_power_of_the_size(temperature):
    sizes = np.array([400, 1600, 6400])
    tree = make_tree([np.repeat(np.arange(3), sizes)], [3])
    quota = tree_quotas(tree, 300, sizes, np.random.default_rng(0), Quotas(temperature))
    expected = 300 * sizes**temperature / (sizes**temperature).sum()
    np.testing.assert_allclose(quota, expected, atol=1)


@settings(max_examples=300, deadline=None)
@given(
    tree=trees(),
    kind=st.sampled_from(["hierarchical", "flat"]),
    targets=st.tuples(st.integers(0, 120), st.integers(0, 120)),
    repeats=st.integers(1, 3),
    cap=st.none() | st.integers(1, 20),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_selections_drawn_apart_contain_each_other_if_clusters_share_evenly(
    tree, kind, targets, repeats, cap, seed, data
):
    level = data.draw(st.integers(1, tree.n_levels))
    rules = None if cap is None else Quotas(cap=cap, level=level)
    small, large = (select(kind, tree, target, repeats, seed, rules) for target in sorted(targets))
    n = tree.n_samples
    assert (np.bincount(small, minlength=n) <= np.bincount(large, minlength=n)).all()


def test_a_nested_selection_is_as_likely_as_one_drawn_alone():
    """Of clusters of 5 and 45, by sparse weights that differ by up to a factor of ten."""
    tree = make_tree([[0] * 5 + [1] * 45], [2])
    near = neighbours_of(tree)
    alone, inside = np.zeros(50), np.zeros(50)
    n = 3000
    for seed in range(n):
        alone[sparse_sample(tree, near, 8, seed=seed)] += 1
        large = sparse_sample(tree, near, 25, seed=seed)
        inside[sparse_sample(tree, near, 8, seed=seed, within=large)] += 1
    assert alone.sum() == inside.sum() == 8 * n
    np.testing.assert_allclose(inside / n, alone / n, atol=0.05)
    assert stats.pearsonr(inside, alone).statistic > 0.99


def test_nested_quotas_are_those_of_the_smaller_target_alone():
    sizes = np.array([3, 10, 30, 200])
    tree = make_tree([np.repeat(np.arange(4), sizes)], [4])
    large = hierarchical_sample(tree, 100, seed=1)
    small = nested_sample(tree, large, 21, seed=1)
    assert np.bincount(tree.parent[1][small]).tolist() == [3, 6, 6, 6]


def test_closest_samples_stay_the_closest_in_a_nested_selection():
    distance = np.random.default_rng(0).random(300).astype(np.float32)
    tree = make_tree([np.arange(300) % 3], [3], distance)
    large = hierarchical_sample(tree, 90, strategy="closest")
    small = nested_sample(tree, large, 30, strategy="closest")
    assert np.array_equal(small, hierarchical_sample(tree, 30, strategy="closest"))
