"""Work divided among threads in which torch uses one core each.

One core per piece is faster than all cores in each operation, because none waits for the others, and the
results do not depend on the number of threads. torch lets go of the interpreter while it computes.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def parallel_map(
    work: Callable[..., T], pieces: Iterable[Sequence[object]], workers: int | None = None
) -> list[T]:
    """`[work(*piece) for piece in pieces]` on as many threads as torch is set to use, with one core each."""
    pieces, workers = list(pieces), workers or torch.get_num_threads()
    if min(workers, len(pieces)) <= 1:
        return [work(*piece) for piece in pieces]
    pool = threads_of_one_core(workers, "curated-data-compute")
    return list(pool.map(lambda piece: work(*piece), pieces))


def threads_of_one_core(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads of this process in which torch uses one core; those of one name and number are started once."""
    return _pool(os.getpid(), workers, torch.get_num_threads(), name)


@cache
def _pool(pid: int, workers: int, default: int, name: str) -> ThreadPoolExecutor:
    """The threads; `pid` keeps them from crossing a fork.

    Args:
        default: torch's number of threads elsewhere, which is left unchanged.
    """
    pool = ThreadPoolExecutor(workers, name, initializer=_use_one_core)
    # torch's setting is per thread, but also changes the default for new threads: start all workers, each
    # waiting for the last, then restore the default.
    together = threading.Barrier(workers)
    list(pool.map(lambda _: together.wait(), range(workers)))
    torch.set_num_threads(default)
    return pool


def _use_one_core() -> None:
    torch.set_num_threads(1)
    # A thread takes torch's default when it first looks at it: let that be now, before it is restored.
    torch.get_num_threads()
