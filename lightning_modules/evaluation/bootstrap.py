"""Means of bootstrap resamples."""

import numpy as np

_MOST_KINDS = 1000  # different rows that are drawn as counts


def resampled_means(values: np.ndarray, n_bootstrap: int, generator: np.random.Generator) -> np.ndarray:
    """Means (n_bootstrap, m) of resamples of values (n, m).

    Equal rows, of which right and wrong for two models make only four kinds, are drawn as counts of their
    kind.
    """
    n = len(values)
    if values.shape[1] <= 4:
        kinds, counts = np.unique(values, axis=0, return_counts=True)
        if len(kinds) <= _MOST_KINDS:
            return generator.multinomial(n, counts / n, size=n_bootstrap) @ kinds / n
    means = np.empty((n_bootstrap, values.shape[1]))
    for i in range(n_bootstrap):
        means[i] = np.bincount(generator.integers(0, n, n), minlength=n) @ values / n
    return means


def check_resampling(n_bootstrap: int, confidence: float) -> None:
    """Check the settings of an interval by resampling.

    Raises:
        ValueError: no resample, or a confidence outside of 0..1.
    """
    if not 0 < confidence < 1 or n_bootstrap < 1:
        raise ValueError(f"bad settings: {confidence=}, {n_bootstrap=}")
