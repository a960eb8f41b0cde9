"""Greedy facility location, beside all selections that there are and beside a search of every step."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import Level, hierarchical_kmeans
from curated_data.matrix import unit
from curated_data.selection import sparse
from curated_data.selection.greedy import greedy_order
from curated_data.selection.sparse import cells, mean_direction
from tests.selection.test_sampling import make_tree


def rows_of(seed: int, n: int) -> np.ndarray:
    """With copies, and a row of zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 4)).astype(np.float32) + 1
    rows[rng.integers(n)] = rows[rng.integers(n)]
    rows[rng.integers(n)] = 0
    return rows


def value(cosine: np.ndarray, chosen: list[int]) -> float:
    return float((1 + cosine[:, chosen].max(axis=1)).sum())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), data=st.data())
def test_the_value_is_that_which_theory_promises(seed, n, data):
    rows, tree = rows_of(seed, n), make_tree([[0] * n], [1])
    size = data.draw(st.integers(1, n))
    order = greedy_order(rows, tree, size)
    assert len(set(order.tolist())) == size
    about = unit(unit(rows) - mean_direction(rows, tree)).astype(np.float64)
    cosine = about @ about.T
    best = max(value(cosine, list(some)) for some in combinations(range(n), size))
    assert value(cosine, order.tolist()) >= (1 - 1 / np.e) * best - 1e-4
    if size == 1:
        assert value(cosine, order.tolist()) == pytest.approx(best, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60), k=st.integers(1, 6), cell=st.integers(2, 20))
def test_every_step_takes_what_adds_most_of_all_cells(seed, n, k, cell):
    rows = rows_of(seed, n)
    cluster = np.random.default_rng(seed).integers(-1, k, n)
    tree = make_tree([cluster], [k])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "CELL", cell)
        order = greedy_order(rows, tree, n)
        shorter = greedy_order(rows, tree, n // 2)
        parts = [ids for ids, _ in cells(rows, tree)]
    assert sorted(order) == sorted(np.flatnonzero(cluster >= 0))
    assert np.array_equal(shorter, order[: n // 2])
    assert all(len(ids) <= cell for ids in parts)
    about = unit(unit(rows) - mean_direction(rows, tree)).astype(np.float64)
    shared = np.full((n, n), -1.0)  # what lies in another cell adds nothing
    for ids in parts:
        shared[np.ix_(ids, ids)] = (about @ about.T)[np.ix_(ids, ids)]
    nearest, left = np.full(n, -1.0), np.flatnonzero(cluster >= 0).tolist()
    for sample in order.tolist():
        gains = np.maximum(shared - nearest, 0).sum(axis=1)
        assert gains[sample] >= gains[left].max() - 1e-4
        left.remove(sample)
        nearest = np.maximum(nearest, shared[sample])


def test_a_tree_of_a_real_clustering_and_rows_that_are_excluded():
    rows = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    rows[7] = np.nan
    tree = hierarchical_kmeans(rows, [Level(5)], metric="cosine")
    order = greedy_order(rows, tree, 600)
    assert sorted(order.tolist()) == [i for i in range(500) if i != 7]
