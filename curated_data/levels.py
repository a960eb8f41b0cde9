"""The settings of a level of the hierarchy, and a default choice of levels for any number of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from curated_data.checks import whole_number


class TooManyClusters(ValueError):
    """A level asks for more clusters than there are rows, or clusters below that hold one."""


@dataclass
class Level:
    """Settings of one level, bottom up; a plain dataclass, so OmegaConf takes it as a structured config.

    Attributes:
        n_clusters: k_l, the number of clusters; with `n_splits`, the number of groups in the first pass.
        n_resamples: how often the level is clustered again on a balanced sample of its own clusters, *after*
            the first k-means, which is not counted. (The paper's configuration file counts it: its "10 steps"
            are 9 here; its in-memory function counts as we do.)
        sample_size: r_l, how many members of each cluster a resampling takes, those nearest to the centroid
            or random ones; None takes half the average cluster size, as in the paper. 1 means no resampling.
        n_splits: s > 1 clusters in two passes: k-means into `n_clusters` groups, then each group by itself
            into s clusters, at most k_l * s in total. A level has splits or resampling, not both.

    Examples:
        >>> from curated_data import CurationConfig, Level
        >>> config = CurationConfig(target_size=10_000, levels=[Level(5000, n_resamples=10), Level(500)])
        >>> [level.n_clusters for level in config.levels]
        [5000, 500]
    """

    n_clusters: int
    n_resamples: int = 0
    sample_size: int | None = None
    n_splits: int = 1

    def __post_init__(self) -> None:
        for name in ("n_clusters", "n_resamples", "sample_size", "n_splits"):
            value, least = getattr(self, name), 0 if name == "n_resamples" else 1
            if isinstance(value, str):  # an unresolved OmegaConf interpolation, or its marker "???"
                continue
            if value is None and name == "sample_size":
                continue
            whole_number(f"Level.{name}", value, least)
        if self.n_splits != 1 and self.n_resamples:
            raise ValueError(
                f"a level has splits or resampling, not both: n_splits={self.n_splits}, "
                f"n_resamples={self.n_resamples}; set one of them back"
            )


def choose_levels(n: int, target_size: int | None = None) -> list[Level]:
    """Levels for n rows in the paper's proportions; `levels="auto"` uses them.

    The published setting clusters 743M images into 10M clusters, then 500k, 50k and 10k. Three rules transfer
    it to any n:

    * Level 1 is fine enough that no concept of interest is hidden inside a cluster, yet has about 20 rows per
      cluster to choose from: k_1 = n / 20, at most 10M. It is at least twice the target, as far as n allows
      4 rows per cluster, so that the tree balances the selection, not chance inside its leaves.
    * Each further level has a tenth of the clusters below, for at most four levels: a second level of at
      least 10 clusters, a third and fourth of at least 50. A few dozen clusters above two other levels gave
      selections that were 2 to 10 % less balanced on three of four pools, and 2 % more balanced on one
      (`benchmarks/RESULTS.md`).
    * Ten resamplings per level, with half the average cluster size, as published; above a million clusters,
      splits of 100 instead.

    Args:
        n: rows to cluster.
        target_size: number of samples to select, if known.
    """
    if n < 1:
        raise ValueError(f"n needs to be at least 1, got {n}")
    if target_size is not None and target_size < 1:
        raise ValueError(f"target_size needs to be at least 1, got {target_size}")
    k = max(1, n // 20)
    if target_size is not None:
        k = max(k, min(2 * target_size, n // 4, 100 * k))
    k = min(k, 10_000_000)
    levels: list[Level] = []
    below = n
    while k >= 1 and len(levels) < 4:
        if k > 1_000_000:
            levels.append(Level(k // 100, n_splits=100))
        else:
            levels.append(Level(k, n_resamples=10, sample_size=resampled_size(Level(k), below)))
        below, k = k, k // 10
        if k < (10 if len(levels) == 1 else 50):
            break
    return levels


def shrunk_levels(levels: Sequence[Level], n: int) -> list[Level]:
    """Levels above n clusters that hold a row: where one asks for more, it gets a tenth of what is below.

    Rows that repeat leave clusters empty, so derived levels may ask for too many. As in `choose_levels`,
    levels that would get too small are left out.
    """
    found: list[Level] = []
    for level in levels:
        if level.n_clusters * level.n_splits > n:
            k = n // 10
            if k < (50 if found else 10):
                break
            level = replace(level, n_clusters=k, n_splits=1, sample_size=resampled_size(Level(k), n))
        found.append(level)
        n = level.n_clusters * level.n_splits
    return found


def resampled_size(level: Level, n: int) -> int:
    """r_l for n rows: as set, or by default half the average cluster size."""
    return level.sample_size or max(2, round(n / level.n_clusters / 2))


def checked_levels(levels: Sequence[Any], n: int) -> list[Level]:
    """The levels as `Level` objects.

    Args:
        levels: bottom up, as `Level` objects or mappings of their fields.
        n: rows to cluster.

    Raises:
        ValueError: no levels, an entry of another type.
        TooManyClusters: (a ValueError) more clusters than rows or clusters below.
    """
    if not len(levels):
        raise ValueError("levels needs at least one Level")
    below, found = n, []
    for number, level in enumerate(levels, 1):
        if not isinstance(level, Level):
            if not isinstance(level, Mapping):
                raise ValueError(f"levels needs Level objects, got {type(level).__name__} at level {number}")
            level = Level(**level)
        what = "usable rows" if number == 1 else f"clusters of level {number - 1}"
        if level.n_clusters > below:
            raise TooManyClusters(
                f"level {number} asks for {level.n_clusters} clusters of {below} {what}; "
                "levels go from fine to coarse"
            )
        found.append(level)
        below = min(below, level.n_clusters * level.n_splits)
    return found
