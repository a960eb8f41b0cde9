"""Options for reading remote shards, and the choice between ranged reads and downloads."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

LOCAL, RANGES, DOWNLOAD = 0, 1, 2


@dataclass(frozen=True)
class RemoteOptions:
    """How remote shards are read.

    Attributes:
        access: `ranges` requests only the bytes of members; `download` keeps whole shards in the cache;
            `auto` uses ranges until `ShardPool.plan_access` has compared the two, and downloads if the server
            does not support ranges.
        gap: members at most this many bytes apart are read with one request. With 25 KB samples, 64 KiB
            merges requests if a tenth of a shard or more is read, and rarely below.
        n_threads: parallel requests in each process.
        attempts: how often a request is tried before it fails, with pauses of `backoff`, twice that, four
            times that, … seconds.
        silence: seconds in which an HTTP server that sends next to nothing has failed; a long download has
            not. Other protocols have their own, see `storage_options`.
        cache_bytes: limit on the size of all downloaded shards, over all processes that share the cache.
        latency: seconds that a request takes at least, for the comparison.
        bandwidth: bytes per second in one process, for the comparison.
        recheck: seconds after which a process checks again that a shard has not changed, in stores whose
            answers do not include a version; those of HTTP (with ETags) and S3 do.
    """

    access: Literal["auto", "ranges", "download"] = "auto"
    gap: int = 64 << 10
    n_threads: int = 32
    attempts: int = 5
    backoff: float = 0.5
    silence: float = 60.0
    cache_bytes: int = 32 << 30
    latency: float = 0.02
    bandwidth: float = 100e6
    recheck: float = 60.0


def choose_access(
    shard_size: np.ndarray,
    selected_bytes: np.ndarray,
    selected_samples: np.ndarray,
    *,
    epochs: int = 1,
    options: RemoteOptions | None = None,
) -> np.ndarray:
    """Which shards to download, by the time that downloads and ranges take over all epochs.

    Ranges cost, in every epoch, one request per sample (a shuffled batch has few neighbours), `n_threads` at
    a time, and the selected bytes. A download costs the bytes of the shard once, because only as many shards
    are chosen as fit in the cache: first those that save the most time per byte.

    Args:
        shard_size, selected_bytes, selected_samples: (s,) per shard: its size, the bytes of the selected
            members, and the number of selected samples.
        epochs: how often the selection is read.
        options: latency, bandwidth, threads, and the size of the cache.

    Returns:
        (s,) bool: whether to download each shard.
    """
    options = options or RemoteOptions()
    request = options.latency / options.n_threads
    ranges = epochs * (selected_samples * request + selected_bytes / options.bandwidth)
    download = request + shard_size / options.bandwidth
    saved = np.where(selected_samples > 0, ranges - download, 0.0)
    order = np.argsort(-saved / np.maximum(shard_size, 1), kind="stable")
    order = order[saved[order] > 0]
    chosen = np.zeros(len(shard_size), bool)
    chosen[order[np.cumsum(shard_size[order]) <= options.cache_bytes]] = True
    return chosen
