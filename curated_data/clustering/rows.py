"""The rows of an input array as float32 tensors, whatever holds them: numpy, a memory map, or a tensor."""

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

BLOCK = (
    2048  # rows handled at once; ranks' slices start at multiples, so a row's tile is the same on any of them
)

T = TypeVar("T")


class Rows:
    """Some rows of a matrix, read in blocks, as centred or normalised float32 on the device that computes.

    Rows are held converted where they fit the budget, else read again from the source at every pass.

    Args:
        source: (n, d) numpy array, memory map or tensor, any float dtype.
        ids: which rows of the source, (m,) int64; None for all.
        normalise: divide every row by its Euclidean norm (cosine metric).
        mean: (d,) float64 subtracted from every row, or None. Squared distances do not change, and their
            expansion |x|^2 - 2 x.c + |c|^2 loses less to rounding.
        device: where blocks are given.
        budget: bytes that held rows may take.
    """

    def __init__(
        self,
        source: Any,
        ids: np.ndarray | None,
        *,
        normalise: bool,
        mean: np.ndarray | None,
        device: torch.device,
        budget: int,
    ) -> None:
        self.source, self.ids = source, ids
        self.normalise, self.mean, self.device, self.budget = normalise, mean, device, budget
        self._mean = None if mean is None else torch.from_numpy(mean.astype(np.float32)).to(device)
        self._held: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) if self.ids is None else len(self.ids)

    def fits(self) -> bool:
        """Whether all the rows, converted, are within the budget."""
        return len(self) * self.dimension * 4 <= self.budget

    @property
    def dimension(self) -> int:
        return int(self.source.shape[1])

    def hold(self) -> "Rows":
        """Convert all rows now, if they fit the budget."""
        if self._held is None and self.fits():
            held = torch.empty((len(self), self.dimension), dtype=torch.float32, device=self.device)
            for start, stop in blocks(len(self), BLOCK * 8):
                held[start:stop] = self._read(slice(start, stop))
            self._held = held
        return self

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, (stop - start, d)."""
        return self._read(slice(start, stop)) if self._held is None else self._held[start:stop]

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """Rows at some positions, in that order."""
        if self._held is None:
            return self._read(positions)
        return self._held[torch.from_numpy(np.asarray(positions, dtype=np.int64)).to(self.device)]

    def subset(self, positions: np.ndarray, *, hold: bool = True) -> "Rows":
        """The rows at some positions, as rows of their own, held if they fit."""
        ids = positions if self.ids is None else self.ids[positions]
        rows = Rows(
            self.source, ids, normalise=self.normalise, mean=self.mean, device=self.device, budget=self.budget
        )
        if not hold:
            return rows
        if self._held is not None:
            rows._held = self.take(positions)
        return rows.hold()

    def part(self, start: int, stop: int) -> "Rows":
        """A range of the rows; shares what is held."""
        if (start, stop) == (0, len(self)):
            return self
        ids = np.arange(start, stop) if self.ids is None else self.ids[start:stop]
        rows = Rows(
            self.source, ids, normalise=self.normalise, mean=self.mean, device=self.device, budget=self.budget
        )
        if self._held is not None:
            rows._held = self._held[start:stop]
        return rows.hold()

    def _read(self, which: slice | np.ndarray) -> torch.Tensor:
        if self.ids is not None:
            which = self.ids[which]
        rows = read_rows(self.source, which).to(self.device)
        if self.normalise:
            # In float64 inside: the norm of a float16 or float32 row must not overflow or vanish.
            wide = rows.double()
            rows = (wide / wide.norm(dim=1, keepdim=True)).float()
        if self._mean is not None:
            rows = rows - self._mean
        return rows.contiguous()


def read_rows(source: Any, which: slice | np.ndarray) -> torch.Tensor:
    """Rows of an array or a tensor as float32, on the tensor's own device."""
    if isinstance(source, torch.Tensor):
        index = which if isinstance(which, slice) else torch.from_numpy(which).to(source.device)
        return source[index].detach().float()
    rows = np.ascontiguousarray(source[which], dtype=np.float32)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())  # torch knows no read-only arrays


def blocks(n: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) that cut n rows into blocks."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def rank_range(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows of one rank: near-equal ranges that begin at whole blocks."""
    whole = -(-n // BLOCK)
    first, last = (whole * r // world_size for r in (rank, rank + 1))
    return min(first * BLOCK, n), min(last * BLOCK, n)


def parallel_map(work: Callable[..., T], pieces: list[Any]) -> list[T]:
    """`[work(*piece) for piece in pieces]` on as many threads as torch is set to use, one core each.

    One core a piece beats all cores in each product: no waiting at its end, and results that do not depend on
    the number of threads.
    """
    workers = min(torch.get_num_threads(), len(pieces))
    if workers <= 1:
        return [work(*piece) for piece in pieces]
    return list(_pool(os.getpid(), torch.get_num_threads()).map(lambda piece: work(*piece), pieces))


@cache
def _pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """This process's threads in which torch computes on one core; `pid` keeps them from crossing a fork."""
    pool = ThreadPoolExecutor(
        workers, "curated-data-kmeans", initializer=torch.set_num_threads, initargs=(1,)
    )
    # torch's setting is each thread's own, but the default for later threads is shared: start all workers,
    # each held until the last is there, then put the default back.
    together = threading.Barrier(workers)
    list(pool.map(lambda _: together.wait(), range(workers)))
    torch.set_num_threads(workers)
    return pool


def memory_budget(max_memory: int | None) -> int:
    """Bytes for one array of held rows: a third of what is set, or of a quarter of the machine's memory.

    A third, for up to three are held: a level's rows, those of a resampling, and the same in the order of
    their cells.
    """
    if max_memory is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 12
    if not isinstance(max_memory, int | float | np.number) or not max_memory > 0:
        raise ValueError(f"max_memory needs a positive number of bytes, got {max_memory!r}")
    return int(max_memory) // 3


def describe_memory(rows: Rows) -> str:
    """Where the rows are kept, for a log line."""
    size, allowed = len(rows) * rows.dimension * 4 / 2**30, 3 * rows.budget / 2**30
    where = (
        f"held as float32, {size:.2f} of {allowed:.2f} GiB allowed"
        if rows.fits()
        else f"read in blocks at every pass: {size:.2f} GiB as float32 are more than a third of {allowed:.2f}"
    )
    return f"{len(rows)} x {rows.dimension} rows on {rows.device}, {where}"


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: on an accelerator those of torch, else all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
