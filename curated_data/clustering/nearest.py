"""The exact nearest centroid of every row, without storing a rows x centroids matrix."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from curated_data.clustering.rows import Rows, blocks, rows_at
from curated_data.threads import parallel_map

_ROWS, _COLUMNS = 1024, 1024  # a tile of scores, 4 MiB: stays in the cache from the product to the search
TILE = 256  # rows whose nearest few centroids are searched at once
_DEVICE_ROWS, _DEVICE_COLUMNS = 32768, 4096  # the same on an accelerator, 512 MiB


class Centroids:
    """Centroids prepared for many products: the score of row x and centroid c is |c|^2 - 2 x.c.

    Adding |x|^2 gives the squared distance, which comparisons for one x do not need.

    Args:
        centroids: (k, d) float32.
        small: for some hundred rows and centroids, where oneDNN's conversions take longer than it saves.
    """

    def __init__(self, centroids: torch.Tensor, small: bool = False) -> None:
        self.centroids, self.k = centroids, len(centroids)
        self.on_cpu = centroids.device.type == "cpu"
        self.onednn = self.on_cpu and not small and onednn_is_faster()
        self.norms = centroids.square().sum(1)
        weight = -2.0 * centroids
        self.tiles: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for start, stop in blocks(self.k, _COLUMNS if self.on_cpu else _DEVICE_COLUMNS):
            w, b = weight[start:stop].contiguous(), self.norms[start:stop].contiguous()
            self.tiles.append((start, w.to_mkldnn(), b.to_mkldnn()) if self.onednn else (start, w.T, b))

    def scores(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """For each tile of centroids, its first index and (m, width) scores, which may be overwritten."""
        if self.onednn:
            rows = rows.to_mkldnn()
        for start, weight, bias in self.tiles:
            if self.onednn:
                yield start, F.linear(rows, weight, bias).to_dense()
            else:
                yield start, torch.addmm(bias, rows, weight)

    def nearest(self, rows: torch.Tensor) -> np.ndarray:
        """The nearest centroid of each row, (m,) int64; the lowest on ties."""
        return self._in_blocks(rows, None, False)[0]

    def nearest_scored(self, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid of each row, (m,) int64, and its score, (m,) float32."""
        index, score, _ = self._in_blocks(rows, None, False)
        return index, score

    def two_nearest(self, rows: torch.Tensor, skip: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """The nearest centroid of each row, its score, and the score of the second nearest (inf for k = 1).

        Args:
            rows: (m, d).
            skip: (m,) int64, a centroid to ignore for each row, -1 for none; its score is then the fourth
                result (nan for none).

        Returns:
            (m,) int64 index (the lowest on ties; -1 if none is left), (m,) float32 score, (m,) float32 score
            of the second.
        """
        return self._in_blocks(rows, skip, True)

    def _in_blocks(self, rows: torch.Tensor, skip: np.ndarray | None, second: bool) -> tuple[np.ndarray, ...]:
        size = _ROWS if self.on_cpu else _DEVICE_ROWS
        search = self._search_on_cpu if self.on_cpu else self._search_on_device
        parts = [
            search(rows[a:b], None if skip is None else skip[a:b], second) for a, b in blocks(len(rows), size)
        ]
        if not parts:
            return (
                np.empty(0, np.int64),
                *(np.empty(0, np.float32) for _ in range(2 if skip is None else 3)),
            )
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _search_on_cpu(
        self, rows: torch.Tensor, skip: np.ndarray | None, need_second: bool
    ) -> tuple[np.ndarray, ...]:
        m = len(rows)
        index, best, second = np.full(m, -1), np.full(m, np.inf, np.float32), np.full(m, np.inf, np.float32)
        skipped = np.full(m, np.nan, np.float32)
        every = np.arange(m)
        for start, tile in self.scores(rows):
            scores = tile.numpy()  # numpy's search is tenfold faster than torch's
            if skip is not None:
                own = np.flatnonzero((skip >= start) & (skip < start + scores.shape[1]))
                column = skip[own] - start
                skipped[own] = scores[own, column]
                scores[own, column] = np.inf
            at = scores.argmin(1)
            low = scores[every, at]
            better = low < best
            if need_second:
                scores[every, at] = np.inf
                second = np.minimum(np.where(better, best, low), np.minimum(second, scores.min(1)))
            index = np.where(better, at + start, index)
            best = np.where(better, low, best)
        index = index.astype(np.int64)
        return (index, best, second) if skip is None else (index, best, second, skipped)

    def _search_on_device(
        self, rows: torch.Tensor, skip: np.ndarray | None, need_second: bool
    ) -> tuple[np.ndarray, ...]:
        own = None if skip is None else torch.from_numpy(skip).to(rows.device)
        found = _search(self.scores(rows), rows, own, need_second)
        return tuple(part.cpu().numpy() for part in found)  # the host does not wait before this


def _search(
    scores: Iterator[tuple[int, torch.Tensor]],
    rows: torch.Tensor,
    skip: torch.Tensor | None,
    need_second: bool,
) -> tuple[torch.Tensor, ...]:
    """`Centroids.two_nearest` from tiles of scores, on the device of the rows.

    A tile is written once, read once for the nearest, and once more for the second.
    """
    best = torch.full((len(rows),), torch.inf, device=rows.device)
    second, skipped = best.clone(), torch.full_like(best, torch.nan)
    index = torch.full_like(best, -1, dtype=torch.int64)
    for start, tile in scores:
        if skip is not None:
            inside = (skip >= start) & (skip < start + tile.shape[1])
            column = torch.where(inside, skip - start, 0)[:, None]
            own = tile.gather(1, column)[:, 0]
            skipped = torch.where(inside, own, skipped)
            tile.scatter_(1, column, torch.where(inside, torch.inf, own)[:, None])
        low, at = tile.min(1)
        better = low < best
        if need_second:
            tile.scatter_(1, at[:, None], torch.inf)
            second = torch.minimum(torch.where(better, best, low), torch.minimum(second, tile.amin(1)))
        index = torch.where(better, at + start, index)
        best = torch.where(better, low, best)
    return (index, best, second) if skip is None else (index, best, second, skipped)


def onednn_is_faster() -> bool:
    """Whether to use oneDNN for products: MKL, torch's default, only uses AVX2 on processors of other makers.

    On an AMD EPYC with AVX-512, 215 against 97 GFLOP/s per core. Decided by rule, not by trial, so that runs
    are repeatable.
    """
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def nearest(rows: Rows, centroids: torch.Tensor) -> np.ndarray:
    """The index of each row's nearest centroid, (n,) int64; the lowest on ties."""
    ready = Centroids(centroids)
    return map_into(rows, np.empty(len(rows), np.int64), lambda start, stop, block: ready.nearest(block))


def nearest_columns(
    rows: torch.Tensor, centroids: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` centroids nearest to each row, in ascending order of their index, and their scores.

    Returns:
        (m, count) int64 and (m, count) float32.
    """
    norms = centroids.square().sum(1)

    def one(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.addmm(norms, rows[start:stop], centroids.T, alpha=-2)
        columns = _smallest(scores, count)
        return columns, scores.gather(1, columns)

    parts = parallel_map(one, list(blocks(len(rows), TILE)))
    if not parts:
        return torch.empty(0, count, dtype=torch.int64), torch.empty(0, count)
    columns, scores = zip(*parts, strict=True)
    return torch.cat(columns), torch.cat(scores)


def _smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the `count` smallest scores of each row, ascending."""
    if scores.device.type == "cpu":
        # To find the count-th value and compare with it takes half the time of finding places.
        values = scores.numpy()
        limit = np.partition(values, count - 1, axis=1)[:, count - 1 :][:, :1]
        at = np.flatnonzero(values <= limit)
        if len(at) == len(values) * count:  # no ties at the limit
            return torch.from_numpy(at % values.shape[1]).view(-1, count)
    return scores.topk(count, largest=False, sorted=False).indices.sort(1).values


def squared_distances(rows: Rows, centroids: torch.Tensor, assignment: np.ndarray) -> np.ndarray:
    """|x - c|^2 of each row and its centroid, (n,) float64, by subtraction, which avoids cancellation."""

    def one(start: int, stop: int, block: torch.Tensor) -> np.ndarray:
        gap = rows_at(centroids, assignment[start:stop]).sub_(block)
        return gap.square_().sum(1).double().cpu().numpy()

    return map_into(rows, np.empty(len(rows)), one)


def map_into(rows: Rows, out: np.ndarray, work: Callable[[int, int, torch.Tensor], np.ndarray]) -> np.ndarray:
    """`rows.map` with one number per row, written to `out` directly.

    A list of small results, allocated between large temporary blocks, would keep the allocator from reusing
    the blocks' memory: hundreds of MiB where tens are in use.
    """

    def one(start: int, stop: int, block: torch.Tensor) -> None:
        out[start:stop] = work(start, stop, block)

    rows.map(one)
    return out
