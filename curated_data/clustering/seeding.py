"""Greedy k-means++ seeding (Arthur and Vassilvitskii 2007, section 2 and their own implementation's greedy form)."""

import math

import numpy as np
import torch

from curated_data.clustering.rows import Rows


def seed_rows(
    rows: Rows, n_clusters: int, init: str, generator: np.random.Generator, *, max_rows: int | None = None
) -> np.ndarray:
    """Positions of the rows that k-means starts from, (k,) int64, all different."""
    n = len(rows)
    if init == "random":
        return generator.choice(n, n_clusters, replace=False)
    if n_clusters == n:
        return np.arange(n)
    sample = np.arange(n)
    if max_rows is not None and n > max_rows:
        sample = np.sort(generator.choice(n, max_rows, replace=False))
    return sample[_greedy(rows.take(sample), n_clusters, generator)]


def _greedy(x: torch.Tensor, k: int, generator: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ as it is defined: one candidate set a step, all points looked at. Slow, and the oracle."""
    n = len(x)
    trials = 2 + int(math.log(k))
    norms = x.square().sum(1)
    chosen = np.empty(k, np.int64)
    chosen[0] = generator.integers(n)
    gap = _squared(x, norms, chosen[:1])[0]
    for i in range(1, k):
        cumulative = np.cumsum(gap.numpy(), dtype=np.float64)
        if cumulative[-1] <= 0:  # fewer distinct points than clusters
            rest = np.setdiff1d(np.arange(n), chosen[:i])
            chosen[i:] = generator.choice(rest, k - i, replace=False)
            break
        candidates = np.searchsorted(cumulative, generator.random(trials) * cumulative[-1], side="right")
        new = torch.minimum(_squared(x, norms, candidates), gap)
        best = int(new.sum(1).argmin())
        chosen[i], gap = candidates[best], new[best]
    return chosen


def _squared(x: torch.Tensor, norms: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    d = norms[ids][:, None] + norms - 2 * x[ids] @ x.T
    d[d < 3e-6 * norms] = 0
    d[np.arange(len(ids)), ids] = 0
    return d
