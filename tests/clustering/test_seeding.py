"""Greedy k-means++ against its definition: what is drawn, what is kept, on any number of ranks."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from sklearn.cluster import kmeans_plusplus

from curated_data.clustering import Level, hierarchical_kmeans, seeding
from curated_data.clustering.greedy import _draw_by_strips, _greedy_on_device, _running_sums, plain_greedy
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.seeding import _Cells, greedy_kmeans_plus_plus, seed_rows
from tests.oracles.clustering import clouds, squared_distances


def rows_of(x):
    return prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None).hold()


def by_definition(x, k, seed, trials):
    """Greedy k-means++ in float64, with the same uniform numbers."""
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(x)))]
    gap = squared_distances(x, x[chosen])[:, 0]
    for _ in range(k - 1):
        aim = rng.random(trials) * gap.sum()
        drawn = np.minimum(np.searchsorted(np.cumsum(gap), aim, side="right"), len(x) - 1)
        lower = np.minimum(gap, squared_distances(x[drawn], x))
        chosen.append(int(drawn[lower.sum(1).argmin()]))
        gap = lower[lower.sum(1).argmin()]
    return np.array(chosen)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_plain_form_is_the_definition(seed):
    x = clouds(3000, 6, 40, seed=seed)
    ours = plain_greedy(torch.from_numpy(x), 60, np.random.default_rng(seed), trials=6)
    np.testing.assert_array_equal(ours, by_definition(x.astype(np.float64), 60, seed, 6))
    few = x[:400]  # all distances are computed first
    ours = plain_greedy(torch.from_numpy(few), 150, np.random.default_rng(seed), trials=7)
    np.testing.assert_array_equal(ours, by_definition(few.astype(np.float64), 150, seed, 7))


def test_candidates_are_drawn_in_proportion_to_their_gaps():
    rng = np.random.default_rng(0)
    gap = torch.zeros(3 * 1024)
    some = np.array([0, 5, 1023, 1024, 1500, 2047, 2048, 2500])
    weight = rng.random(len(some)) + 0.1
    gap[torch.from_numpy(some)] = torch.from_numpy(weight).float()
    drawn = _draw_by_strips(gap, 40_000, rng)
    assert np.isin(drawn, some).all()
    counts = np.array([(drawn == place).sum() for place in some])
    assert chisquare(counts, weight / weight.sum() * len(drawn)).pvalue > 1e-3
    assert _draw_by_strips(torch.zeros(2048), 3, rng) is None


def on_device(x, k, seed, trials):
    x, rng = torch.from_numpy(x), np.random.default_rng(seed)
    return _greedy_on_device(x, x.square().sum(1), k, rng, trials, int(rng.integers(len(x))), None)


@pytest.mark.parametrize("n", [700, 3000])
def test_devices_form_is_the_definition(n):
    x = clouds(n, 6, 40, seed=0)
    np.testing.assert_array_equal(on_device(x, 60, 0, 6), by_definition(x.astype(np.float64), 60, 0, 6))
    repeated = np.repeat(clouds(20, 4, 5, seed=0), n // 20, axis=0)
    chosen = on_device(repeated, 40, 0, 6)
    assert len(np.unique(chosen)) == 40
    assert len(np.unique(repeated[chosen], axis=0)) == 20


def test_devices_form_never_waits_for_the_device():
    """No operation in it hands a number to the host, which would have to wait for all that is queued."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        on_device(clouds(3000, 6, 40, seed=0), 60, 0, 6)
    called = {event.key: event.count for event in profile.key_averages()}
    assert called["aten::addmm_"] == 60
    assert not called.keys() & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}


@pytest.mark.parametrize("n", [1, 7, 1024, 1025, 5000, 3 << 20])
def test_running_sums_are_numpys(n):
    values = torch.from_numpy(np.random.default_rng(n).random(n))
    upper = torch.ones(1024, 1024, dtype=torch.float64).triu()
    np.testing.assert_allclose(_running_sums(values, upper), np.cumsum(values.numpy()), rtol=1e-12)


@pytest.mark.long
def test_cells_choose_as_well_as_the_plain_form():
    """Their sum of squared distances is that of the plain form, over a few seeds, within one percent."""
    x = clouds(20_000, 24, 300, seed=0)
    sums = {"cells": [], "plain": []}
    for seed in range(3):
        for name, chosen in (
            ("cells", greedy_kmeans_plus_plus(rows_of(x), 600, np.random.default_rng(seed))),
            ("plain", plain_greedy(torch.from_numpy(x), 600, np.random.default_rng(seed), trials=8)),
        ):
            assert len(np.unique(chosen)) == 600
            sums[name].append(squared_distances(x, x[chosen]).min(1).sum())
    assert np.mean(sums["cells"]) < 1.01 * np.mean(sums["plain"])


def on_device_weighted(x, k, rng, trials, weight):
    norms, first = x.square().sum(1), int(rng.choice(len(x), p=weight / weight.sum()))
    return _greedy_on_device(x, norms, k, rng, trials, first, torch.from_numpy(weight).float())


@pytest.mark.parametrize("form", [plain_greedy, on_device_weighted])
@pytest.mark.parametrize("n", [12, 120])  # by all distances, which are computed first, and step by step
def test_weighted_rows_are_chosen_as_by_scikit_learn_and_as_repeated_rows(form, n):
    """How often each group of rows is chosen, first and in all, by a chi-squared test of homogeneity."""
    rng, k, rounds = np.random.default_rng(3), 3, 600
    x = (rng.normal(size=(n, 2)) * [3, 1]).astype(np.float32)
    times = rng.integers(0, 3, n) * np.where(x[:, 0] < 0, 1, 6)
    group = np.argsort(np.argsort(x[:, 0])) * 12 // n
    trials, weight = 2 + int(np.log(k)), times.astype(np.float64)
    repeated = np.repeat(np.arange(n), times)
    found = {"ours": [], "scikit-learn": [], "repeated": []}
    for number in range(rounds):
        generator = np.random.default_rng(number)
        found["ours"].append(form(torch.from_numpy(x), k, generator, trials, weight))
        found["scikit-learn"].append(kmeans_plusplus(x, k, sample_weight=weight, random_state=number)[1])
        found["repeated"].append(repeated[kmeans_plusplus(x[repeated], k, random_state=rounds + number)[1]])
    assert (weight[np.stack(found["ours"])] > 0).all()
    for of in (slice(0, 1), slice(0, k)):
        counts = [np.bincount(group[np.stack(rows)[:, of]].ravel(), minlength=12) for rows in found.values()]
        there = np.sum(counts, axis=0) > 0
        assert chi2_contingency(np.array(counts)[:, there]).pvalue > 1e-3
        of_rows = np.bincount(group[weight > 0], minlength=12)[there]  # as if all weights were the same
        assert chisquare(counts[0][there], of_rows / of_rows.sum() * np.sum(counts[0])).pvalue < 1e-6


@pytest.mark.long
def test_weighted_cells_choose_as_well_as_the_plain_form():
    """And better by weighted distance than without weights; also of rows that are drawn by weight."""
    x = clouds(20_000, 24, 300, seed=0)
    weight = np.random.default_rng(0).lognormal(0, 2, len(x))
    sums = {"cells": [], "plain": [], "drawn": [], "unweighted": []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for name, chosen in (
            ("cells", greedy_kmeans_plus_plus(rows_of(x), 600, rng, weight=weight)),
            ("plain", plain_greedy(torch.from_numpy(x), 600, rng, 8, weight)),
            ("drawn", seed_rows(rows_of(x), 600, "k-means++", rng, max_rows=12_000, weight=weight)),
            ("unweighted", greedy_kmeans_plus_plus(rows_of(x), 600, rng)),
        ):
            assert len(np.unique(chosen)) == 600
            sums[name].append((squared_distances(x, x[chosen]).min(1) * weight).sum())
    cells, plain, drawn, unweighted = (np.mean(values) for values in sums.values())
    assert cells < 1.02 * plain
    assert drawn < 1.05 * plain
    assert plain < 0.95 * unweighted


def test_seeds_are_different_rows_where_few_have_any_weight():
    x = clouds(2_000, 4, 10, seed=0)
    weight = np.zeros(len(x))
    weight[[3, 1_000]] = 1e-300, 1e300
    for max_rows in (100, len(x)):
        chosen = seed_rows(
            rows_of(x), 40, "k-means++", np.random.default_rng(0), max_rows=max_rows, weight=weight
        )
        assert len(np.unique(chosen)) == 40
        assert 1_000 in chosen


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_candidates_gain_nothing_in_cells_out_of_reach(spread):
    """Of the gains, taken by their definition in float64, none is missing."""
    rng = np.random.default_rng(0)
    middle = rng.normal(size=(60, 16)) * 3
    x = (middle[rng.integers(0, 60, 6_000)] + rng.normal(size=(6_000, 16)) * spread).astype(np.float32)
    rows = rows_of(x)
    first = rng.choice(6_000, 90, replace=False)
    cells = _Cells(rows, first, 32, 24, 0, 1)
    cells.choose(150, 7, rng)
    cells.choose(150, 7, rng)  # begins with the gaps to all centres of the first time
    drawn = rng.choice(6_000, 200, replace=False)
    at = cells._known(drawn)
    if spread < 1:
        assert (cells.place[at] < 0).mean() > 0.3
    gains = cells._gains(np.arange(200), cells.near[at], cells.place[at], cells.scores)
    centred = rows.block(0, 6_000).double().numpy()
    gap, members = cells._gap(), cells.row
    for i, row in enumerate(drawn):
        for j, cell in enumerate(cells.near[at[i]]):
            inside = members[cell][members[cell] >= 0]
            away = squared_distances(centred[row : row + 1], centred[inside])[0]
            expected = np.maximum(gap[cell, : len(inside)] - away, 0).sum()
            assert abs(gains[i, j] - expected) <= 1e-3 * (1 + expected)


def test_scores_need_not_be_kept(monkeypatch):
    """A row that is drawn again is not computed again while there is room; without, nothing else changes."""
    half = np.random.default_rng(0).integers(-9, 10, (4_000, 6)).astype(np.float32)
    x = np.concatenate([half, -half])  # integers around zero: products are exact in any order
    computed = []
    compute = _Cells._compute
    monkeypatch.setattr(_Cells, "_compute", lambda self, rows: (computed.append(rows), compute(self, rows)))
    kept = greedy_kmeans_plus_plus(rows_of(x), 1_500, np.random.default_rng(0))
    rows = np.concatenate(computed)
    assert len(rows) == len(np.unique(rows))
    computed.clear()
    monkeypatch.setattr(seeding, "SCORES_BYTES", 4 * 24 * 32 * 1_500)  # a round of 1,500 candidates
    dropped = greedy_kmeans_plus_plus(rows_of(x), 1_500, np.random.default_rng(0))
    rows = np.concatenate(computed)
    assert len(rows) > 1.2 * len(np.unique(rows))
    differ = squared_distances(x, x[kept]).min(1).sum() / squared_distances(x, x[dropped]).min(1).sum()
    assert abs(differ - 1) < 0.01


def test_repeated_rows_are_made_up_for():
    x = np.repeat(clouds(30, 4, 5, seed=0), 200, axis=0)
    for k in (20, 30, 100, 2000):
        chosen = seed_rows(rows_of(x), k, "k-means++", np.random.default_rng(0), max_rows=len(x))
        assert len(np.unique(chosen)) == k
        assert len(np.unique(x[chosen], axis=0)) == min(k, 30)


def test_resamplings_may_stop_early():
    x = clouds(4000, 8, 60, seed=0)
    levels = [Level(200, 3, 8), Level(20, 3, 4)]
    published = hierarchical_kmeans(x, levels, seed=0)
    same = hierarchical_kmeans(x, levels, seed=0, resample_n_iter=50)
    np.testing.assert_array_equal(published.parent[1], same.parent[1])
    seeded = hierarchical_kmeans(x, levels, seed=0, resample_n_iter=0)
    assert (published.parent[1] != seeded.parent[1]).any()
    # The centroids of the last resampling are rows then, in every level.
    assert squared_distances(seeded.centroids[1], x).min(1).max() < 1e-6
    assert squared_distances(seeded.centroids[2], seeded.centroids[1]).min(1).max() < 1e-6
    with pytest.raises(ValueError, match="resample_n_iter"):
        hierarchical_kmeans(x, levels, resample_n_iter=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plain_form_on_the_gpu_is_the_definition():
    x = clouds(3000, 6, 40, seed=0)
    ours = plain_greedy(torch.from_numpy(x).cuda(), 60, np.random.default_rng(0), trials=6)
    np.testing.assert_array_equal(ours, by_definition(x.astype(np.float64), 60, 0, 6))
    many = torch.from_numpy(clouds(20_000, 6, 40, seed=0)).cuda()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        plain_greedy(many, 400, np.random.default_rng(0), trials=6)
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) < 20  # the steps do not wait for the device
