"""The most similar rows of a bank, exactly, tile by tile: of the bank one tile is in memory, of the scores
one.

The bank may be a memory map or a store on disk, of any float type; it is read once for each call.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.inputs import as_tensor

_QUERIES, _TILE, _TILE_NUMBERS = 512, 4096, 2**21  # a tile of 8 MiB at most, scores of that size or less
# The C library gives freed memory back to the system, which clears each page before it lends it again: slower
# than what is computed there. It keeps up to twice the size of the largest block that was freed so far, so
# one is made and freed at first; blocks above 32 MiB do not count.
_KEPT = 31 * 2**20
_GROUP = 16  # scores that are searched as one
_DEVICE_QUERIES, _DEVICE_TILE = 8192, 65536


class RowSource(Protocol):
    """Features (n, d) that give rows by slice: an array, a tensor, a memory map, an embedding store."""

    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> object: ...


def top_rows(
    queries: Tensor, bank: RowSource, k: int, *, metric: str = "cosine", name: str = "bank"
) -> tuple[Tensor, Tensor]:
    """The k rows of this rank's bank most similar to each query.

    A collective call: rows that are not finite are an error on every rank. Of equal similarities any may come
    first.

    Args:
        queries: (m, d) float32, of norm 1 for "cosine".
        bank: (n, d), of any norms.
        k: all of the bank where it has fewer.
        metric: "cosine", or "euclidean" (the similarity is the negative distance).
        name: of the bank, for errors.

    Returns:
        Similarities (m, min(k, n)) in falling order, and rows, as many, int64.

    Raises:
        ValueError: rows of the bank, on any rank, are not finite.
    """
    m, n = len(queries), bank.shape[0]
    k = min(k, n)
    on_cpu = queries.device.type == "cpu"
    size, width = (_QUERIES, _TILE) if on_cpu else (_DEVICE_QUERIES, _DEVICE_TILE)
    if on_cpu:
        torch.empty(_KEPT, dtype=torch.uint8)
        width = min(width, max(512, _TILE_NUMBERS // queries.shape[1] // _GROUP * _GROUP))
    product = _Product(metric, on_cpu)
    blocks = [(product.prepared(part), _Best(part, k)) for part in queries.split(size)] if m else []
    bad: list[int] = []
    for start in range(0, n, width):
        tile = as_tensor(bank[start : min(start + width, n)]).to(queries.device, torch.float32)
        tile, wrong = _scaled(tile, metric)
        bad += [start + row for row in wrong]
        tile = product.prepared(tile)
        for block, best in blocks:
            best.add(product(block, tile), start)
    if int(all_reduce(torch.tensor([len(bad)], device=queries.device))):
        raise ValueError(f"{name}: {len(bad)} rows of features are not finite, the first at {bad[:5]}")
    if not m:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries.device)
    values, rows = (torch.cat(parts) for parts in zip(*(best.sorted() for _, best in blocks)))
    return values, rows


def _scaled(tile: Tensor, metric: str) -> tuple[Tensor, list[int]]:
    """Rows of norm 1 for "cosine", else as they are; 0 for those that are not finite, which are named."""
    norms = torch.linalg.vector_norm(tile, dim=1, keepdim=True)
    wrong: list[int] = []
    if not bool(torch.isfinite(norms).all()):  # or the square of a finite one is not
        finite = torch.isfinite(tile).all(1, keepdim=True)
        wrong = (~finite).flatten().nonzero().flatten().tolist()
        tile = tile.masked_fill(~finite, 0)
        return (F.normalize(tile.double(), dim=1).float() if metric == "cosine" else tile), wrong
    return (tile / norms.clamp_min(1e-12) if metric == "cosine" else tile), wrong


class _Product:
    """Similarities of queries to the rows of a tile, both prepared.

    On processors with AVX-512 products go through oneDNN: torch's default, MKL, keeps to AVX2 on those that
    are not Intel's. By rule, not by trial, so that a run repeats itself.
    """

    def __init__(self, metric: str, on_cpu: bool) -> None:
        self.metric = metric
        avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.onednn = metric == "cosine" and on_cpu and torch.backends.mkldnn.is_available() and avx512

    def prepared(self, x: Tensor) -> Tensor:
        return x.contiguous().to_mkldnn() if self.onednn else x

    def __call__(self, queries: Tensor, tile: Tensor) -> Tensor:
        if self.onednn:
            return F.linear(queries, tile).to_dense()
        if self.metric == "cosine":
            return queries @ tile.T
        return -torch.cdist(queries, tile, compute_mode="donot_use_mm_for_euclid_dist")


class _Best:
    """The best rows so far for each of some queries, and some more: they are sorted out when these are many.

    Of a tile, what is above a query's k-th best is added: in all some k for each doubling of the rows seen,
    where these come in no order.
    """

    def __init__(self, queries: Tensor, k: int) -> None:
        m, self.k, self.capacity = len(queries), k, 3 * k + 32
        self.values = queries.new_full((m, self.capacity), -torch.inf)
        self.rows = torch.zeros(m, self.capacity, dtype=torch.int64, device=queries.device)
        self.first = self.capacity * torch.arange(m, device=queries.device)  # where each query's places begin
        self.filled = torch.zeros_like(self.first)
        self.least: Tensor | None = None  # the k-th best when last sorted out; none at first

    def add(self, scores: Tensor, start: int) -> None:
        """Scores (m, t) of the bank's rows from `start`."""
        if self.least is not None:
            m, t = scores.shape
            place = _above(scores, self.least)
            row = place.div(t, rounding_mode="floor")
            counts = torch.bincount(row, minlength=m)
            if int((self.filled + counts).max()) > self.capacity:
                self._sort_out()
            if int((self.filled + counts).max()) <= self.capacity:
                # Places are in order of their queries: a query's come one after another.
                to = (self.first + self.filled - counts.cumsum(0) + counts)[row]
                to += torch.arange(len(row), device=row.device)
                self.values.view(-1)[to] = scores.view(-1)[place]
                self.rows.view(-1)[to] = place - (t * row - start)
                self.filled += counts
                return
        # The first tiles; and one that is nearly all above, as in a bank in rising order.
        values, columns = scores.topk(min(self.k, scores.shape[1]), dim=1, sorted=False)
        if int(self.filled.max()) + values.shape[1] > self.capacity:
            self._sort_out()
        to = int(self.filled.max())
        part = slice(to, to + values.shape[1])
        self.values[:, part], self.rows[:, part] = values, columns + start
        self.filled += part.stop - self.filled
        if self.least is None and part.stop >= self.k:
            self._sort_out()

    def _sort_out(self) -> None:
        self.values[:, : self.k], self.rows[:, : self.k] = self._best(sorted=False)
        self.values[:, self.k :] = -torch.inf
        self.filled.fill_(self.k)
        self.least = self.values[:, : self.k].amin(1)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The best (m, k) in falling order, and their rows."""
        return self._best(sorted=True)

    def _best(self, *, sorted: bool) -> tuple[Tensor, Tensor]:
        used = max(self.k, int(self.filled.max()))
        values, order = self.values[:, :used].topk(self.k, dim=1, sorted=sorted)
        return values, self.rows[:, :used].gather(1, order)


def _above(scores: Tensor, least: Tensor) -> Tensor:
    """Flat places of each query's scores (m, t) above its `least` (m,), those of a query one after another.

    The largest of each group of scores is looked at; where few are above, only their groups are.
    """
    m, t = scores.shape
    groups = t // _GROUP
    if t % _GROUP == 0:
        largest = scores.view(m, _GROUP, groups).amax(1)
        found = _places(largest > least[:, None])
        if len(found) * 16 < m * groups:
            row = found.div(groups, rounding_mode="floor")
            first = found + row * (t - groups)
            place = first[:, None] + groups * torch.arange(_GROUP, device=scores.device)
            return place[scores.view(-1)[place] > least[row][:, None]]
    return _places(scores > least[:, None])


def _places(mask: Tensor) -> Tensor:
    if mask.device.type == "cpu":  # numpy's search is several times faster than torch's
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)
