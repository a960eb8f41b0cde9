"""Data of known structure, and plain float64 definitions to hold the clustering against."""

import numpy as np


def two_dimensional(seed):
    """The pool of the paper's notebook: clouds of 7000, 1000 and 500, and 500 uniform in [-3, 3]^2."""
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [
            rng.normal((-1, -1), 0.5, (7000, 2)),
            rng.normal((1, -1), 0.5, (1000, 2)),
            rng.normal((0, 1), 0.5, (500, 2)),
            rng.uniform(-3, 3, (500, 2)),
        ]
    )


def clouds(n, d, k, seed, spread=0.3, dtype=np.float32):
    """n rows around k centres of weights 1/rank."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, k + 1)
    label = rng.choice(k, n, p=weights / weights.sum())
    return (rng.normal(size=(k, d))[label] + rng.normal(size=(n, d)) * spread).astype(dtype)


def squared_distances(x, centroids):
    """(n, k) in float64, by subtraction."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    return np.stack([np.square(x - c).sum(1) for c in centroids], axis=1)


def lloyd_step(x, assignment, k):
    """Means of the rows of each cluster in float64."""
    return np.stack([np.asarray(x, np.float64)[assignment == c].mean(0) for c in range(k)])
