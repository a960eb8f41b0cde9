"""Does a dataset order models as another does? Rank correlations, a linear fit, which rank changes are real.

The question and the statistics are those of ImageNot (arXiv 2404.02112).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class LinearFit:
    """Least squares of y on x; NaN where x does not vary."""

    slope: float
    intercept: float
    r_squared: float


@dataclass(frozen=True)
class RankingResult(Result):
    """The comparison of two datasets by the models' accuracies on them.

    Attributes:
        models: for each: accuracy_a, low_a, high_a, rank_a (1 is best, ties share the mean rank), and as many
            for b.
        spearman, spearman_p, kendall, kendall_p: rank correlations (Kendall's tau-b) and their two-sided
            p-values; NaN where all models tie on a dataset.
        fit: accuracy on b against accuracy on a.
        improvement_fit: the same of the improvement over each dataset's weakest model, relative to it.
        swaps: pairs of models that the datasets order differently: names, and whether the difference is
            significant on both (otherwise the swap is within noise).
        confidence: of intervals and of the test of a swap.
    """

    models: dict[str, dict[str, float]]
    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float
    fit: LinearFit
    improvement_fit: LinearFit
    swaps: list[dict[str, Any]]
    confidence: float

    def rows(self) -> list[dict[str, Any]]:
        return [{"model": name, **values} for name, values in self.models.items()]

    def table(self) -> str:
        """The models, and a line of statistics below them."""
        significant = sum(swap["significant"] for swap in self.swaps)
        fit, improvement = self.fit, self.improvement_fit
        sign = "-" if fit.intercept < 0 else "+"
        return (
            f"{super().table()}\n\nSpearman {self.spearman:.3f} (p {self.spearman_p:.2g}), "
            f"Kendall {self.kendall:.3f} (p {self.kendall_p:.2g}); "
            f"b = {fit.slope:.3f} a {sign} {abs(fit.intercept):.3f}, R² {fit.r_squared:.3f}; "
            f"relative improvements: slope {improvement.slope:.3f}, R² {improvement.r_squared:.3f}; "
            f"{len(self.swaps)} pairs swap, {significant} significantly"
        )

    def plot(self, path: str | Path, *, name_a: str = "A", name_b: str = "B") -> None:
        """Draw accuracies on b against a with their intervals and the fitted line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4.5), layout="constrained")
        axes = figure.subplots()
        # Names at the points would cover each other: models of one size are often equally good.
        for number, (name, m) in enumerate(self.models.items()):
            spread = [
                [[m[f"accuracy_{s}"] - m[f"low_{s}"]], [m[f"high_{s}"] - m[f"accuracy_{s}"]]]
                for s in ("a", "b")
            ]
            axes.errorbar(
                m["accuracy_a"], m["accuracy_b"], xerr=spread[0], yerr=spread[1],
                fmt="osDv^"[number // 10 % 5], capsize=2, elinewidth=0.8, label=name,
            )  # fmt: skip
        if np.isfinite(self.fit.slope):
            ends = np.array([choose(m["accuracy_a"] for m in self.models.values()) for choose in (min, max)])
            label = f"slope {self.fit.slope:.2f}, R² {self.fit.r_squared:.2f}"
            axes.plot(ends, self.fit.slope * ends + self.fit.intercept, color="grey", label=label)
        axes.set_xlabel(f"accuracy on {name_a}")
        axes.set_ylabel(f"accuracy on {name_b}")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150)


def ranking(
    accuracy_a: Mapping[str, float | Sequence[float]],
    accuracy_b: Mapping[str, float | Sequence[float]],
    *,
    n_test_a: int | None = None,
    n_test_b: int | None = None,
    confidence: float = 0.95,
) -> RankingResult:
    """Compare how two datasets order models.

    Accuracies may come from training here or from a published table. A model's interval is Student's over its
    seeds, where two or more differ; else Wilson's binomial one for the size of the test set; else it is the
    point itself.

    Args:
        accuracy_a: for each model its accuracy on dataset A in 0..1, or one for each seed.
        accuracy_b: the same models on dataset B.
        n_test_a, n_test_b: test images of each dataset.
        confidence: of the intervals, and of the tests that call a swap significant.

    Raises:
        ValueError: different models, fewer than three, accuracies outside 0..1, no seeds for a model, bad
            settings.

    Examples:
        >>> from lightning_modules.evaluation import ranking
        >>> a = {"resnet18": 0.70, "resnet50": 0.76, "vit_s": 0.79}
        >>> b = {"resnet18": 0.51, "resnet50": 0.62, "vit_s": 0.60}
        >>> result = ranking(a, b, n_test_a=5000, n_test_b=5000)
        >>> round(result.spearman, 3)
        0.5
    """
    if set(accuracy_a) != set(accuracy_b):
        odd = sorted(set(accuracy_a) ^ set(accuracy_b))
        raise ValueError(f"both datasets need the same models; on one alone: {odd}")
    if len(accuracy_a) < 3:
        raise ValueError(f"a ranking needs three models or more, got {sorted(accuracy_a)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in 0..1, got {confidence}")
    if any(n is not None and n < 1 for n in (n_test_a, n_test_b)):
        raise ValueError(f"test sets must have a sample or more, got {n_test_a} and {n_test_b}")
    names = list(accuracy_a)
    runs_a, runs_b = ([_runs(name, table[name]) for name in names] for table in (accuracy_a, accuracy_b))
    a, b = (np.array([run.mean() for run in runs]) for runs in (runs_a, runs_b))
    spearman, kendall = (_correlation(test, a, b) for test in (scipy.stats.spearmanr, scipy.stats.kendalltau))
    models = {}
    ranks_a, ranks_b = scipy.stats.rankdata(-a), scipy.stats.rankdata(-b)
    for i, name in enumerate(names):
        low_a, high_a = _interval(runs_a[i], n_test_a, confidence)
        low_b, high_b = _interval(runs_b[i], n_test_b, confidence)
        models[name] = {
            "accuracy_a": float(a[i]), "low_a": low_a, "high_a": high_a, "rank_a": float(ranks_a[i]),
            "accuracy_b": float(b[i]), "low_b": low_b, "high_b": high_b, "rank_b": float(ranks_b[i]),
        }  # fmt: skip
    swaps = []
    for i, j in itertools.combinations(range(len(names)), 2):
        if (a[i] - a[j]) * (b[i] - b[j]) < 0:
            p_values = [
                _difference_p(runs_a[i], runs_a[j], n_test_a),
                _difference_p(runs_b[i], runs_b[j], n_test_b),
            ]
            significant = all(p < 1 - confidence for p in p_values)
            swaps.append({"models": [names[i], names[j]], "significant": significant, "p_a": p_values[0],
                          "p_b": p_values[1]})  # fmt: skip
    return RankingResult(
        models=models,
        spearman=spearman[0],
        spearman_p=spearman[1],
        kendall=kendall[0],
        kendall_p=kendall[1],
        fit=_fit(a, b),
        improvement_fit=_fit(_improvement(a), _improvement(b)),
        swaps=swaps,
        confidence=confidence,
    )


def _runs(name: str, accuracy: float | Sequence[float]) -> np.ndarray:
    runs = np.atleast_1d(np.asarray(accuracy, np.float64))
    if runs.ndim != 1 or len(runs) == 0:
        raise ValueError(
            f"model {name!r}: expected an accuracy, or one for each seed, got shape {runs.shape}"
        )
    if not ((runs >= 0) & (runs <= 1)).all():
        raise ValueError(f"model {name!r}: accuracies must be in 0..1, got {runs.tolist()}")
    return runs


def _interval(runs: np.ndarray, n_test: int | None, confidence: float) -> tuple[float, float]:
    mean = float(runs.mean())
    if np.ptp(runs) > 0:
        half = float(
            scipy.stats.t.ppf((1 + confidence) / 2, len(runs) - 1) * runs.std(ddof=1) / np.sqrt(len(runs))
        )
        return mean - half, mean + half
    if n_test is None:
        return mean, mean
    found = scipy.stats.binomtest(round(mean * n_test), n_test).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def _difference_p(one: np.ndarray, other: np.ndarray, n_test: int | None) -> float:
    """p-value of two models' difference: Welch's t over seeds, or two binomials' z; else 1.

    Seeds that all agree do not tell how far others would lie: they count as one.
    """
    if len(one) > 1 and len(other) > 1 and (np.ptp(one) > 0 or np.ptp(other) > 0):
        return float(scipy.stats.ttest_ind(one, other, equal_var=False).pvalue)
    if n_test is None:
        return 1.0
    p, q = float(one.mean()), float(other.mean())
    pooled = (p + q) / 2
    deviation = np.sqrt(2 * pooled * (1 - pooled) / n_test)
    return float(2 * scipy.stats.norm.sf(abs(p - q) / deviation)) if deviation > 0 else 1.0


def _correlation(test: Any, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan")
    found = test(a, b)
    return float(found.statistic), float(found.pvalue)


def _fit(x: np.ndarray, y: np.ndarray) -> LinearFit:
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0:
        return LinearFit(float("nan"), float("nan"), float("nan"))
    found = scipy.stats.linregress(x, y)
    r_squared = 1.0 if np.ptp(y) == 0 else float(found.rvalue**2)
    return LinearFit(float(found.slope), float(found.intercept), r_squared)


def _improvement(accuracy: np.ndarray) -> np.ndarray:
    """Relative improvement over the weakest model; NaN where that one is never right."""
    weakest = accuracy.min()
    return (accuracy - weakest) / weakest if weakest > 0 else np.full(len(accuracy), np.nan)
