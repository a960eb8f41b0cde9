"""Options for reading remote shards, and the choice between ranged reads and whole shards."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from curated_data.checks import check_choice

Access = Literal["auto", "ranges", "shards"]

LOCAL, RANGES, DOWNLOAD = 0, 1, 2


@dataclass(frozen=True)
class RemoteOptions:
    """How remote shards are read.

    Attributes:
        access: `ranges` requests only the bytes of members; `shards` keeps whole shards in the cache; `auto`
            takes ranges, and whole shards where the server does not support ranges or `ShardPool.plan_access`
            was told that a shard is read often enough, by the rule of `choose_access`.
        gap: members at most this many bytes apart are read with one request. With 25 KB samples, 64 KiB
            merges requests if a tenth of a shard or more is read, and rarely below.
        n_threads: parallel requests in each process.
        attempts: how often a request is tried before it fails, with pauses of `backoff`, twice that, four
            times that, … seconds.
        silence: seconds in which an HTTP server that sends next to nothing has failed; a long download has
            not. Other protocols have their own, see `storage_options`.
        cache_bytes: limit on the size of all downloaded shards, over all processes that share the cache.
        recheck: seconds after which a process checks again that a shard has not changed, in stores whose
            answers do not include a version; those of HTTP (with ETags) and S3 do.
    """

    access: Access = "auto"
    gap: int = 64 << 10
    n_threads: int = 32
    attempts: int = 5
    backoff: float = 0.5
    silence: float = 60.0
    cache_bytes: int = 32 << 30
    recheck: float = 60.0

    def __post_init__(self) -> None:
        check_choice("RemoteOptions.access", self.access, get_args(Access))


def choose_access(
    shard_size: np.ndarray, n_samples: np.ndarray, n_selected: np.ndarray, *, epochs: int, cache_bytes: int
) -> np.ndarray:
    """Which shards to keep whole in the cache under `access="auto"`.

    The rule: a shard of which, over all epochs, at least as many samples are read as it holds, so that ranges
    would transfer no less than the shard. Where the cache has no room for all of these, first those of which
    the largest share is selected.

    Args:
        shard_size, n_samples, n_selected: (s,) per shard: its bytes, its samples, and those selected.
        epochs: how often the selection is read.
        cache_bytes: of the cache.

    Returns:
        (s,) bool: whether to keep each shard whole.
    """
    often = np.flatnonzero((n_selected > 0) & (n_selected * epochs >= n_samples))
    order = often[np.argsort(-n_selected[often] / n_samples[often], kind="stable")]
    chosen = np.zeros(len(shard_size), bool)
    chosen[order[np.cumsum(shard_size[order]) <= cache_bytes]] = True
    return chosen
