"""Indexing the shards of a pool: one task per shard, in parallel, shared with other processes."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from curated_data.cache.artifacts import MANIFEST, build_once, fingerprint, open_cache
from curated_data.cache.layout import INDEX, POOL
from curated_data.cache.locks import locked
from curated_data.errors import PoolError
from curated_data.pool.each import each, workers_of
from curated_data.pool.index import PoolIndex, ShardIndex, concatenate, index_shard
from curated_data.pool.index_files import load_pool_index, save_shard_index, write_pool_index
from curated_data.pool.known import Facts
from curated_data.pool.shard import ShardFile
from curated_data.pool.storage import check_unchanged
from curated_data.pool.tar import Source, local_source
from curated_data.pool.urls import is_remote

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_WORTH_PROCESSES = 256 << 20  # bytes of shards from which parallel processes are worth starting

Indexer = Callable[[ShardFile], ShardIndex]  # must pickle small: it is sent to a process with every shard
# Opens a remote shard for indexing, for the length of a `with` block.
Opener = Callable[[ShardFile], AbstractContextManager[Source]]


def build_in_memory(
    shards: Sequence[ShardFile], index_one: Indexer, num_workers: int | None
) -> tuple[PoolIndex, list[str]]:
    """Index every shard and keep the index in memory; returns it, and the layout of each shard."""
    started = time.monotonic()
    found = dict(_each(index_one, shards, range(len(shards)), num_workers))
    indexes = [found[number] for number in range(len(shards))]
    pool = concatenate(indexes, [shard.url for shard in shards])
    _report(pool, len(shards), len(shards), time.monotonic() - started)
    return pool, [index.layout for index in indexes]


def build_in_cache(
    shards: Sequence[ShardFile], index_one: Indexer, num_workers: int | None, cache_dir: str | Path
) -> tuple[PoolIndex, Path, list[str]]:
    """Index the shards that are not in the cache yet.

    A shard in a state that was indexed before is not looked at. Any number of processes may call this at
    once, related or not: each takes shards that no other is working on, and waits for the rest at the end.

    Returns:
        The pool's index, its folder, and the layout of each shard.
    """
    started = time.monotonic()
    root = open_cache(cache_dir)
    known: dict[str, str] = {fact[0]: fact[1] for fact in Facts(root, "layouts").all()}
    layouts = [known.get(shard.fingerprint) for shard in shards]
    names = [name for name in layouts if name is not None]
    folder = root / POOL / pool_fingerprint(names)
    if len(names) == len(shards) and (folder / MANIFEST).exists():
        return load_pool_index(folder), folder, names
    missing = [number for number, name in enumerate(layouts) if not _is_indexed(root, name)]
    task = partial(_index_to_cache, index_one=index_one, root=root)
    for number, layout in _each(task, shards, missing, num_workers):
        layouts[number] = layout
    for number in missing:  # locked by others so far: indexed by now, or ours if they died
        if not _is_indexed(root, layouts[number]):
            layouts[number] = _index_to_cache(shards[number], index_one=index_one, root=root, wait=True)
    names = [name for name in layouts if name is not None]
    folders = [root / INDEX / name for name in names]
    folder, found = build_once(
        root / POOL / pool_fingerprint(names), lambda temporary: write_pool_index(temporary, folders)
    )
    index = load_pool_index(folder)
    if not found:
        _report(index, len(shards), len(missing), time.monotonic() - started)
    return index, folder, names


def index_shard_file(shard: ShardFile, opener: Opener | None = None) -> ShardIndex:
    """Index one shard by its headers.

    Raises:
        PoolError: it has changed since the pool was opened, or is not a readable tar.
    """
    if is_remote(shard.url):
        assert opener is not None, "given where shards are remote"
        with opener(shard) as source:
            return index_shard(source)
    try:
        handle = os.open(shard.url, os.O_RDONLY)
    except OSError as error:
        raise PoolError(f"{shard.url}: cannot be opened ({error.strerror})") from error
    try:
        check_unchanged(shard, os.fstat(handle))
        index = index_shard(local_source(shard.url, handle))
        check_unchanged(shard, os.fstat(handle))  # it may have changed meanwhile
        return index
    finally:
        os.close(handle)


def pool_fingerprint(layouts: Sequence[str]) -> str:
    """The name of a pool, by the layouts of its shards and their order."""
    return fingerprint(stage="pool", shards=list(layouts))


def _is_indexed(root: Path, layout: str | None) -> bool:
    return layout is not None and (root / INDEX / layout / MANIFEST).exists()


def _index_to_cache(shard: ShardFile, *, index_one: Indexer, root: Path, wait: bool = False) -> str | None:
    """The layout of a shard, whose index is then in the cache; None if another process is building it."""
    facts = Facts(root, "layouts")
    with locked(root / INDEX / shard.fingerprint, wait=wait) as held:
        if not held:
            return None
        for _, layout in facts.starting(shard.fingerprint):
            if _is_indexed(root, layout):
                return layout
        index = index_one(shard)
        if not _is_indexed(root, index.layout):
            save_shard_index(root / INDEX / index.layout, index, url=shard.url)
        facts.add(shard.fingerprint, index.layout)
        return index.layout


def _each(
    task: Callable[[ShardFile], Result],
    shards: Sequence[ShardFile],
    numbers: Iterable[int],
    num_workers: int | None,
) -> Iterator[tuple[int, Result]]:
    """Run a task for each numbered shard, in parallel if that is faster; yields results as they come."""
    numbers = list(numbers)
    remote = any(is_remote(shards[number].url) for number in numbers)
    large = num_workers is not None or sum(shards[number].size for number in numbers) >= _WORTH_PROCESSES
    # Of a remote shard a task waits for the network.
    workers = 16 if remote and num_workers is None else workers_of(num_workers) if remote or large else 1
    yield from each(
        lambda number: task(shards[number]), numbers, title="index shards", workers=workers, threads=remote
    )


def _report(pool: PoolIndex, n_shards: int, n_indexed: int, seconds: float) -> None:
    log.info(
        "indexed %d of %d shards in %.1f s: the pool has %d samples, extensions %s",
        n_indexed,
        n_shards,
        seconds,
        len(pool),
        ", ".join(pool.extensions[:12]) + (", ..." if len(pool.extensions) > 12 else ""),
    )
    # Those whose parts lie apart are reported whenever the pool is opened.
    n_apart = sum(pool.notes[kind].number for kind in ("apart", "scattered") if kind in pool.notes)
    if pool.n_duplicate_keys > n_apart:
        log.warning(
            "%d of %d samples have the key of an earlier one, for example %r; samples are identified by "
            "their ids, so only joins by key are affected",
            pool.n_duplicate_keys - n_apart,
            len(pool),
            pool.duplicate_example,
        )
