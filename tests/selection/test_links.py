"""The search for links against all pairs by scikit-learn, and its cells by their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from curated_data.selection.links import LinkSearch, Near, cells, choose_pivots, mean_cell_size

THRESHOLD = 0.9503  # of no pair to seven digits, so that rounding decides nothing


def copies(n_originals: int, n_copies: int, dimension: int = 8, noise: float = 0.1, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(n_originals, dimension)), n_copies, axis=0)
    x += noise * rng.normal(size=x.shape)
    return (x * rng.uniform(0.5, 2, (len(x), 1))).astype(np.float32)[rng.permutation(len(x))]


@settings(max_examples=40, deadline=None)
@given(
    n_originals=st.integers(1, 40),
    n_copies=st.integers(1, 4),
    noise=st.sampled_from([0.02, 0.1, 0.3]),
    cell_size=st.sampled_from([None, 10, 37]),
    seed=st.integers(0, 99),
)
def test_all_links_are_found_however_the_pool_is_cut(n_originals, n_copies, noise, cell_size, seed):
    x = copies(n_originals, n_copies, noise=noise, seed=seed)
    ids = np.random.default_rng(seed).permutation(len(x))[: -(-len(x) * 3 // 4)]  # of some rows
    similarity = cosine_similarity(x)
    search = LinkSearch(x, THRESHOLD, len(x), n_probes=len(x), cell_size=cell_size, seed=seed)
    found = search(ids, ids)
    expected = np.argwhere(np.triu(similarity >= THRESHOLD, 1))
    expected = expected[np.isin(expected, ids).all(axis=1)]
    assert np.array_equal(found.pairs, expected)
    np.testing.assert_allclose(found.cosine, similarity[tuple(expected.T)], atol=1e-5)
    assert found.complete == (cell_size is None or len(ids) <= cell_size)
    # From some rows to others, of each only the nearest.
    half, rest = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    found = search(half, rest, n_neighbours=1)
    linked = half[(similarity[np.ix_(half, rest)] >= THRESHOLD).any(axis=1)]
    assert np.isin(linked, found.pairs).all()
    for pair in found.pairs.tolist():
        assert len({*pair} & {*half.tolist()}) == 1
        assert similarity[pair[0], pair[1]] >= THRESHOLD


def test_float64_decides_at_the_threshold():
    """Hundreds of rows that float32 cannot tell from the threshold, all but one just below it."""
    angle = np.arccos(0.95) + np.linspace(1e-9, 1e-7, 500)
    angle[321] = np.arccos(0.95) - 1e-9
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    row, place, cosine, _ = Near(rows, 0.95).search(np.array([[1.0, 0.0], [-1.0, 0.0]]), 1)
    assert row.tolist() == [0]
    assert place.tolist() == [321]
    assert cosine == pytest.approx(0.95)
    exact = np.array([[3.0, 4.0], [3.0, 4.1]])
    assert Near(exact, 0.6).search(np.array([[1.0, 0.0]]), 5)[1].tolist() == [0]


@pytest.mark.parametrize("n_probes", [1, 3, 100])
def test_cells_by_their_definition(n_probes, monkeypatch):
    """Each row's cell is that of its nearest pivot; its probes are the nearest others within reach."""
    monkeypatch.setattr("curated_data.selection.links._PIVOT_DISTANCES", 130)  # a few rows at once
    x = copies(300, 2, dimension=4)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pivots = choose_pivots(x, np.arange(len(x)), 20, 0)
    assert len(np.unique(pivots, axis=0)) == len(pivots) == 20
    home, probes = cells(x, np.arange(len(x)), pivots, 0.9, n_probes, block=64)
    squared = 2 - 2 * x @ pivots.T
    np.testing.assert_array_equal(home, squared.argmin(1))
    reach = np.sqrt(2 - 2 * 0.9) + 1e-3
    for q in range(len(x)):
        near = np.argsort(squared[q], kind="stable")[1:]
        apart = np.linalg.norm(pivots[near] - pivots[home[q]], axis=1)
        allowed = near[squared[q, near] - squared[q, home[q]] <= 2 * reach * apart + 1e-6][:n_probes]
        assert probes[q][probes[q] >= 0].tolist() == allowed.tolist()


def test_cells_keep_their_distances_in_memory():
    for n in (1, 16_384, 16_385, 10**6, 10**8, 10**9):
        cell = mean_cell_size(n)
        assert 1_024 <= cell <= 16_384
        assert n / cell <= 8_192 or cell == 16_384
