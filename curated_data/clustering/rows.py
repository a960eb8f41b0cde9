"""The rows of an array, memory map or tensor as float32 tensors, read in blocks."""

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from curated_data.matrix import Matrix, read_rows
from curated_data.threads import parallel_map, threads_of_one_core

METRICS = ("l2", "cosine")
BLOCK = 2048  # rows handled at once; ranks' slices start at multiples, so tiles are the same on any rank

T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """Coordinates in which float32 holds the rows: (x - mean) / scale, under cosine of unit rows.

    Subtracting a mean leaves squared distances unchanged, and reduces the rounding errors of their expansion
    |x|^2 - 2 x.c + |c|^2. A scale keeps squares within float32's range.

    Attributes:
        normalise: divide every row by its Euclidean norm (cosine metric) first.
        mean: (d,) float64, or None for none.
        scale: a power of two, so that it changes no digit.
        exact: convert in float64. Otherwise in float32, which is as good for rows that are given in it.
        dtype: of centroids in the input's coordinates: float64 where float32 could not tell them apart.
    """

    normalise: bool
    mean: np.ndarray | None
    scale: float = 1.0
    exact: bool = False
    dtype: type[np.floating] = np.float32

    def inside(self, points: torch.Tensor) -> torch.Tensor:
        """Points, of unit norm under cosine, in these coordinates, as float64."""
        points = points.double() / self.scale
        if self.mean is None:
            return points
        return points - torch.from_numpy(self.mean / self.scale).to(points.device)

    def outside(self, points: torch.Tensor) -> np.ndarray:
        """Points of these coordinates in the input's, as `dtype`."""
        wide = points.cpu().double().numpy() * self.scale
        return (wide if self.mean is None else wide + self.mean).astype(self.dtype)


class Rows:
    """Some rows of a matrix, read in blocks as float32 on the computing device, centred or normalised.

    Converted rows are held in memory if they fit the budget; otherwise they are read again at every pass.

    Args:
        source: (n, d) numpy array, memory map or tensor, any float dtype.
        ids: (m,) int64, which rows of the source; None for all.
        frame: the coordinates to convert to.
        device: of the blocks.
        budget: bytes that held rows may take.
        sample: (s, d) float64, some of the rows in the coordinates of the frame, not rounded to float32.
        largest: absolute value in the source's rows.
    """

    def __init__(
        self,
        source: Matrix,
        ids: np.ndarray | None,
        *,
        frame: Frame,
        device: torch.device,
        budget: int,
        sample: np.ndarray | None = None,
        largest: float = 0.0,
    ) -> None:
        self.source, self.ids = source, ids
        self.largest = largest
        self.sample = np.empty((0, source.shape[1])) if sample is None else sample
        self.frame, self.device, self.budget = frame, device, budget
        self._shift: torch.Tensor | None = None
        if frame.mean is not None:
            shift = frame.mean / frame.scale if frame.exact else frame.mean.astype(np.float32)
            self._shift = torch.from_numpy(shift).to(device)
        self._held: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.source) if self.ids is None else len(self.ids)

    def fits(self) -> bool:
        """Whether all rows, converted, fit the budget."""
        return len(self) * self.dimension * 4 <= self.budget

    @property
    def dimension(self) -> int:
        return int(self.source.shape[1])

    @property
    def held(self) -> bool:
        """Whether all converted rows are in memory."""
        return self._held is not None

    def hold(self) -> "Rows":
        """Convert all rows now, if they fit the budget."""
        if self._held is None and self.fits():
            held = new_matrix(len(self), self.dimension, device=self.device)
            self.map(lambda start, stop, block: held[start:stop].copy_(block), BLOCK * 8)
            self._held = held
        return self

    def map(
        self,
        work: Callable[[int, int, torch.Tensor], T],
        size: int | None = None,
        positions: np.ndarray | None = None,
    ) -> list[T]:
        """`work(start, stop, rows[start:stop])` for every block, on several threads; results in order.

        Rows that are not held are read ahead, while earlier blocks are worked on; for an accelerator through
        pinned memory on a separate stream.

        Args:
            size: rows per block; None takes a good size for the device.
            positions: (m,) the rows to use, preferably ascending if they are not held; None for all.
        """
        n = len(self) if positions is None else len(positions)
        on_cpu = self.device.type == "cpu"
        pieces = list(blocks(n, size or (BLOCK if on_cpu else BLOCK * 16)))
        workers = torch.get_num_threads() if on_cpu else 2  # one fills the device's queue, one empties it

        def which(start: int, stop: int) -> slice | np.ndarray:
            return slice(start, stop) if positions is None else positions[start:stop]

        if self._held is not None:
            take = self.block if positions is None else lambda start, stop: self.take(positions[start:stop])
            return parallel_map(lambda start, stop: work(start, stop, take(start, stop)), pieces, workers)
        with _ReadAhead([which(*piece) for piece in pieces], self._fetch, workers) as ahead:
            places = [(i,) for i in range(len(pieces))]
            return parallel_map(lambda i: work(*pieces[i], ahead.take(i)), places, workers)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, (stop - start, d)."""
        return self._read(slice(start, stop)) if self._held is None else self._held[start:stop]

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """The rows at some positions, in that order."""
        if self._held is None:
            return self._read(positions)
        return rows_at(self._held, positions)

    def subset(self, positions: np.ndarray, *, hold: bool = True) -> "Rows":
        """The rows at some positions as new `Rows`, held if they fit."""
        ids = positions if self.ids is None else self.ids[positions]
        rows = Rows(self.source, ids, frame=self.frame, device=self.device, budget=self.budget)
        if not hold:
            return rows
        if self._held is not None:
            rows._held = self.take(positions)
        return rows.hold()

    def part(self, start: int, stop: int) -> "Rows":
        """A range of the rows, which shares held memory."""
        if (start, stop) == (0, len(self)):
            return self
        ids = np.arange(start, stop) if self.ids is None else self.ids[start:stop]
        rows = Rows(self.source, ids, frame=self.frame, device=self.device, budget=self.budget)
        if self._held is not None:
            rows._held = self._held[start:stop]
        return rows.hold()

    def _read(self, which: slice | np.ndarray) -> torch.Tensor:
        return self._converted(self._read_source(which).to(self.device))

    def _fetch(self, which: slice | np.ndarray) -> Callable[[], torch.Tensor]:
        """`_read` in a thread that reads ahead; the result hands the rows to the thread that calls it."""
        if self.device.type != "cuda":
            rows = self._read(which)
            return lambda: rows
        with torch.cuda.device(self.device), torch.cuda.stream(_side_stream(self.device)):
            rows = self._read_source(which)
            if rows.device.type == "cpu":
                rows = rows.pin_memory()
            rows = self._converted(rows.to(self.device, non_blocking=True))
            ready = torch.cuda.current_stream().record_event()

        def wait() -> torch.Tensor:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            rows.record_stream(stream)  # keeps its memory until that stream is done with it
            return rows

        return wait

    def _read_source(self, which: slice | np.ndarray) -> torch.Tensor:
        return read_rows(self.source, which if self.ids is None else self.ids[which])

    def _converted(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the source in the coordinates of the frame."""
        rows = rows.double() if self.frame.exact else rows.float()
        if self.frame.normalise:
            rows = unit(rows)
        if self.frame.scale != 1:
            rows = rows / self.frame.scale
        if self._shift is not None:
            rows = rows - self._shift
        return rows.float().contiguous()


class _ReadAhead:
    """Reads pieces in separate threads, a few ahead of those that are taken in order."""

    def __init__(
        self,
        pieces: list[slice | np.ndarray],
        fetch: Callable[[Any], Callable[[], torch.Tensor]],
        workers: int,
    ) -> None:
        # Reading mostly waits: one reader for a few computing threads keeps up if products are large.
        readers = max(1, workers // 4)
        self.pieces, self.fetch, self.depth = pieces, fetch, workers + readers
        self.pool = threads_of_one_core(readers, "curated-data-read")
        self.lock, self.next = threading.Lock(), 0
        self.reads: dict[int, Future[Callable[[], torch.Tensor]]] = {}

    def take(self, i: int) -> torch.Tensor:
        """The i-th piece; starts reading the next ones."""
        with self.lock:
            while self.next < min(i + self.depth, len(self.pieces)):
                self.reads[self.next] = self.pool.submit(self.fetch, self.pieces[self.next])
                self.next += 1
            read = self.reads.pop(i)
        return read.result()()

    def __enter__(self) -> "_ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        for read in self.reads.values():  # only left after a failure
            read.cancel()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their norm: float32 of float32 rows, float64 of float64."""
    # In float64: the norm of a float16 or float32 row must not overflow or vanish.
    wide = rows.double()
    if rows.dtype == torch.float64:  # nor may that of float64: a power of two for each row changes no digit
        wide = torch.ldexp(wide, -torch.frexp(wide.abs().amax(1, keepdim=True)).exponent.clamp(min=-1000))
    wide = wide / wide.norm(dim=1, keepdim=True)
    return wide if rows.dtype == torch.float64 else wide.float()


def rows_at(x: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """The rows of a tensor at some positions, on its device; indexing takes three times as long on a CPU."""
    return x.index_select(0, torch.from_numpy(np.asarray(positions, dtype=np.int64)).to(x.device))


def new_matrix(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A float32 tensor without values; in main memory on huge pages, which numpy asks for and torch does not.

    First writes to it take a third of the time, and reads at random places miss fewer addresses.
    """
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.empty(shape, np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


def blocks(n: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) of the blocks of n rows."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def rank_range(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """The range of rows of one rank: nearly equal ranges that start at whole blocks."""
    whole = -(-n // BLOCK)
    first, last = (whole * r // world_size for r in (rank, rank + 1))
    return min(first * BLOCK, n), min(last * BLOCK, n)


def memory_budget(max_memory: int | None, device: torch.device) -> int:
    """Bytes for one array of held rows: a third of `max_memory`, or of a quarter of the memory that the
    machine, or its accelerator, has.

    Up to three arrays are held: the rows of a level, those of a resampling, and these in the order of their
    cells.
    """
    if max_memory is None:
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 12
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 12
    if not isinstance(max_memory, int | float | np.number) or not max_memory > 0:
        raise ValueError(f"max_memory needs a positive number of bytes, got {max_memory!r}")
    return int(max_memory) // 3


def describe_memory(rows: Rows) -> str:
    """How the rows are kept, for a log line."""
    size, allowed = len(rows) * rows.dimension * 4 / 2**30, 3 * rows.budget / 2**30
    where = (
        f"held as float32, {size:.2f} of {allowed:.2f} GiB allowed"
        if rows.fits()
        else f"read in blocks at every pass: {size:.2f} GiB as float32 are more than a third of {allowed:.2f}"
    )
    return f"{len(rows)} x {rows.dimension} rows on {rows.device}, {where}"


def resident_memory() -> int:
    """Memory of this process in bytes; its peak where the system does not tell the present."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: torch's on an accelerator, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
