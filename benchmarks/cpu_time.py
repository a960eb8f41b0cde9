"""CPU time of readers that may have worker processes, each measured in a process of its own."""

import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

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
    deadline = time.monotonic() + timeout  # a reader that hangs is no number
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
