"""Independent sets against the plain greedy loop, for any graph."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.selection.cover import independent_set


def one_by_one(edges: np.ndarray, rank: np.ndarray) -> np.ndarray:
    taken = np.zeros(len(rank), bool)
    for vertex in np.argsort(rank):
        mine = edges[(edges == vertex).any(axis=1)]
        taken[vertex] = not taken[mine[mine != vertex]].any()
    return taken


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 60), density=st.sampled_from([0, 0.02, 0.1, 0.5, 1.0]), seed=st.integers(0, 999))
def test_it_is_what_one_by_one_gives(n, density, seed):
    rng = np.random.default_rng(seed)
    edges = np.argwhere(np.triu(rng.random((n, n)) < density, 1))
    edges = np.where(rng.random((len(edges), 1)) < 0.5, edges, edges[:, ::-1])
    rank = rng.permutation(n)
    assert np.array_equal(independent_set(edges, rank), one_by_one(edges, rank))


def test_a_long_chain_in_order_of_rank():
    n = 20_000
    edges = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    assert np.array_equal(independent_set(edges, np.arange(n)), np.arange(n) % 2 == 0)
