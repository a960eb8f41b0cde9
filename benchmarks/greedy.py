"""Greedy selections of the whole pool, to compare the drawn ones with: k-center, facility location, DPP.

All work on rows of norm 1 by their `COMPONENTS` leading principal components, brought to norm 1 again.
Facility location holds the whole (n, n) matrix of similarities, for pools of a few thousand samples.
"""

import numpy as np

from curated_data.matrix import unit

COMPONENTS = 64


def reduced(rows: np.ndarray) -> np.ndarray:
    """(n, COMPONENTS) float32 rows of norm 1."""
    rows = unit(rows.astype(np.float32))
    centred = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return unit(centred @ vectors[:, ::-1][:, :COMPONENTS])


def k_center(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Again and again the sample furthest from those selected (Gonzalez 1985), from a random one on."""
    chosen = [int(np.random.default_rng(seed).integers(len(rows)))]
    nearest = rows @ rows[chosen[0]]
    while len(chosen) < size:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
        np.maximum(nearest, rows @ rows[chosen[-1]], out=nearest)
    return np.array(chosen)


def facility_location(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The largest sum over samples of the cosine to the nearest selected one, greedily (Nemhauser 1978)."""
    del seed  # nothing is random
    cosine = (rows @ rows.T + 1) / 2
    best = np.zeros(len(rows), np.float32)
    bound = cosine.sum(axis=1)  # gains only fall, so that old ones are bounds (Minoux 1978)
    chosen: list[int] = []
    while len(chosen) < size:
        while True:
            tried = int(bound.argmax())
            bound[tried] = np.maximum(cosine[tried] - best, 0).sum()
            if bound[tried] >= np.partition(bound, -2)[-2]:
                break
        chosen.append(tried)
        np.maximum(best, cosine[tried], out=best)
        bound[tried] = -np.inf
    return np.array(chosen)


def dpp(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The largest determinant of exp(-|a - b|² / (2 s²)), greedily (Chen et al. 2018).

    s is the median distance to the 10th neighbour of 500 random samples.
    """
    some = np.random.default_rng(seed).choice(len(rows), min(500, len(rows)), replace=False)
    tenth = -np.partition(-(rows[some] @ rows.T), 10, axis=1)[:, 10]
    scale = max(2 - 2 * float(np.median(tenth)), 1e-6)
    left, factors = np.ones(len(rows)), np.zeros((size, len(rows)))
    chosen: list[int] = []
    for place in range(size):
        best = int(left.argmax())
        chosen.append(best)
        kernel = np.exp((rows @ rows[best] - 1) / scale)
        row = (kernel - factors[:place, best] @ factors[:place]) / np.sqrt(max(left[best], 1e-12))
        factors[place] = row
        left -= row**2
        left[chosen] = -np.inf
    return np.array(chosen)
