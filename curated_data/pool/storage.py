"""The place and state of a shard, by which changes to it are noticed."""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from curated_data.errors import PoolError
from curated_data.parallel import all_gather, rank, world_size
from curated_data.pool.access import RemoteOptions
from curated_data.pool.shard import ShardFile
from curated_data.pool.store import Store
from curated_data.pool.urls import is_remote, map_files, missing_shard


def stat_shards(
    urls: Sequence[str],
    storage_options: Mapping[str, Any] | None = None,
    options: RemoteOptions | None = None,
) -> list[ShardFile]:
    """The current state of each shard, looked up in parallel.

    Args:
        urls: local paths and remote URLs.
        storage_options: for fsspec.
        options: the `RemoteOptions`, for retries.

    Raises:
        PoolError: a shard is missing, is not a file, or cannot be reached.
    """
    local = [url for url in urls if not is_remote(url)]
    states = dict(zip(local, map_files(_stat_local, local), strict=True))
    remote = [url for url in urls if is_remote(url)]
    if remote:
        store = Store(storage_options, options or RemoteOptions())
        states |= zip(remote, store.stat_all(remote), strict=True)
    return [states[url] for url in urls]


def stat_on_ranks(
    urls: Sequence[str], storage_options: Mapping[str, Any], options: RemoteOptions
) -> list[ShardFile]:
    """`stat_shards` by all ranks together: one of them looks up each remote shard, all the local ones."""
    own = stat_shards(urls[rank() :: world_size()], storage_options, options)
    states = json.dumps([[shard.size, shard.version] for shard in own]).encode()
    parts = [json.loads(part.tobytes()) for part in all_gather(np.frombuffer(states, np.uint8))]
    shards = [
        ShardFile(url, *parts[number % world_size()][number // world_size()])
        for number, url in enumerate(urls)
    ]
    local = [number for number, url in enumerate(urls) if not is_remote(url)]
    for number, shard in zip(local, stat_shards([urls[n] for n in local]), strict=True):
        shards[number] = shard
    return shards


def check_unchanged(shard: ShardFile, status: os.stat_result, was_linked: bool = False) -> None:
    """Check that an open local shard is still what was indexed.

    Raises:
        PoolError: it has been changed, replaced or removed.
    """
    if status.st_size != shard.size or _version(status) != shard.version:
        raise PoolError(
            f"{shard.url}: changed since it was indexed: {shard.size} bytes then, {status.st_size} now, "
            f"modified {_seconds(status.st_mtime_ns - int(shard.version))}; open the pool again to index it "
            "again"
        )
    if was_linked and status.st_nlink == 0:
        raise PoolError(f"{shard.url}: was removed or replaced since it was indexed; open the pool again")


def vanished(shard: ShardFile, error: OSError) -> PoolError:
    """The error for an indexed local shard that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return PoolError(
            f"{shard.url}: vanished since it was indexed; put it back, or open the pool without it"
        )
    return PoolError(f"{shard.url}: cannot be opened ({error.strerror})")


def _stat_local(path: str) -> ShardFile:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise missing_shard(path) from None
    except OSError as error:
        raise PoolError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise PoolError(f"{path}: is not a regular file, so it cannot be read at offsets")
    return ShardFile(path, status.st_size, _version(status))


def _version(status: os.stat_result) -> str:
    return str(status.st_mtime_ns)


def _seconds(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    return f"{abs(seconds):.3g} s {'later' if seconds >= 0 else 'earlier'}"
