"""Paired bootstrap intervals against scipy's, and what they must be for any input."""

import numpy as np
import pytest
from scipy import stats

from lightning_modules.evaluation.comparison import comparison, interval
from lightning_modules.evaluation.segmentation import mean_iou
from tests.support.ranks import on_two_ranks


def pairs(kind: str, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    difficulty = rng.normal(size=n)
    a, b = difficulty + 0.5 * rng.normal(size=n), difficulty + 0.5 * rng.normal(size=n) + 0.15
    return (a > 0, b > 0) if kind == "right or wrong" else (a, b)


@pytest.mark.parametrize("kind", ["right or wrong", "numbers"])
def test_intervals_are_scipys(kind):
    a, b = (x.astype(float) for x in pairs(kind))
    found = comparison(a, b, n_bootstrap=20_000)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: np.mean(y, axis) - np.mean(x, axis), paired=True, vectorized=True, axis=-1,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(5),
    )  # fmt: skip
    near = 0.06 * theirs.standard_error + (1 / len(a) if kind == "right or wrong" else 0)  # their steps
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=near)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=near)
    t_test = stats.ttest_rel(b, a)
    assert found.p_value == pytest.approx(t_test.pvalue, abs=0.02)
    assert found.significant == (found.p_value < 0.05)


def test_pairing_narrows_the_interval():
    a, b = pairs("numbers")
    paired = comparison(a, b)
    unpaired = comparison(a, np.random.default_rng(0).permutation(b))
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert comparison(b, a).low == pytest.approx(-paired.high, abs=0.01)
    same = comparison(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_statistic_of_sums_and_samples_without_a_value():
    rng = np.random.default_rng(0)
    true = rng.integers(50, 100, (60, 1, 4))
    predicted = rng.integers(50, 100, (60, 1, 4))
    counts = [np.concatenate([(share * np.minimum(true, predicted)).astype(int), true, predicted], 1)
              for share in (0.5, 0.8)]  # fmt: skip
    found = comparison(*counts, statistic=mean_iou, n_bootstrap=500)
    assert found.a == pytest.approx(float(mean_iou(counts[0].sum(0))))
    assert found.low > 0.1 > found.p_value
    a, b = pairs("numbers")
    a[:7], b[5:9] = np.nan, np.nan
    gaps = comparison(a, b)
    assert (gaps.n, gaps.n_without) == (len(a) - 9, 9)
    assert gaps.difference == pytest.approx(np.nanmean(b - a))


def _share(rank):
    a, b = pairs("numbers")
    mine = {0: slice(0, 130), 1: slice(130, None)}[rank]
    found = comparison(a[mine], b[mine])
    return [found.difference, found.low, found.high]


def test_two_ranks_get_the_result_of_one():
    whole = comparison(*pairs("numbers"))
    for found in on_two_ranks(_share):
        assert found == [whole.difference, whole.low, whole.high]


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (np.zeros(3), np.zeros(4), {}, "same samples"),
        (np.zeros((3, 2)), np.zeros((3, 2)), {}, "need a statistic"),
        (np.full(3, np.nan), np.zeros(3), {}, "no sample"),
        (np.zeros(3), np.zeros(3), {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_is_named(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        comparison(a, b, **options)


@pytest.mark.parametrize("kind", ["right or wrong", "numbers"])
def test_an_interval_of_one_model_is_scipys(kind):
    values = pairs(kind)[0].astype(float)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(5))  # fmt: skip
    near = 0.06 * theirs.standard_error + (1 / len(values) if kind == "right or wrong" else 0)
    found = interval(np.append(values, np.nan), n_bootstrap=20_000)
    assert found == pytest.approx(tuple(theirs.confidence_interval), abs=near)
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_an_interval_of_a_statistic_of_sums():
    counts = np.random.default_rng(0).integers(50, 100, (60, 3, 4))
    low, high = interval(counts, statistic=mean_iou)
    assert low < float(mean_iou(counts.mean(0)[None])[0]) < high
