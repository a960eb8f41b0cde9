"""Groups by hand, and bootstrap intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from lightning_modules.evaluation.fairness import fairness
from tests.support.ranks import on_two_ranks


def data(n: int = 600) -> tuple[np.ndarray, list]:
    generator = np.random.default_rng(0)
    groups = [("low", "middle", "high", None)[i] for i in generator.integers(0, 4, n)]
    chance = {"low": 0.4, "middle": 0.6, "high": 0.8, None: 0.5}
    return np.array([float(generator.random() < chance[g]) for g in groups]), groups


@pytest.mark.parametrize("continuous", [False, True])
def test_means_and_intervals(continuous):
    values, groups = data()
    if continuous:
        values = values + np.random.default_rng(1).normal(size=len(values))
    result = fairness(values, groups, n_bootstrap=4000)
    for name in ("low", "middle", "high"):
        own = values[[g == name for g in groups]]
        got = result.groups[name]
        assert got["mean"] == pytest.approx(own.mean())
        assert got["n"] == len(own)
        want = stats.bootstrap(
            (own,), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        assert got["low"] == pytest.approx(want.low, abs=0.02)
        assert got["high"] == pytest.approx(want.high, abs=0.02)
    assert (result.best, result.worst) == ("high", "low")
    assert result.gap == pytest.approx(result.groups["high"]["mean"] - result.groups["low"]["mean"])
    assert result.gap_low < result.gap < result.gap_high
    assert result.n_ungrouped == groups.count(None)
    assert result.overall == pytest.approx(values[[g is not None for g in groups]].mean())


def test_the_same_seed_gives_the_same_intervals():
    values, groups = data()
    assert fairness(values, groups) == fairness(values, groups)
    assert fairness(values, groups).gap_low != fairness(values, groups, seed=1).gap_low


def test_small_groups_are_reported_and_left_out(tmp_path):
    result = fairness(np.array([1.0, 0, 1, 1, 0]), ["a", "a", "b", "b", "rare"], min_size=2)
    assert result.too_small == {"rare": 1}
    assert set(result.groups) == {"a", "b"}
    result.to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines()[-1].startswith("gap,0.5")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, float])
def test_nan_of_any_type_is_no_group(kind):
    groups = [kind(group) for group in (1, 2, np.nan, 2)]
    for given in (groups, np.array(groups), np.array(groups, object)):
        result = fairness(np.array([1.0, 0, 1, 1]), given)
        assert set(result.groups) == {"1.0", "2.0"}
        assert result.n_ungrouped == 1


def _share(rank, values, groups):
    part = slice(0, 200) if rank == 0 else slice(200, None)
    result = fairness(values[part], groups[part])
    return [result.gap, result.gap_low, result.gap_high, result.overall]


def test_two_ranks_get_the_result_of_one():
    values, groups = data()
    groups[200:] = ["only here" if g == "low" else g for g in groups[200:]]  # a group that one rank alone has
    want = fairness(values, groups)
    for got in on_two_ranks(_share, values, groups):
        assert got == [want.gap, want.gap_low, want.gap_high, want.overall]


@pytest.mark.parametrize(
    ("values", "groups", "options", "message"),
    [
        ([1.0, 0.0], ["a"], {}, "one group per sample"),
        ([1.0, np.nan], ["a", "b"], {}, "value 1 is not finite"),
        ([1.0, 0.0], ["a", "a"], {}, "two groups"),
        ([1.0, 0.0], ["", None], {}, "two groups"),
        ([1.0, 0.0], ["a", "b"], {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_is_named(values, groups, options, message):
    with pytest.raises(ValueError, match=message):
        fairness(np.array(values), groups, **options)
