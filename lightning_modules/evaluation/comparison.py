"""Is one model better than another on the same test samples? Differences with paired bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curated_data.parallel import together
from lightning_modules.distributed import all_gather_rows
from lightning_modules.evaluation.bootstrap import check_resampling, resampled_means
from lightning_modules.evaluation.inputs import Array, as_tensor
from lightning_modules.evaluation.result import Result

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ComparisonResult(Result):
    """The difference of a figure between two models, b - a.

    Attributes:
        a, b: the figure of each.
        difference, low, high: b - a, and its percentile interval over resamples of the test samples, the same
            for both models.
        p_value: two-sided: twice the share of resamples on the other side of 0, with the usual 1 added.
        n: test samples that both models have a value for; n_without: the others.
        confidence: of the interval.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    n_without: int
    confidence: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def rows(self) -> list[dict[str, Any]]:
        names = ("a", "b", "difference", "low", "high", "p_value", "n")
        return [{name: getattr(self, name) for name in names}]


def comparison(
    a: Array,
    b: Array,
    *,
    statistic: Statistic | None = None,
    n_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ComparisonResult:
    """Compare two models by what each test sample gave under each (the evaluations' results keep it).

    Test samples are resampled, the same ones for both models, so what makes a sample hard for both does not
    widen the interval (Efron and Tibshirani 1993, chapter 13). Under `torch.distributed` every rank gives its
    share and gets the whole result.

    Args:
        a, b: for each test sample a value (n,): right or wrong, an average precision, an error; or counts (n,
            ...). A sample with a NaN on either side is left out.
        statistic: from sums over samples, divided by their number, (B, ...), to figures (B,); None for values
            (n,), whose mean is the figure. `segmentation.mean_iou` goes with segmentation's counts.
        n_bootstrap: resamples.
        confidence: of the interval.
        seed: of the resamples.

    Raises:
        ValueError: shapes that do not match, no sample with both values, bad settings.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> a = rng.random(400) < 0.6  # which test images the first model has right
        >>> b = a | (rng.random(400) < 0.4)
        >>> from lightning_modules.evaluation import comparison
        >>> result = comparison(a, b)
        >>> result.low > 0  # the second model is better, with 95 % confidence
        True
    """
    with together():
        values = [np.asarray(as_tensor(x)).astype(np.float64) for x in (a, b)]
        if values[0].shape != values[1].shape or values[0].ndim < 1:
            raise ValueError(
                f"both need a value for each of the same samples, got {values[0].shape} and {values[1].shape}"
            )
        if statistic is None and values[0].ndim != 1:
            raise ValueError(
                f"values of shape {values[0].shape} need a statistic that makes a figure of their mean"
            )
        check_resampling(n_bootstrap, confidence)
    values = [all_gather_rows(torch.from_numpy(x)).numpy() for x in values]
    shape = values[0].shape[1:]
    both = np.concatenate([x.reshape(len(x), -1) for x in values], 1)
    known = np.isfinite(both).all(1)
    n = int(known.sum())
    if n == 0:
        raise ValueError("no sample has a value for both models")
    pair = both[known]

    def figures(means: np.ndarray) -> np.ndarray:
        """(B, 2) from means (B, 2 m) of both models' values."""
        sides = np.split(means, 2, axis=1)
        if statistic is None:
            return np.concatenate(sides, 1)
        return np.stack([statistic(side.reshape(-1, *shape)) for side in sides], 1)

    own = figures(pair.mean(0, keepdims=True))[0]
    draws = figures(resampled_means(pair, n_bootstrap, np.random.default_rng(seed)))
    differences = draws[:, 1] - draws[:, 0]
    low, high = np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    beyond = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return ComparisonResult(
        a=float(own[0]),
        b=float(own[1]),
        difference=float(own[1] - own[0]),
        low=low,
        high=high,
        p_value=min(1.0, 2 * (beyond + 1) / (n_bootstrap + 1)),
        n=n,
        n_without=len(both) - n,
        confidence=confidence,
    )
