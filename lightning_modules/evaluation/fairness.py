"""The same metric by group: the gap between the best and the worst served, with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from curated_data.parallel import together, world_size
from lightning_modules.distributed import all_gather_rows
from lightning_modules.evaluation.bootstrap import check_resampling, resampled_means
from lightning_modules.evaluation.inputs import Array, as_tensor
from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class FairnessResult(Result):
    """A metric's mean by group.

    Attributes:
        overall: mean over all samples that have a group.
        groups: for each group, in order of name: mean, low, high (its interval), n.
        best, worst: names of the groups with the highest and the lowest mean.
        gap: difference of their means; gap_low, gap_high: its interval. Each resample has its own best.
        n_ungrouped: samples without a group, left out.
        too_small: groups with fewer than `min_size` samples, left out: name and size.
        confidence: of the intervals.
    """

    overall: float
    groups: dict[str, dict[str, float]]
    best: str
    worst: str
    gap: float
    gap_low: float
    gap_high: float
    n_ungrouped: int
    too_small: dict[str, int]
    confidence: float

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"group": name, **values} for name, values in self.groups.items()]
        return [*rows, {"group": "gap", "mean": self.gap, "low": self.gap_low, "high": self.gap_high}]


def fairness(
    values: Array,
    groups: Sequence[Any] | Array,
    *,
    min_size: int = 1,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FairnessResult:
    """Mean of a per-sample metric in each group, with percentile bootstrap intervals (samples drawn within
    groups).

    Under `torch.distributed` every rank gives its share and gets the whole result.

    Args:
        values: (n,) metric of each sample, finite: 1 or 0 for right or wrong, an average precision, an error.
        groups: (n,) group of each sample: strings or numbers; None, NaN and "" mean that it has none.
        min_size: smaller groups are left out, and reported.
        n_bootstrap: resamples.
        confidence: of the intervals.
        seed: of the resamples.

    Raises:
        ValueError: lengths that do not match, values that are not finite, fewer than two groups, bad
            settings.

    Examples:
        >>> from lightning_modules.evaluation import fairness
        >>> result = fairness([1, 1, 0, 1, 0, 0], ["north", "north", "north", "south", "south", "south"])
        >>> result.best, result.worst, round(result.gap, 3)
        ('north', 'south', 0.333)
    """
    with together():
        own = np.asarray(as_tensor(values)).astype(np.float64)
        names = [_name(group) for group in (groups.tolist() if hasattr(groups, "tolist") else groups)]
        if own.ndim != 1 or len(names) != len(own):
            raise ValueError(f"expected one value and one group per sample, got {own.shape} and {len(names)}")
        if not np.isfinite(own).all():
            raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(own))[0])} is not finite")
        check_resampling(n_bootstrap, confidence)
        if min_size < 1:
            raise ValueError(f"min_size must be 1 or more, got {min_size}")
    known = _union({name for name in names if name is not None})
    code_of = {name: i for i, name in enumerate(known)}
    codes = np.array([-1 if name is None else code_of[name] for name in names], np.int64)
    joined = all_gather_rows(torch.from_numpy(own)).numpy()
    codes = all_gather_rows(torch.from_numpy(codes)).numpy()
    sizes = np.bincount(codes[codes >= 0], minlength=len(known))
    kept = [i for i in range(len(known)) if sizes[i] >= min_size]
    if len(kept) < 2:
        raise ValueError(
            f"a gap needs two groups of {min_size} samples or more, got {dict(zip(known, sizes.tolist()))}"
        )
    generator = np.random.default_rng(seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    means, resampled = [], []
    for i in kept:
        group = joined[codes == i]
        means.append(float(group.mean()))
        resampled.append(resampled_means(group[:, None], n_bootstrap, generator)[:, 0])
    draws = np.stack(resampled)
    gap_low, gap_high = np.quantile(draws.max(0) - draws.min(0), tails).tolist()
    best, worst = int(np.argmax(means)), int(np.argmin(means))
    return FairnessResult(
        overall=float(joined[codes >= 0].mean()),
        groups={
            known[i]: {"mean": mean, "low": low, "high": high, "n": int(sizes[i])}
            for i, mean, (low, high) in zip(kept, means, np.quantile(draws, tails, axis=1).T.tolist())
        },
        best=known[kept[best]],
        worst=known[kept[worst]],
        gap=means[best] - means[worst],
        gap_low=gap_low,
        gap_high=gap_high,
        n_ungrouped=int((codes < 0).sum()),
        too_small={known[i]: int(sizes[i]) for i in range(len(known)) if sizes[i] < min_size},
        confidence=confidence,
    )


def _name(group: Any) -> str | None:
    if group is None or group == "" or (isinstance(group, float | np.floating) and np.isnan(group)):
        return None
    return str(group)


def _union(names: set[str]) -> list[str]:
    """The sorted names that occur on any rank."""
    if world_size() == 1:
        return sorted(names)
    every: list[set[str]] = [set()] * world_size()
    dist.all_gather_object(every, names)
    return sorted(set.union(*every))
