"""CPU time of readers that may have worker processes, each measured in a process of its own."""

import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch


def measure(make: Callable[[], Iterator[int]], n: int, seconds: float) -> float:
    """Samples per CPU second of a reader with epochs of n samples, measured for about so long.

    Args:
        make: the reader, an iterator over sizes of batches; a first epoch, of three times `seconds` at most,
            is not counted.
    """

    def rate() -> float:
        batches = make()
        size = seen = next(batches)  # opening and the first batch are a matter of their own
        end = time.monotonic() + 3 * seconds
        while seen < n and time.monotonic() < end:
            seen += next(batches)
        samples, before, end = 0, cpu(), time.monotonic() + seconds
        for size in batches:
            samples += size
            if time.monotonic() > end and samples >= 10 * size:
                break
        return samples / (cpu() - before)

    return apart(rate, 4 * seconds + 60)


def by_turns(
    one: Callable[[], Iterator[int]], other: Callable[[], Iterator[int]], turns: int, batches: int
) -> float:
    """CPU time per batch of one reader over that of another, the median of a few turns within one process,
    so that other load on the machine affects both alike.

    Args:
        one, other: make the readers.
        turns: of each reader.
        batches: of a turn.
    """

    def ratio() -> float:
        readers, pids = [], []
        for make in (one, other):
            others = {worker.pid for worker in multiprocessing.active_children()}
            readers.append(make())
            next(readers[-1])
            pids.append([w.pid for w in multiprocessing.active_children() if w.pid not in others])
        own, of_workers = np.zeros((2, turns + 1)), np.zeros((2, turns + 1))
        for turn in range(turns + 1):
            for number, reader in enumerate(readers):
                of_workers[number, turn] = sum(map(cpu_of, pids[number]))
                before = time.process_time()
                for _ in range(batches):
                    next(reader)
                own[number, turn] = time.process_time() - before
        # What a reader's workers do ahead while the other has its turn is counted to the turn before.
        spent = own[:, 1:-1] + np.diff(of_workers, axis=1)[:, 1:]
        return float(np.median(spent[0] / spent[1]))

    return apart(ratio, 600)


def apart(function: Callable[[], float], timeout: float) -> float:
    """What a function returns, called in a process of its own; not a number if that takes too long."""

    def child(results: multiprocessing.SimpleQueue) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        results.put(function())
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = _Plain(target=child, args=(results,))
    process.start()
    deadline = time.monotonic() + timeout  # a reader that hangs is not a number
    while process.is_alive() and results.empty() and time.monotonic() < deadline:
        time.sleep(0.02)
    found = float("nan") if results.empty() else results.get()
    process.kill()
    process.join()
    return found


class _Plain(multiprocessing.get_context("fork").Process):
    """A process that may have loader workers of its own."""

    daemon = False


def cpu() -> float:
    """CPU seconds of this process and of its workers so far, those that ended included."""
    workers = multiprocessing.active_children()  # which also collects those that ended
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    return seconds + sum(cpu_of(worker.pid) for worker in workers)


def cpu_of(pid: int) -> float:
    """CPU seconds of another process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
