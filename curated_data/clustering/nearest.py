"""The nearest centroid of every row, exactly, without ever holding a rows x centroids matrix."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from curated_data.clustering.rows import Rows, blocks, parallel_map

_ROWS, _COLUMNS = (
    1024,
    1024,
)  # one tile of scores, 4 MiB: stays in the cache between the product and the search
TILE = 256  # rows whose nearest few are sought at once
_DEVICE_ROWS, _DEVICE_COLUMNS = 32768, 4096  # the same on an accelerator, 512 MiB


class Centroids:
    """Centroids made ready for many products: the score of row x and centroid c is |c|^2 - 2 x.c.

    Adding |x|^2 makes it the squared distance; comparisons for one x do not need that.
    """

    def __init__(self, centroids: torch.Tensor, padded: bool = False) -> None:
        self.k, self.padded = len(centroids), padded
        self.on_cpu = centroids.device.type == "cpu"
        self.onednn = self.on_cpu and onednn_is_faster()
        weight, bias = -2.0 * centroids, centroids.square().sum(1)
        size = _COLUMNS if self.on_cpu else _DEVICE_COLUMNS
        self.tiles = []
        for start, stop in blocks(self.k, size):
            w, b = weight[start:stop].contiguous(), bias[start:stop].contiguous()
            self.tiles.append((start, w.to_mkldnn(), b.to_mkldnn()) if self.onednn else (start, w.T, b))

    def scores(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """For tile after tile of centroids the first one's index, and (m, width) scores to be overwritten."""
        m = len(rows)
        if self.onednn:
            if self.padded:
                rows = F.pad(rows, (0, 0, 0, -m % 128))
            rows = rows.to_mkldnn()
        for start, weight, bias in self.tiles:
            if self.onednn:
                yield start, F.linear(rows, weight, bias).to_dense()[:m]
            else:
                yield start, torch.addmm(bias, rows, weight)

    def two_nearest(self, rows: torch.Tensor, skip: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """The nearest centroid of each row, its score, and the score of the second nearest (inf where k = 1).

        Args:
            rows: (m, d).
            skip: (m,) int64, a centroid to leave out for each row, -1 for none; its score comes as fourth
                result (nan where none).

        Returns:
            (m,) int64 index (the lowest on ties; -1 where none is left), (m,) float32 score, (m,) float32
            second.
        """
        size = _ROWS if self.on_cpu else _DEVICE_ROWS
        parts = [
            self._two_nearest(rows[a:b], None if skip is None else skip[a:b])
            for a, b in blocks(len(rows), size)
        ]
        if not parts:
            return (
                np.empty(0, np.int64),
                *(np.empty(0, np.float32) for _ in range(2 if skip is None else 3)),
            )
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _two_nearest(self, rows: torch.Tensor, skip: np.ndarray | None) -> tuple[np.ndarray, ...]:
        m = len(rows)
        index, best, second = np.full(m, -1), np.full(m, np.inf, np.float32), np.full(m, np.inf, np.float32)
        skipped = np.full(m, np.nan, np.float32)
        every = np.arange(m)
        for start, tile in self.scores(rows):
            if skip is not None:
                own = np.flatnonzero((skip >= start) & (skip < start + tile.shape[1]))
                column = skip[own] - start
                skipped[own] = tile[own, column].cpu().numpy()
                tile[own, column] = torch.inf
            if self.on_cpu:  # numpy's search is tenfold faster than torch's
                scores = tile.numpy()
                at = scores.argmin(1)
                low = scores[every, at]
                scores[every, at] = np.inf
                next_low = scores.min(1)
            else:
                low_, at_ = tile.min(1)
                tile.scatter_(1, at_[:, None], torch.inf)
                low, at, next_low = low_.cpu().numpy(), at_.cpu().numpy(), tile.amin(1).cpu().numpy()
            better = low < best
            second = np.minimum(np.where(better, best, low), np.minimum(second, next_low))
            index = np.where(better, at + start, index)
            best = np.where(better, low, best)
        index = index.astype(np.int64)
        return (index, best, second) if skip is None else (index, best, second, skipped)


def onednn_is_faster() -> bool:
    """Whether products go through oneDNN: MKL, torch's default, keeps to AVX2 on processors not Intel's.

    215 against 97 GFLOP/s a core on an AMD EPYC with AVX-512. By rule, not by trial: a run must repeat
    itself.
    """
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def nearest(rows: Rows, centroids: torch.Tensor) -> np.ndarray:
    """The index of each row's nearest centroid, (n,) int64; the lowest of equal ones."""
    ready = Centroids(centroids)
    parts = rows.map(lambda start, stop, block: ready.two_nearest(block)[0])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def nearest_columns(rows: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` centroids nearest to each row, (m, count) int64, in no order."""
    norms = centroids.square().sum(1)

    def one(start: int, stop: int) -> torch.Tensor:
        scores = torch.addmm(norms, rows[start:stop], centroids.T, alpha=-2)
        return scores.topk(count, largest=False, sorted=False).indices

    parts = parallel_map(one, list(blocks(len(rows), TILE)))
    return torch.cat(parts) if parts else torch.empty(0, count, dtype=torch.int64)


def squared_distances(rows: Rows, centroids: torch.Tensor, assignment: np.ndarray) -> np.ndarray:
    """|x - c|^2 of each row and its assigned centroid, (n,) float64, by subtraction: no cancellation."""

    def one(start: int, stop: int, block: torch.Tensor) -> np.ndarray:
        own = centroids[torch.from_numpy(assignment[start:stop]).to(centroids.device)]
        return (block - own).double().square().sum(1).cpu().numpy()

    parts = rows.map(one)
    return np.concatenate(parts) if parts else np.empty(0)
