"""A first pass over the rows: which are usable, and the coordinates in which float32 holds them."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from curated_data import parallel
from curated_data.clustering.greedy import TINY
from curated_data.clustering.rows import BLOCK, Frame, blocks, rank_range, unit
from curated_data.matrix import Matrix, read_rows
from curated_data.threads import parallel_map

log = logging.getLogger(__name__)

_SAMPLE = 1024  # rows on which the resolution is measured
_SAMPLE_VALUES = 1 << 24  # numbers that these have at most
_FAR = 2**10  # times the range of the rows, beyond which float32 would blur their centroids
_CONE = 2**-8  # mean squared distance of unit rows from their mean, below which they are centred, too
_SHOWN = 0.01  # share of unresolved rows that is worth a warning


@dataclass(frozen=True)
class Survey:
    """What is known of the rows before they are clustered.

    Attributes:
        usable: (n,) bool: finite, and not zero under cosine; False for rows that were not looked at.
        frame: for those that are used.
        largest: absolute value in them.
        sample: (s, d) float64, some of them, in the coordinates of the frame.
    """

    usable: np.ndarray
    frame: Frame
    largest: float
    sample: np.ndarray


def survey(x: Matrix, valid: np.ndarray | None, cosine: bool) -> Survey:
    """Look at all valid rows; each rank reads its share, and no block without any."""
    n, d = x.shape
    first, last = rank_range(n, parallel.rank(), parallel.world_size())
    sampled = np.zeros(n, bool)
    sampled[np.linspace(0, n - 1, max(2, min(_SAMPLE, _SAMPLE_VALUES // d))).astype(np.int64)] = True
    nothing = np.zeros(d), np.full(d, np.inf), np.full(d, -np.inf), 0.0, np.empty((0, d))

    def look(start: int, stop: int) -> tuple[Any, ...]:
        which = slice(first + start, first + stop)
        if valid is not None and not valid[which].any():
            return np.zeros(stop - start, bool), *nothing
        rows = read_rows(x, which).cpu().double().numpy()
        good = np.isfinite(rows).all(1)
        if cosine:
            good &= rows.any(1)
        used = good if valid is None else good & valid[which]
        if not used.any():
            return good, *nothing
        rows = rows[used]
        largest = max(rows.max(), -rows.min())
        if cosine:
            rows = unit(torch.from_numpy(rows)).numpy()
        with np.errstate(over="ignore"):
            return good, rows.sum(0), rows.min(0), rows.max(0), largest, rows[sampled[which][used]]

    parts = parallel_map(look, list(blocks(last - first, BLOCK * 8)))
    parts = parts or [(np.empty(0, bool), *nothing)]
    good, totals, lowest, highest, largest, sample = zip(*parts, strict=True)
    usable = np.concatenate(parallel.all_gather(np.concatenate(good)))
    count = max(1, int((usable if valid is None else usable & valid).sum()))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = parallel.all_reduce(np.sum(totals, axis=0)) / count
    extremes = np.concatenate([-np.min(lowest, axis=0), np.max(highest, axis=0), [max(largest)]])
    extremes = parallel.all_reduce(extremes, "max")
    low, high, largest_of_all = -extremes[:d], extremes[d:-1], float(extremes[-1])
    frame = _frame(mean, low, high, cosine, wide=np.dtype(_name(x.dtype)).itemsize > 4)
    rows = torch.from_numpy(np.concatenate(parallel.all_gather(np.concatenate(sample))))
    return Survey(usable, frame, largest_of_all, frame.inside(rows).numpy())


def _frame(mean: np.ndarray, low: np.ndarray, high: np.ndarray, cosine: bool, wide: bool) -> Frame:
    """The coordinates for rows with this mean, within these bounds.

    Args:
        wide: the rows are given in float64.
    """
    if not np.isfinite(low).all():  # no row at all
        return Frame(cosine, None)
    if cosine and 1 - np.square(mean).sum() >= _CONE:
        return Frame(True, None, exact=wide)
    half = float((high / 2 - low / 2).max())  # of the range; the range itself may overflow
    middle, largest = high / 2 + low / 2, float(np.maximum(high, -low).max())
    scale = 1.0
    if half and not 2.0**-33 < half < 2.0**50:  # squares and their differences might leave float32's range
        scale = 2.0 ** int(np.clip(np.frexp(half)[1], -1000, 1000))
    exact = wide or cosine or scale != 1
    mean = np.where(np.isfinite(mean), mean, middle)
    # Rounded: every process must subtract the same numbers, and float64 sums depend on their order.
    with np.errstate(over="ignore"):
        narrow = mean.astype(np.float32).astype(np.float64)
    if exact:
        narrow = np.where(np.abs(narrow - mean) <= half * 2.0**-18, narrow, _rounded(mean, half, middle))
    far = bool(half) and (largest > _FAR * half or half < 2.0**-110)
    dtype = np.float64 if far or largest > float(np.finfo(np.float32).max) else np.float32
    return Frame(cosine, narrow, scale, exact, dtype)


def _rounded(mean: np.ndarray, half: float, middle: np.ndarray) -> np.ndarray:
    """The mean to 24 bits of the rows' range, if not of itself."""
    if not half:
        return middle
    unit_of = 2.0 ** max(-1000, int(np.frexp(half)[1]) - 24)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = mean / unit_of
        return np.where(np.abs(steps) < 2.0**52, np.round(steps) * unit_of, mean)


def _name(dtype: object) -> str:
    """The name of a numpy or torch type that numpy knows; bfloat16, which it does not, is as wide as half."""
    return str(dtype).removeprefix("torch.").replace("bfloat16", "float16")


def warn_unresolved(sample: np.ndarray, k: int) -> None:
    """Warn if clusters of the size that k asks for are too small for float32.

    That is so for a row if the half of an average cluster that is nearest to it is closer than what rounding
    leaves of squared distances at its distance from the mean.

    Args:
        sample: of `Survey`.
    """
    rows, copies = np.unique(sample, axis=0, return_counts=True)
    if len(rows) < 2:
        return
    norms = np.square(rows).sum(1)
    at = min(max(1, len(rows) // (2 * k)), len(rows) - 1)
    near = np.empty(len(rows))
    for start, stop in blocks(len(rows), 256):
        gaps = norms[start:stop, None] + norms - 2 * rows[start:stop] @ rows.T
        gaps[np.arange(stop - start), np.arange(start, stop)] = -np.inf  # itself
        near[start:stop] = np.partition(gaps, at, axis=1)[:, at]
    share = copies[near < TINY * norms].sum() / copies.sum()
    if share >= _SHOWN:
        log.warning(
            "float32 cannot tell %.3g %% of the rows from their neighbours: these are nearer than 1/500 of "
            "the distance from the mean of all rows, so %d clusters cannot follow them; cluster such rows "
            "apart, or leave out the rows that lie far off",
            100 * share, k,
        )  # fmt: skip
