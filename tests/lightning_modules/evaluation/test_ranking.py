"""Every statistic of a comparison of rankings against scipy; perfect, reversed and tied rankings."""

import numpy as np
import pytest
from scipy import stats

from lightning_modules.evaluation.ranking import ranking

NAMES = ["alexnet", "vgg", "resnet", "densenet", "efficientnet", "convnext"]
A = dict(zip(NAMES, [0.56, 0.70, 0.76, 0.77, 0.80, 0.85]))
B = dict(zip(NAMES, [0.25, 0.34, 0.39, 0.38, 0.42, 0.50]))


def test_statistics_are_scipys():
    result = ranking(A, B, n_test_a=5000, n_test_b=5000)
    a, b = np.array(list(A.values())), np.array(list(B.values()))
    assert (result.spearman, result.spearman_p) == pytest.approx(tuple(stats.spearmanr(a, b)))
    assert (result.kendall, result.kendall_p) == pytest.approx(tuple(stats.kendalltau(a, b)))
    line = stats.linregress(a, b)
    assert result.fit.slope == pytest.approx(line.slope)
    assert result.fit.intercept == pytest.approx(line.intercept)
    assert result.fit.r_squared == pytest.approx(line.rvalue**2)
    improvement = stats.linregress(a / a.min() - 1, b / b.min() - 1)
    assert result.improvement_fit.slope == pytest.approx(improvement.slope)
    wilson = stats.binomtest(2800, 5000).proportion_ci(method="wilson")
    assert (result.models["alexnet"]["low_a"], result.models["alexnet"]["high_a"]) == pytest.approx(
        tuple(wilson)
    )
    # One point apart on 5000 images is noise.
    assert [(swap["models"], swap["significant"]) for swap in result.swaps] == [
        (["resnet", "densenet"], False)
    ]


def test_a_real_swap_is_called_so():
    swapped = A | {"vgg": 0.80, "efficientnet": 0.70}
    result = ranking(A, swapped, n_test_a=10_000, n_test_b=10_000)
    pairs = {tuple(swap["models"]): swap["significant"] for swap in result.swaps}
    assert pairs["vgg", "efficientnet"]
    noise = ranking(A, swapped, n_test_a=50, n_test_b=50)
    assert not any(swap["significant"] for swap in noise.swaps)
    assert not any(swap["significant"] for swap in ranking(A, swapped).swaps)


def test_seeds_give_students_intervals():
    generator = np.random.default_rng(0)
    runs = {name: list(value + 0.01 * generator.normal(size=4)) for name, value in A.items()}
    result = ranking(runs, B)
    own = np.array(runs["vgg"])
    want = stats.t.interval(0.95, 3, own.mean(), stats.sem(own))
    assert (result.models["vgg"]["low_a"], result.models["vgg"]["high_a"]) == pytest.approx(want)
    assert result.models["vgg"]["low_b"] == result.models["vgg"]["accuracy_b"]


def test_seeds_that_agree_count_as_one():
    """Three of them: the mean of three equal numbers may be off by a rounding."""
    once_a, once_b = A, A | {"vgg": A["resnet"], "resnet": A["vgg"]}
    three_a, three_b = ({name: [value] * 3 for name, value in once.items()} for once in (once_a, once_b))
    for n_test in (None, 50, 10_000):
        want = ranking(once_a, once_b, n_test_a=n_test, n_test_b=n_test)
        found = ranking(three_a, three_b, n_test_a=n_test, n_test_b=n_test)
        for name, model in want.models.items():
            assert found.models[name] == pytest.approx(model)
        (swap,), (same) = want.swaps, found.swaps
        assert [(s["models"], s["significant"]) for s in same] == [(["vgg", "resnet"], n_test == 10_000)]
        assert (same[0]["p_a"], same[0]["p_b"]) == pytest.approx((swap["p_a"], swap["p_b"]))


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's word on seeds that agree
def test_one_models_seeds_that_agree_are_tested_against_anothers():
    seeds = {"vgg": [0.70, 0.70, 0.70], "resnet": [0.75, 0.76, 0.77]}
    turned = {"vgg": seeds["resnet"], "resnet": seeds["vgg"]}
    (swap,) = ranking(A | seeds, A | turned).swaps
    want = stats.ttest_ind(seeds["vgg"], seeds["resnet"], equal_var=False).pvalue
    assert (swap["p_a"], swap["p_b"]) == pytest.approx((want, want))


def test_perfect_reversed_and_tied():
    perfect = ranking(A, A)
    assert (perfect.spearman, perfect.kendall, perfect.fit.slope, perfect.fit.r_squared) == pytest.approx(
        (1,) * 4
    )
    assert perfect.swaps == []
    reverse = ranking(A, dict(zip(NAMES, [1 - value for value in A.values()])))
    assert (reverse.spearman, reverse.kendall, reverse.fit.slope) == pytest.approx((-1, -1, -1))
    assert len(reverse.swaps) == 15
    tied = ranking(A, dict.fromkeys(NAMES, 0.5))
    assert np.isnan(tied.spearman)
    assert np.isnan(tied.kendall)
    assert (tied.fit.slope, tied.fit.r_squared) == (0, 1)
    assert [m["rank_b"] for m in tied.models.values()] == [3.5] * 6
    some = B | {"vgg": B["resnet"]}
    want = stats.kendalltau(list(A.values()), list(some.values())).statistic
    assert ranking(A, some).kendall == pytest.approx(want)
    zero = ranking(A | {"alexnet": 0.0}, B)
    assert np.isnan(zero.improvement_fit.slope)


def test_writes_its_files(tmp_path):
    result = ranking(A, B, n_test_a=100)
    result.plot(tmp_path / "scatter.png", name_a="ImageNet", name_b="ImageNot")
    result.to_csv(tmp_path / "r.csv")
    result.to_json(tmp_path / "r.json")
    assert (tmp_path / "scatter.png").stat().st_size > 5000
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 7
    assert "Spearman 0.943" in str(result)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (A, {k: v for k, v in B.items() if k != "vgg"}, {}, "vgg"),
        ({"x": 0.1, "y": 0.2}, {"x": 0.1, "y": 0.2}, {}, "three models"),
        (A | {"vgg": 70.0}, B, {}, "'vgg'"),
        (A | {"vgg": []}, B, {}, "'vgg'"),
        (A, B, {"confidence": 95}, "confidence"),
        (A, B, {"n_test_a": 0}, "test sets"),
    ],
)
def test_bad_input_is_named(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        ranking(a, b, **options)
