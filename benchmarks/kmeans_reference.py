"""k-means as the reference of arXiv 2405.15613 runs it, in the plainest way, as a peer for `kmeans.py`.

Greedy k-means++ over all rows and 50 full Lloyd iterations, in every resampling.
"""

import math
import time

import numpy as np
import torch

from curated_data.clustering import ClusterTree


def reference_kmeans(x: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Greedy k-means++ over all rows, 50 full iterations: centroids, (labels, squared distances), inertia."""
    rows = torch.from_numpy(x - x.mean(0))
    rng = np.random.default_rng(seed)
    norms = rows.square().sum(1)
    ids = [int(rng.integers(len(rows)))]
    gap = (rows - rows[ids[0]]).square().sum(1)
    for _ in range(k - 1):
        gap = reference_step(rows, norms, gap, ids, k, rng)
    centroids = rows[ids].clone()
    for _ in range(50):
        label, squared = reference_assign(rows, norms, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, label, rows)
        counts = torch.bincount(label, minlength=k)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    label, squared = reference_assign(rows, norms, centroids)
    return (
        centroids.numpy() + x.mean(0),
        np.stack([label.numpy(), squared.numpy()]),
        float(squared.double().sum()),
    )


def reference_tree(x: np.ndarray, levels: list[tuple[int, int, int]], seed: int) -> ClusterTree:
    """Hierarchical k-means with resampling as the paper has it."""
    centroids, parent, points = {}, {}, x
    for number, (k, n_resamples, r) in enumerate(levels, 1):
        found, (label, squared), _ = reference_kmeans(points, k, seed)
        for step in range(n_resamples):
            picked = np.concatenate(
                [np.flatnonzero(label == c)[np.argsort(squared[label == c])[:r]] for c in range(k)]
            )
            found, _, _ = reference_kmeans(points[picked], k, seed + 1_000 * (step + 1))
            rows = torch.from_numpy(points)
            assigned = reference_assign(rows, rows.square().sum(1), torch.from_numpy(found))
            label, squared = (a.numpy() for a in assigned)
        centroids[number], parent[number], points = found, label.astype(np.int64), found
    return ClusterTree(centroids, parent)


def reference_seeding_seconds(rows: torch.Tensor, k: int, steps: int = 30) -> float:
    """CPU seconds of k greedy steps, from some."""
    rng, norms, ids = np.random.default_rng(0), rows.square().sum(1), [0]
    gap = (rows - rows[0]).square().sum(1)
    reference_step(rows, norms, gap, ids, k, rng)
    began = time.process_time()
    for _ in range(steps):
        gap = reference_step(rows, norms, gap, ids, k, rng)
    return (time.process_time() - began) / steps * k


def reference_iteration_seconds(rows: torch.Tensor, k: int) -> float:
    """CPU seconds of one assignment and update."""
    norms, centroids = rows.square().sum(1), rows[:k].clone()
    began = time.process_time()
    label, _ = reference_assign(rows, norms, centroids)
    torch.zeros_like(centroids).index_add_(0, label, rows)
    return time.process_time() - began


def reference_step(
    rows: torch.Tensor,
    norms: torch.Tensor,
    gap: torch.Tensor,
    ids: list[int],
    k: int,
    rng: np.random.Generator,
) -> torch.Tensor:
    """One greedy step: 2 + ln k candidates against every row."""
    total = gap.double().cumsum(0)
    drawn = torch.searchsorted(total, torch.from_numpy(rng.random(2 + int(math.log(k)))) * total[-1])
    drawn = drawn.clamp(max=len(rows) - 1)
    lower = (norms[drawn][:, None] + norms - 2 * rows[drawn] @ rows.T).clamp(min=0).minimum(gap)
    best = int(lower.sum(1).argmin())
    ids.append(int(drawn[best]))
    return lower[best]


def reference_assign(
    rows: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A full assignment, in blocks of rows."""
    label, squared, own = [], [], centroids.square().sum(1)
    for start in range(0, len(rows), 2_048):
        best = (own - 2 * rows[start : start + 2_048] @ centroids.T).min(1)
        label.append(best.indices)
        squared.append((best.values + norms[start : start + 2_048]).clamp(min=0))
    return torch.cat(label), torch.cat(squared)
