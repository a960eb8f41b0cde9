"""How remote shards are read: the options, and the choice between ranged reads and whole shards."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

LOCAL, RANGES, DOWNLOAD = 0, 1, 2


@dataclass(frozen=True)
class RemoteOptions:
    """How remote shards are read.

    Attributes:
        access: `ranges` asks for the bytes of the members; `download` keeps whole shards in the cache; `auto`
            takes ranges until `ShardPool.plan_access` has weighed the two, and downloads where ranges are not
            supported.
        gap: bytes between members that are read over rather than asked for apart. At 25 KB a sample, 64 KiB
            merges requests from a tenth of a shard on and hardly ever below.
        n_threads: requests at once, in each process.
        attempts: tries of a request before the error, with pauses of `backoff`, twice that, four times ...
            seconds.
        cache_bytes: what the downloaded shards may take together, over all processes that share the cache.
        latency: seconds a request takes at the least, for the choice.
        bandwidth: bytes a second of one process, for the choice.
        recheck: seconds after which a process looks again whether a shard is what was indexed, in stores that
            do not tell with the bytes of which version they are; HTTP (with ETags) and S3 do.
    """

    access: Literal["auto", "ranges", "download"] = "auto"
    gap: int = 64 << 10
    n_threads: int = 32
    attempts: int = 5
    backoff: float = 0.5
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
    """Which shards to download whole, by the time that each way takes over all epochs.

    Ranges cost, in every epoch, a request a sample (a shuffled batch holds few neighbours), `n_threads` at
    once, and the bytes; a download costs its bytes once, as only shards that fit in the cache together are
    chosen: those that save most time a byte first.

    Args:
        shard_size, selected_bytes, selected_samples: (s,) per shard: bytes of all, bytes of the selected
            members, and how many samples are selected.
        epochs: how often the selection is read.
        options: latency, bandwidth, threads, and the size of the cache.

    Returns:
        (s,) bool: download this shard.
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
