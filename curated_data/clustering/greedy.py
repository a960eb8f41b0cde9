"""Greedy k-means++ by its definition: in every step, each candidate is compared with every row.

The squared distance of a row to the nearest centre so far, times the row's weight, is its gap. A step draws
some rows with probabilities proportional to their gaps, and keeps the one that lowers the sum of gaps most.
"""

import numpy as np
import torch
import torch.nn.functional as F

from curated_data.clustering.rows import blocks, new_matrix

TINY = 3e-6  # a gap below this share of |x|² is a rounding error: the row repeats a centre
_STRIP = 1024  # places whose gaps are summed before one is drawn
_BLOCK = 256  # rows of such a table that are computed at once
_TABLE_BYTES = 64 << 20  # of a table of all distances between few rows


def plain_greedy(
    x: torch.Tensor,
    k: int,
    generator: np.random.Generator,
    trials: int,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """Positions of k different rows, (k,) int64, with `trials` candidates in each step.

    Args:
        x: (n, d) float32, on any device.
        weight: (n,) not negative; None: all the same.
    """
    n = len(x)
    norms = x.square().sum(1)
    first = int(generator.integers(n) if weight is None else draw(weight.cumsum(), 1, generator)[0])
    weights = None
    if weight is not None:
        weights = torch.from_numpy(weight / (weight.max() or 1)).float().to(x.device)
    if n * n * 4 <= _TABLE_BYTES and 4 * k * trials >= n:
        table = _table(x, norms)
        table = table if weights is None else table.mul_(weights)
        return _greedy_by_table(table.cpu().numpy(), k, generator, trials, first)
    if x.device.type != "cpu":
        return _greedy_on_device(x, norms, k, generator, trials, first, weights)
    chosen = np.empty(k, np.int64)
    chosen[0] = first
    padded = torch.zeros(-(-n // _STRIP) * _STRIP)
    gap = padded[:n]
    gap.copy_(_gaps(x, norms, torch.from_numpy(chosen[:1]), weights)[0])
    for i in range(1, k):
        candidates = _draw_by_strips(padded, trials, generator)
        if candidates is None:
            return complete_at_random(chosen, i, n, generator)
        lower = torch.minimum(_gaps(x, norms, torch.from_numpy(candidates), weights), gap)
        best = int(lower.sum(1).argmin())
        chosen[i] = candidates[best]
        gap.copy_(lower[best])
    return chosen


def _table(x: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`_gaps` of all rows to all without weights, (n, n), of which one half is copied from the other."""
    n = len(x)
    table = new_matrix(n, n, device=x.device)
    every = torch.arange(n, device=x.device)
    for start, stop in blocks(n, _BLOCK):
        table[start:stop, start:] = _gaps(x[start:], norms[start:], every[: stop - start])
        table[stop:, start:stop] = table[start:stop, stop:].T
    return table


def _greedy_by_table(
    gaps: np.ndarray, k: int, generator: np.random.Generator, trials: int, first: int
) -> np.ndarray:
    """The same from the gaps (n, n) by every row, for few rows, where that costs no more than the steps.

    A step's few products are limited by memory: the same number of them takes four times as long there.
    """
    chosen = np.empty(k, np.int64)
    chosen[0] = first
    gap = gaps[first]
    for i in range(1, k):
        cumulative = gap.cumsum(dtype=np.float64)
        if cumulative[-1] <= 0:
            return complete_at_random(chosen, i, len(gaps), generator)
        candidates = draw(cumulative, trials, generator)
        lower = np.minimum(gaps[candidates], gap)
        best = int(lower.sum(1).argmin())
        chosen[i], gap = candidates[best], lower[best]
    return chosen


def _draw_by_strips(gap: torch.Tensor, m: int, generator: np.random.Generator) -> np.ndarray | None:
    """m places, drawn with probabilities proportional to their gaps; None if all are 0.

    First a strip, by the sums of the strips, then a place in it, which saves the sum up to every place.
    """
    strips = gap.view(-1, _STRIP)
    sums = strips.sum(1, dtype=torch.float64).numpy()
    cumulative = sums.cumsum()
    if cumulative[-1] <= 0:
        return None
    aim = generator.random(m) * cumulative[-1]
    at = np.minimum(cumulative.searchsorted(aim, side="right"), np.flatnonzero(sums)[-1])
    inside = strips[torch.from_numpy(at)].double().numpy().cumsum(1)
    aim -= cumulative[at] - sums[at]
    # Rounding may move an aim to or past the end of a strip: then take its last place with a gap.
    last = (inside >= inside[:, -1:]).argmax(1)
    return at * _STRIP + np.minimum((inside <= aim[:, None]).sum(1), last)


def _greedy_on_device(
    x: torch.Tensor,
    norms: torch.Tensor,
    k: int,
    generator: np.random.Generator,
    trials: int,
    first: int,
    weights: torch.Tensor | None,
) -> np.ndarray:
    """The same choices, queued on the device without waiting for any: a step is short beside a wait."""
    n = len(x)
    chosen = torch.empty(k, dtype=torch.int64, device=x.device)
    chosen[:1] = first
    luck = torch.from_numpy(generator.random((k - 1, trials))).to(x.device)
    totals = torch.ones(k, dtype=torch.float64, device=x.device)
    padded = torch.zeros(-(-n // _STRIP) * _STRIP, device=x.device)
    gap = padded[:n]
    gap.copy_(_gaps(x, norms, chosen[:1], weights)[0])
    strips = padded.view(-1, _STRIP)
    upper = torch.ones(_STRIP, _STRIP, dtype=torch.float64, device=x.device).triu_()
    numbers = torch.arange(len(strips), device=x.device)
    for i in range(1, k):
        sums = strips.sum(1, dtype=torch.float64)
        cumulative = _running_sums(sums, upper)
        totals[i : i + 1] = cumulative[-1:]
        aim = luck[i - 1] * cumulative[-1]
        last_strip = torch.where(sums > 0, numbers, 0).amax()
        at = torch.minimum(torch.searchsorted(cumulative, aim, right=True), last_strip)
        inside = strips[at].double() @ upper
        aim = aim - (cumulative[at] - sums[at])
        last = (inside < inside[:, -1:]).sum(1)
        candidates = at * _STRIP + torch.minimum((inside <= aim[:, None]).sum(1), last)
        lower = torch.minimum(_gaps(x, norms, candidates, weights), gap)
        best = lower.sum(1).argmin(0, keepdim=True)  # as an index of one: a number would be waited for
        chosen[i : i + 1] = candidates[best]
        gap.copy_(lower[best][0])
    found = chosen.cpu().numpy()
    exhausted = np.flatnonzero(totals.cpu().numpy() <= 0)
    return complete_at_random(found, int(exhausted[0]), n, generator) if len(exhausted) else found


def _running_sums(values: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """`values.cumsum(0)` by products with a triangular matrix; on a device `cumsum` is not repeatable."""
    size = len(upper)
    if len(values) <= size:
        return values @ upper[: len(values), : len(values)]
    inside = F.pad(values, (0, -len(values) % size)).view(-1, size) @ upper
    before = _running_sums(inside[:, -1], upper) - inside[:, -1]
    return (inside + before[:, None]).view(-1)[: len(values)]


def _gaps(
    x: torch.Tensor, norms: torch.Tensor, at: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared distances of some rows to all, times the weights of these, (len(at), n); 0 from a row to itself
    and to its copies.
    """
    gap = norms.index_select(0, at)[:, None] + norms
    gap.addmm_(x.index_select(0, at), x.T, alpha=-2)
    gap.masked_fill_(gap < TINY * norms, 0)
    return gap if weights is None else gap.mul_(weights)


def draw(cumulative: np.ndarray, m: int, generator: np.random.Generator) -> np.ndarray:
    """m places, drawn with probabilities proportional to their steps in a cumulative sum."""
    found = cumulative.searchsorted(generator.random(m) * cumulative[-1], side="right")
    last = cumulative.searchsorted(cumulative[-1])
    return np.minimum(found, last)  # if rounding gives the very end


def complete_at_random(chosen: np.ndarray, done: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """Fill up with random other rows, if there are fewer distinct rows than k."""
    chosen[done:] = generator.choice(
        np.setdiff1d(np.arange(n), chosen[:done]), len(chosen) - done, replace=False
    )
    return chosen
