"""Hierarchical k-means with resampling: balanced clusters of a long-tailed pool (arXiv 2405.15613)."""

from dataclasses import dataclass


@dataclass
class Level:
    """Settings of one level, bottom up; a plain dataclass, so OmegaConf takes it as a structured config.

    Attributes:
        n_clusters: k_l, the clusters of this level; with `n_splits` the groups of the first pass.
        n_resamples: how many times the level is re-clustered on a balanced sample of its own clusters, *after* the
            first k-means, which is not counted. (The paper's configuration file counts it: its "10 steps" are 9 here;
            its in-memory function counts as we do.)
        sample_size: r_l, how many members nearest to each centroid (or random ones) a resampling takes; about half
            the average cluster size is the paper's rule, and what None stands for. 1 means no resampling.
        n_splits: s > 1 clusters in two passes: k-means into `n_clusters` groups, then each group apart into s, so
            k_l * s clusters in all. A level has splits or resampling, not both.
    """

    n_clusters: int
    n_resamples: int = 0
    sample_size: int | None = None
    n_splits: int = 1

    def __post_init__(self) -> None:
        for name in ("n_clusters", "n_resamples", "sample_size", "n_splits"):
            value, least = getattr(self, name), 0 if name == "n_resamples" else 1
            if isinstance(value, str):  # an unresolved OmegaConf interpolation or the mandatory marker "???"
                continue
            if value is None and name == "sample_size":
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise ValueError(f"Level.{name} needs an integer of at least {least}, got {value!r}")
        if self.n_splits != 1 and self.n_resamples:
            raise ValueError(
                f"a level has splits or resampling, not both: n_splits={self.n_splits}, "
                f"n_resamples={self.n_resamples}; set one of them back"
            )
