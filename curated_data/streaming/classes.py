"""Class names in `.cls` members, and their numbers.

The names of a pool, sorted by their characters' code points, are numbered from 0. Pools that are used
together (for training and validation) are numbered together. So the numbers depend on the pools alone.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from curated_data.cache.artifacts import build_once, fingerprint, open_cache, read_manifest, write_manifest
from curated_data.errors import CacheError, SampleError
from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

_PEEK = 64  # samples by which integers and names are told apart
_BLOCK = 1 << 12  # samples read at once
_VERSION = 1


class ClassNumbers:
    """A decoder of `.cls` members that hold names, to the names' numbers.

    Raises:
        SampleError: a member that is empty or no text, or holds none of the names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(names)}

    def __call__(self, data: bytes) -> int:
        try:
            return self._numbers[data.decode("utf-8").strip()]
        except (UnicodeDecodeError, KeyError):
            raise SampleError(f"is not a class name of the pool: {data[:40]!r}") from None


def class_names(pools: Sequence[ShardPool], cache_dir: Path | None) -> tuple[str, ...] | None:
    """The names of the classes of some pools, in the order of their numbers; None if they hold integers.

    Their first samples tell which. The names take reading the `.cls` members of all samples once; they are
    kept in the cache, if there is one.

    Raises:
        PoolError: a shard cannot be read.
    """
    labelled = [pool for pool in pools if pool.has_labels]
    if not labelled:
        return None
    if cache_dir is None or all(pool.label_column is not None for pool in labelled):
        return _names(labelled)

    def build(folder: Path) -> None:
        write_manifest(folder, "classes", {"names": _names(labelled)})

    # The state too: shards of one layout may hold other names of the same lengths.
    states = [[pool.fingerprint, pool.state, *_of_column(pool)] for pool in labelled]
    name = fingerprint(pools=states, version=_VERSION)
    folder, _ = build_once(open_cache(cache_dir) / "classes" / name, build)
    names = read_manifest(folder, "classes").get("names")
    if names is None:
        return None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise CacheError(f"{folder}: holds no class names; remove it to have them read again")
    return tuple(names)


def _names(pools: Sequence[ShardPool]) -> tuple[str, ...] | None:
    if all(_is_integer(text) for pool in pools for text in _texts(pool, min(len(pool), _PEEK))):
        return None
    found = {text for pool in pools for text in _texts(pool, len(pool))}
    log.info("classes: %d names, numbered from 0 in the order of their characters", len(found))
    return tuple(sorted(found))


def _texts(pool: ShardPool, n: int) -> set[str]:
    """What the `.cls` members of the first samples hold, without those that are empty or no text; of a
    column of labels all that it holds.
    """
    found = set(_of_column(pool))
    if pool.label_column is not None:
        return found
    for start in range(0, n, _BLOCK):
        for members in pool.read(np.arange(start, min(start + _BLOCK, n)), ["cls"]):
            try:
                found.add(members.get("cls", b"").decode("utf-8").strip())
            except UnicodeDecodeError:
                continue  # counted, or an error, when the sample is decoded
    return found - {""}


def _of_column(pool: ShardPool) -> tuple[str, ...]:
    """The names in a pool's column of labels; none if it has no such column, or one of integers."""
    described = pool.described
    return () if described is None or described.names is None else described.names


def _is_integer(text: str) -> bool:
    try:
        int(text.encode("ascii"))
    except ValueError:
        return False
    return True
