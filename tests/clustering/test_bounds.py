"""Rows kept up to date by what moved are where comparing with everything would put them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from curated_data.clustering import neighbourhoods
from curated_data.clustering.bounds import WIDTH, Bounds, widened
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.nearest import Centroids
from curated_data.clustering.neighbourhoods import Neighbourhoods, coarse_centres, nearest_of_all


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(2, 200),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    step=st.sampled_from([0.01, 0.3, 3.0]),
)
def test_bounds_hold_and_rows_are_assigned_as_by_brute_force(seed, k, shares, step):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    centroids = rng.normal(size=(k, 5)).astype(np.float32)
    rows, every = torch.from_numpy(x), np.arange(k)
    bounds = Bounds(len(x))
    bounds.compare(slice(None), rows, every, Centroids(torch.from_numpy(centroids)))
    for share in shares:
        moved = rng.random(k) < share
        centroids[moved] += step * rng.normal(size=(int(moved.sum()), 5)).astype(np.float32)
        ids = widened(moved)
        if len(ids):
            unsure = bounds.compare_moved(slice(None), rows, ids, Centroids(torch.from_numpy(centroids[ids])))
            bounds.compare(unsure, rows[unsure], every, Centroids(torch.from_numpy(centroids)))
        squared = cdist(x, centroids, "sqeuclidean")
        norms = np.square(x.astype(np.float64)).sum(1)
        at = np.arange(len(x))
        found = squared[at, bounds.assignment]
        np.testing.assert_allclose(bounds.own + norms, found, atol=1e-4)
        np.testing.assert_allclose(found, squared.min(1), atol=1e-4)
        squared[at, bounds.assignment] = np.inf
        assert (bounds.other + norms <= squared.min(1) + 1e-4).all()


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_moved_centroids_are_filled_up_to_a_width(moved):
    moved = np.array(moved)
    places = widened(moved)
    assert np.isin(np.flatnonzero(moved), places).all()
    assert (np.diff(places) > 0).all()
    assert len(places) % WIDTH == 0 or len(places) == len(moved)
    assert len(places) - moved.sum() < WIDTH


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
def test_a_look_at_what_moved_finds_what_a_look_at_all_finds(share, monkeypatch):
    monkeypatch.setattr(neighbourhoods, "_CANDIDATES", 160)
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(60, 8)) * 2
    x = (middle[rng.integers(0, 60, 6_000)] + rng.normal(size=(6_000, 8))).astype(np.float32)
    rows = prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None).hold()
    centroids = rows.take(rng.choice(6_000, 1_200, replace=False))
    centres = coarse_centres(centroids)
    near, bounds = Neighbourhoods(rows, centres), Bounds(6_000)
    near.look(centroids, None, bounds)
    n_changed = 0
    for _ in range(6):
        moved = rng.random(1_200) < share
        centroids = centroids.clone()
        centroids[moved] += 0.4 * torch.from_numpy(rng.normal(size=(int(moved.sum()), 8))).float()
        before = bounds.assignment.copy()
        near.look(centroids, moved, bounds)
        afresh = Bounds(6_000)
        Neighbourhoods(rows, centres).look(centroids, None, afresh)
        np.testing.assert_array_equal(bounds.assignment, afresh.assignment)
        np.testing.assert_allclose(bounds.own, afresh.own, atol=1e-4)
        assert (bounds.other <= afresh.other + 1e-4).all()
        n_changed += (before != bounds.assignment).sum()
    assert n_changed > 100

    # A row may belong to a centroid outside its neighbourhood, which then moves, and none else does.
    row = near.order[0]
    outside = np.setdiff1d(np.arange(1_200), near.seen[near.cells[0][0]])[0]
    moved = np.arange(1_200) == outside
    bounds.assignment[row], bounds.own[row] = outside, -1e6
    near.look(centroids, moved, bounds)
    np.testing.assert_array_equal(bounds.assignment, afresh.assignment)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 3.0])
def test_centroids_out_of_reach_are_not_among_the_two_nearest(spread):
    rng = np.random.default_rng(1)
    middle = rng.normal(size=(40, 12)) * 3
    x = middle[rng.integers(0, 40, 5_000)] + rng.normal(size=(5_000, 12)) * spread
    x = x.astype(np.float32)
    rows = prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None).hold()
    centroids = rows.take(rng.choice(5_000, 1_100, replace=False))
    near, bounds = Neighbourhoods(rows, coarse_centres(centroids)), Bounds(5_000)
    near.look(centroids, None, bounds)
    everything, whole = Neighbourhoods(rows, near.centres), Bounds(5_000)
    everything.radii[:] = np.inf
    everything.look(centroids, None, whole)
    assert (everything.seen >= 0).all()
    if spread < 1:
        assert (near.seen < 0).mean() > 0.5
    np.testing.assert_array_equal(bounds.assignment, whole.assignment)
    np.testing.assert_allclose(bounds.own, whole.own, atol=1e-3)
    np.testing.assert_allclose(bounds.other, whole.other, atol=1e-3)


@pytest.mark.parametrize(("spread", "far"), [(0.05, 3.0), (0.3, 3.0), (3.0, 3.0), (0.3, 0.0)])
def test_an_exact_look_finds_the_two_nearest_of_all(spread, far):
    """Beside a dense cloud, whose neighbourhoods are never complete, lie islands, whose are, or clouds."""
    rng = np.random.default_rng(2)
    middle = rng.normal(size=(40, 12)) * far
    x = middle[rng.integers(0, 40, 5_000)] + rng.normal(size=(5_000, 12)) * spread
    x[:1_500] = rng.normal(size=(1_500, 12)) * 0.5 + 20
    rows = prepare(
        x.astype(np.float32), metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None
    ).hold()
    centroids = rows.take(rng.choice(5_000, 1_100, replace=False))
    near, bounds = Neighbourhoods(rows, coarse_centres(centroids)), Bounds(5_000)
    complete = near._neighbours(centroids)[1]
    assert not complete.all()
    assert near.look_exactly(centroids, bounds) == complete.any() == (spread < 1 and far > 0)
    centred = rows.block(0, 5_000).double()
    squared = torch.cdist(centred, centroids.double()).square() - centred.square().sum(1, keepdim=True)
    two = squared.topk(2, largest=False).values
    found = torch.from_numpy(nearest_of_all(rows, centroids))
    np.testing.assert_allclose(squared.gather(1, found[:, None])[:, 0], two[:, 0], atol=2e-3)
    if complete.any():
        np.testing.assert_array_equal(bounds.assignment, found)
        np.testing.assert_allclose(bounds.own, two[:, 0], atol=2e-3)
        np.testing.assert_allclose(bounds.other, two[:, 1], atol=2e-3)
    else:
        assert (bounds.assignment == -1).all()
