"""The most similar rows of a bank, exactly, tile by tile: of the bank one tile is in memory, of the scores
one.

The bank may be a memory map or a store on disk, of any float type; it is read once for each call.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.inputs import as_tensor

_QUERIES, _TILE = 512, 4096  # scores of 8 MiB: memory of that size is kept and used again, larger is not
_GROUP = 32  # scores that are searched as one
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
    values, rows = queries.new_empty(m, 0), torch.empty(m, 0, dtype=torch.int64, device=queries.device)
    product = _Product(metric, on_cpu)
    asked = [product.prepared(queries[first : first + size]) for first in range(0, m, size)]
    bad: list[int] = []
    for start in range(0, n, width):
        tile = as_tensor(bank[start : min(start + width, n)]).to(queries.device, torch.float32)
        finite = torch.isfinite(torch.linalg.vector_norm(tile, torch.inf, dim=1))
        if not bool(finite.all()):
            bad += (start + (~finite).nonzero().flatten()).tolist()
            tile = tile.masked_fill(~finite[:, None], 0)
        tile = product.prepared(F.normalize(tile, dim=1) if metric == "cosine" else tile)
        kept = []
        for first, block in zip(range(0, m, size), asked):
            part = slice(first, first + size)
            kept.append(_merged(product(block, tile), start, values[part], rows[part], k))
        if kept:
            values, rows = (torch.cat(parts) for parts in zip(*kept))
    if int(all_reduce(torch.tensor([len(bad)], device=queries.device))):
        raise ValueError(f"{name}: {len(bad)} rows of features are not finite, the first at {bad[:5]}")
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, rows.gather(1, order)


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


def _merged(scores: Tensor, start: int, values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the scores (m, t) of bank rows from `start` and of those found so far, in no order."""
    t = scores.shape[1]
    found = None
    if values.shape[1] == k and t % _GROUP == 0:
        found = _above(scores, values.amin(1))
    if found is None:  # the first tiles, and the last
        more, columns = scores.topk(min(k, t), dim=1, sorted=False)
    else:
        more, columns = found
    values, rows = torch.cat([values, more], 1), torch.cat([rows, columns + start], 1)
    if values.shape[1] > k:
        values, order = values.topk(k, dim=1, sorted=False)
        rows = rows.gather(1, order)
    return values, rows


def _above(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor] | None:
    """Each row's scores (m, t) above its `least`, and their columns, filled up with -inf; None if these are
    many.

    The largest of each group of scores is looked at, then the groups that hold something.
    """
    m, t = scores.shape
    groups = t // _GROUP
    row, group = (scores.view(m, _GROUP, groups).amax(1) > least[:, None]).nonzero().unbind(1)
    if 8 * len(row) > m * groups:
        return None
    column = (group[:, None] + groups * torch.arange(_GROUP, device=scores.device)).flatten()
    row = row.repeat_interleave(_GROUP)
    score = scores.flatten()[row * t + column]
    above = (score > least[row]).nonzero().flatten()
    row, column, score = row[above], column[above], score[above]  # rows in rising order
    counts = torch.bincount(row, minlength=m)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = int(counts.max())
    values = scores.new_full((m, width), -torch.inf)
    columns = torch.zeros(m, width, dtype=torch.int64, device=scores.device)
    # Groups of one row follow one another, but not their columns: the order within a row does not matter.
    values[row, place], columns[row, place] = score, column
    return values, columns
