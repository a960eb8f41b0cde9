"""The most similar rows of a bank, exactly, a tile of it in memory at a time.

The bank may be a memory map or a store on disk, of any float type; it is read once for each call.
"""

from collections.abc import Iterator
from typing import Protocol

import faiss
import torch
import torch.nn.functional as F
from torch import Tensor

from curated_data.parallel import together
from lightning_modules.evaluation.inputs import as_tensor

TILE_NUMBERS = 2**25  # of the bank, 128 MiB; more for a large k:
_TILE_ROWS = 512  # times k, of which finding the best k again in each tile takes a few per cent of the time
SCORES = 2**26  # computed at a time where faiss does not, 256 MiB


class RowSource(Protocol):
    """Features (n, d) that give rows by slice: an array, a tensor, a memory map, an embedding store."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __getitem__(self, rows: slice, /) -> object: ...


def top_rows(
    queries: Tensor, bank: RowSource, k: int, *, metric: str = "cosine", name: str = "bank"
) -> tuple[Tensor, Tensor]:
    """The k rows of this rank's bank most similar to each query.

    A collective call: what fails on one rank fails on all. Of equal similarities any may come
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
    values = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    width = max(_TILE_ROWS * k, TILE_NUMBERS // max(1, queries.shape[1]))
    with together():
        for start, tile in bank_tiles(bank, width, queries.device, metric=metric, name=name):
            found, places = _top(queries, tile, min(k, len(tile)), metric)
            values, rows = torch.cat([values, found], dim=1), torch.cat([rows, start + places], dim=1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            rows = rows.gather(1, order)
    return values, rows


def bank_tiles(
    bank: RowSource, width: int, device: torch.device, *, metric: str, name: str
) -> Iterator[tuple[int, Tensor]]:
    """The rows of a bank, a tile at a time: where it begins, and (t, d) float32, of norm 1 for "cosine".

    Args:
        bank: (n, d).
        width: rows of a tile.
        device: of the tiles.
        metric: "cosine", or "euclidean".
        name: of the bank, for errors.

    Raises:
        ValueError: rows are not finite; raised after the last tile, with their number.
    """
    bad: list[int] = []
    for start in range(0, bank.shape[0], width):
        tile = as_tensor(bank[start : start + width]).to(device, torch.float32)
        tile, wrong = scaled_rows(tile, metric)
        bad += [start + row for row in wrong]
        yield start, tile
    if bad:
        raise ValueError(f"{name}: {len(bad)} rows of features are not finite, the first at {bad[:5]}")


def _top(queries: Tensor, tile: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k rows of a tile most similar to each query, in falling order."""
    if metric == "cosine" and tile.device.type == "cpu":
        kind = faiss.METRIC_INNER_PRODUCT
        found = faiss.knn(queries.contiguous().numpy(), tile.contiguous().numpy(), k, metric=kind)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])
    parts = []
    for some in queries.split(max(1, SCORES // len(tile))):
        if metric == "cosine":
            scores = some @ tile.T
        else:  # differences, not products: what these cancel is what tells near rows apart
            scores = -torch.cdist(some, tile, compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(scores.topk(k, dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def scaled_rows(tile: Tensor, metric: str = "cosine") -> tuple[Tensor, list[int]]:
    """Rows (t, d) float32 of norm 1 for "cosine", else as they are; 0 for those that are not finite, whose
    numbers come second.
    """
    norms = torch.linalg.vector_norm(tile, dim=1, keepdim=True)
    wrong: list[int] = []
    if not bool(torch.isfinite(norms).all()):  # or the square of a finite one is not
        finite = torch.isfinite(tile).all(1, keepdim=True)
        wrong = (~finite).flatten().nonzero().flatten().tolist()
        tile = tile.masked_fill(~finite, 0)
        return (F.normalize(tile.double(), dim=1).float() if metric == "cosine" else tile), wrong
    return (tile / norms.clamp_min(1e-12) if metric == "cosine" else tile), wrong
