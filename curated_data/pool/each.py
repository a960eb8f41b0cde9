"""Tasks that are each of one shard, run in parallel."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from curated_data.errors import PoolError
from curated_data.parallel import check_ranks, world_size
from curated_data.processes import end_with_parent, n_cores
from curated_data.progress import progress

Result = TypeVar("Result")

_task: Callable[[int], Any] | None = None  # of a worker process


def each(
    task: Callable[[int], Result], numbers: Sequence[int], *, title: str, workers: int, threads: bool = False
) -> Iterator[tuple[int, Result]]:
    """Run a task for each number, such as that of a shard; yields numbers and results as they come.

    Worker processes are forked: a spawned one runs the user's script again up to its main guard, which many
    scripts lack. On macOS, whose own libraries may crash in a forked process, they are threads too.

    Args:
        task: not pickled, so it may be of any kind and size; its results are.
        numbers: to run it for.
        title: of the progress bar.
        workers: processes; with one, and within a worker of another program, tasks run in this process.
        threads: run them in threads instead, as where they wait for the network.

    Raises:
        PoolError: a worker process was killed.
    """
    workers = min(workers, len(numbers))
    with progress(title, len(numbers)) as advance:
        if workers <= 1 or multiprocessing.current_process().daemon:
            for number in numbers:
                check_ranks()
                yield number, task(number)
                advance()
            return
        with _executor(task, workers, threads or sys.platform == "darwin") as (executor, run):
            tasks = {executor.submit(run, number): number for number in numbers}
            try:
                for done in as_completed(tasks):
                    check_ranks()
                    yield tasks[done], done.result()
                    advance()
            except BrokenProcessPool as error:
                raise PoolError(
                    f"{title}: a worker process was killed, most likely for lack of memory; run again to "
                    "continue"
                ) from error
            finally:
                executor.shutdown(wait=True, cancel_futures=True)


def workers_of(num_workers: int | None) -> int:
    """The number of worker processes of a setting; None takes one per core, which ranks divide."""
    return max(1, n_cores() // world_size() if num_workers is None else num_workers)


@contextmanager
def _executor(
    task: Callable[[int], Result], workers: int, threads: bool
) -> Iterator[tuple[Executor, Callable[[int], Result]]]:
    """An executor, and what to submit to it."""
    if threads:
        with ThreadPoolExecutor(workers) as executor:
            yield executor, task
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(os.getpid(), task),
    ) as processes:
        yield processes, _run


def _begin(parent: int, task: Callable[[int], Any]) -> None:
    global _task
    end_with_parent(parent)
    _task = task


def _run(number: int) -> Any:
    assert _task is not None, "set as the process began"
    return _task(number)
