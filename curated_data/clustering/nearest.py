"""The exact nearest centroid of every row, without storing a rows x centroids matrix."""

import math
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from curated_data.clustering.rows import Rows, blocks, parallel_map, rows_at

_ROWS, _COLUMNS = 1024, 1024  # a tile of scores, 4 MiB: stays in the cache from the product to the search
TILE = 256  # rows whose nearest few centroids are searched at once
_DEVICE_ROWS, _DEVICE_COLUMNS = 32768, 4096  # the same on an accelerator, 512 MiB
PRODUCTS, FUSED = "float32", False  # on an accelerator; `python -m benchmarks.kmeans gpu` compares the others
_precision_lock = threading.Lock()


class Centroids:
    """Centroids prepared for many products: the score of row x and centroid c is |c|^2 - 2 x.c.

    Adding |x|^2 gives the squared distance, which comparisons for one x do not need.

    Args:
        centroids: (k, d) float32.
        small: for some hundred rows and centroids, where oneDNN's conversions take longer than it saves.
        products: the precision of products: "float32", or "tf32", "bf16" or "bf16x3" on an accelerator
            (emulated by rounding elsewhere), with close calls decided in float32, see `_decide`. "bf16x3"
            represents each number as a sum of two in bfloat16, for three times the products and few close
            calls. None takes the default for the device.
        fused: search in the kernel of `curated_data.clustering.fused`, which needs Triton and products in
            reduced precision. None takes the default for the device.
    """

    def __init__(
        self,
        centroids: torch.Tensor,
        small: bool = False,
        products: str | None = None,
        fused: bool | None = None,
    ) -> None:
        self.centroids, self.k = centroids, len(centroids)
        self.on_cpu = centroids.device.type == "cpu"
        self.onednn = self.on_cpu and not small and onednn_is_faster()
        self.products = products or ("float32" if self.on_cpu else PRODUCTS)
        self.fused = self.products != "float32" and (not self.on_cpu and FUSED if fused is None else fused)
        self.norms = centroids.square().sum(1)
        self._make_tiles()
        self.n_rechecked = 0  # rows decided in float32

    def _make_tiles(self) -> None:
        weight = -2.0 * self.centroids
        self.tiles: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.reduced_tiles: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        for start, stop in blocks(self.k, _COLUMNS if self.on_cpu else _DEVICE_COLUMNS):
            w, b = weight[start:stop].contiguous(), self.norms[start:stop].contiguous()
            self.tiles.append((start, w.to_mkldnn(), b.to_mkldnn()) if self.onednn else (start, w.T, b))
            if self.fused:
                continue
            if self.products.startswith("bf16"):
                self.reduced_tiles.append((start, _with_bias(self._factors(w, (0, 1, 0)), b), None))
            elif self.products == "tf32":
                self.reduced_tiles.append((start, w.T, b))
        if self.fused:
            self.fused_weight = _fused().padded(torch.cat(self._factors(weight, (0, 1, 0)), dim=1))
        if self.products != "float32":
            rest = self.centroids - _rounded(self.centroids, self.products)
            self.largest = float(self.norms.max().sqrt())
            self.largest_rest = float(rest.norm(dim=1).max())
            self.largest_low = float(_halves(self.centroids)[1].float().norm(dim=1).max())

    def scores(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """For each tile of centroids, its first index and (m, width) scores, which may be overwritten."""
        if self.onednn:
            rows = rows.to_mkldnn()
        for start, weight, bias in self.tiles:
            if self.onednn:
                yield start, F.linear(rows, weight, bias).to_dense()
            else:
                yield start, torch.addmm(bias, rows, weight)

    def _factors(self, x: torch.Tensor, halves: tuple[int, int, int]) -> list[torch.Tensor]:
        """`x` as it is multiplied; "bf16x3" takes the given halves, for rows and centroids side by side."""
        if self.products == "tf32":
            return [x]
        both = _halves(x)
        return [both[0]] if self.products == "bf16" else [both[half] for half in halves]

    def reduced_scores(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The same, with products in reduced precision, summed in float32."""
        if self.products.startswith("bf16"):
            parts = self._factors(rows, (0, 0, 1))
            n_ones = len(self.reduced_tiles[0][1]) - len(parts) * rows.shape[1]
            ones = parts[0].new_ones(len(rows), n_ones)  # for the columns that `_with_bias` has added
            rows = torch.cat([*parts, ones], dim=1)
        for start, weight, bias in self.reduced_tiles:
            yield start, _product(bias, rows, weight, self.products)

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
            of the second; with products in reduced precision a lower bound on it.
        """
        return self._in_blocks(rows, skip, True)

    def _in_blocks(self, rows: torch.Tensor, skip: np.ndarray | None, second: bool) -> tuple[np.ndarray, ...]:
        size = _ROWS if self.on_cpu else _DEVICE_ROWS * (8 if self.fused else 1)
        on_cpu = self.on_cpu and self.products == "float32"
        search = self._search_on_cpu if on_cpu else self._search_on_device
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
        if self.products == "float32":
            found = _search(self.scores(rows), rows, own, need_second)
        elif self.fused:
            factors = _fused().padded(torch.cat(self._factors(rows, (0, 0, 1)), dim=1))
            rough = _fused().search(factors, self.fused_weight, self.norms, own)
            found = self._decide(rows, own, *rough)
        else:
            found = self._decide(rows, own, *_search(self.reduced_scores(rows), rows, own, True))
        return tuple(part.cpu().numpy() for part in found)  # the host does not wait before this

    def _decide(
        self, rows: torch.Tensor, skip: torch.Tensor | None, index: torch.Tensor, *scores: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The result in float32, from that in reduced precision.

        With x = x' + e and c = c' + f, where x' and c' are rounded, a score is off by 2 (e.c + x'.f). The
        score of the winner is computed again in float32, so its error is known. The error of any other is
        taken to be at most twice that (correlated errors, as in rows that repeat one value, are similar for
        near centroids), plus six standard deviations of 2 (e.c + x'.f) for e and f in random directions,
        |e||c| / sqrt(d) and |x'||f| / sqrt(d), with the largest |c| and |f|. If that leaves the second in
        doubt, the row is compared with all centroids in float32, as exact ties always are.
        """
        best, second = scores[:2]
        exact = self._score(rows, index)
        rest = (rows - _rounded(rows, self.products)).norm(dim=1)
        rounding = rest * self.largest + rows.norm(dim=1) * self.largest_rest
        if self.products == "bf16x3":  # the product of the lower halves is omitted
            rounding += _halves(rows)[1].float().norm(dim=1) * self.largest_low
        lower = second - 2 * (best - exact).abs() - 12 / math.sqrt(rows.shape[1]) * rounding
        doubt = torch.nonzero(~(lower > exact) & (index >= 0))[:, 0]
        self.n_rechecked += len(doubt)
        found = [index, *(torch.where(index >= 0, score, torch.inf) for score in (exact, lower))]
        if skip is not None:
            skipped = scores[2]
            found.append(torch.where(skipped.isnan(), skipped, self._score(rows, skip)))
        if len(doubt):
            again = _search(
                self.scores(rows[doubt]), rows[doubt], None if skip is None else skip[doubt], True
            )
            for whole, part in zip(found, again, strict=True):
                whole[doubt] = part
        return tuple(found)

    def _score(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The score of each row and a centroid, in float32; undefined where `index` is -1."""
        at = index.clamp(min=0)
        return self.norms[at] - 2 * (rows * self.centroids[at]).sum(1)


def _fused() -> ModuleType:
    from curated_data.clustering import fused  # Triton comes with torch on Linux alone

    return fused


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


def _rounded(x: torch.Tensor, products: str) -> torch.Tensor:
    """Float32 values as rounded by the products; TF32 truncates the fraction to ten bits."""
    if products == "bf16":
        return x.bfloat16().float()
    if products == "bf16x3":
        high, low = _halves(x)
        return high.float() + low.float()
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each float32 number as two in bfloat16, whose sum has sixteen of its bits."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


def _with_bias(parts: list[torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
    """Weights in bfloat16 side by side, transposed, with the float32 bias as three columns that add up to it.

    The product alone then writes the tile of scores. The width is padded with zeros to a multiple of eight.
    """
    columns, left = list(parts), bias
    for _ in range(3):
        columns.append(left.bfloat16()[:, None])
        left = left - columns[-1][:, 0].float()
    width = sum(column.shape[1] for column in columns)
    columns.append(parts[0].new_zeros(len(bias), -width % 8))
    return torch.cat(columns, dim=1).T


def _product(
    bias: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, products: str
) -> torch.Tensor:
    """bias + rows @ weight, multiplied in reduced precision and summed in float32."""
    if rows.device.type != "cuda":  # emulated in float32: products of rounded values are exact
        if bias is not None:
            rows, weight = _rounded(rows, products), _rounded(weight.contiguous(), products)
        scores = torch.mm(rows.float(), weight.float())
        return scores if bias is None else scores.add_(bias)
    if bias is None:
        return torch.mm(rows, weight, out_dtype=torch.float32)
    with _precision_lock:  # a setting of the whole process
        torch.set_float32_matmul_precision("high")
        try:
            return torch.addmm(bias, rows, weight)
        finally:
            torch.set_float32_matmul_precision("highest")


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
