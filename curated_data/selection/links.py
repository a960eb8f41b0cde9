"""Search for pairs of rows whose cosine reaches a threshold.

The search needs memory for two blocks of rows, for a pool of any size: rows are divided into the cells of
random pivots, and a row is compared with its own cell and with those others that a row within the threshold
can be in. Products of float32 find the pairs, and float64 decides wherever their rounding could matter.
"""

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import faiss
import numpy as np

from curated_data.progress import progress

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore

log = logging.getLogger(__name__)

ONE_CELL = 16_384
"""Up to so many rows are compared with each other, all with all."""
N_PROBES = 4
"""The most other cells that a row is compared with."""
ROUNDING = 1e-12
"""What a cosine in float64 may lack to the threshold, so that equal directions reach 1."""
_BLOCK = 16_384
_LEAST_IN_CELL = 2_048
_MOST_CELLS = 8_192  # whose distances from each other are kept in memory
_PIVOT_DISTANCES = 1 << 22  # looked at at once
_NONE = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


class Links(NamedTuple):
    """Pairs of rows within a threshold.

    Attributes:
        pairs: (p, 2) int64, ids, the smaller first, in ascending order, each pair once.
        cosine: (p,) float32.
        complete: whether all there are were found.
    """

    pairs: np.ndarray
    cosine: np.ndarray
    complete: bool


class LinkSearch:
    """Searches the rows of one pool, with other pivots each time.

    Args:
        embeddings: (n, d) rows of any scale.
        threshold: cosine from which two rows are linked.
        n_neighbours: the most links from a row into each cell that one search finds.
        n_probes: the most other cells that a row is compared with.
        cell_size: mean number of rows in a cell; None derives it, see `mean_cell_size`.
        seed: for the pivots.
    """

    def __init__(
        self,
        embeddings: "np.ndarray | EmbeddingStore",
        threshold: float,
        n_neighbours: int,
        n_probes: int = N_PROBES,
        cell_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.embeddings = embeddings
        self.threshold = threshold
        self.n_neighbours = n_neighbours
        self.n_probes = n_probes
        self.cell_size = cell_size
        self.seed = seed
        self._found: list[Links] = []

    def __call__(self, asking: np.ndarray, among: np.ndarray, n_neighbours: int | None = None) -> Links:
        """The links from rows to others, or of rows with each other.

        Args:
            asking: (q,) ids, none twice.
            among: (m,) ids, the same as `asking` or others.
            n_neighbours: in place of the usual number.
        """
        k = n_neighbours or self.n_neighbours
        n_cells = -(-len(among) // (self.cell_size or mean_cell_size(len(among))))
        if among is not asking and len(asking) <= n_cells:
            n_cells = 1  # to find the cells would take longer than to compare all
        parts = [(among, asking)] if n_cells <= 1 else self._parts(asking, among, n_cells)
        found, is_full = [], n_cells > 1
        for members, here in parts:
            for pairs, cosine, has_more in self._compare(members, here, k):
                found.append((pairs, cosine))
                is_full |= has_more
        self._found.append(Links(*_unique_pairs(found), not is_full))
        return self._found[-1]

    @property
    def n_searches(self) -> int:
        """How often it was called."""
        return len(self._found)

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of all calls with their cosines, each once."""
        return _unique_pairs([(links.pairs, links.cosine) for links in self._found])

    def _parts(
        self, asking: np.ndarray, among: np.ndarray, n_cells: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The members of each cell, and the rows that are compared with them."""
        pivots = choose_pivots(self.embeddings, among, n_cells, self.seed + self.n_searches)
        home, probes = cells(self.embeddings, asking, pivots, self.threshold, self.n_probes)
        visits = np.concatenate([home[:, None], probes], axis=1)
        lives = home if among is asking else cells(self.embeddings, among, pivots, self.threshold, 0)[0]
        residents, first_resident = _by_cell(lives, len(pivots))
        visitors, first_visitor = _by_cell(visits.ravel(), len(pivots))
        with progress("near-duplicates", len(pivots), "cells") as advance:
            for cell in range(len(pivots)):
                members = residents[first_resident[cell] : first_resident[cell + 1]]
                guests = visitors[first_visitor[cell] : first_visitor[cell + 1]] // visits.shape[1]
                yield among[members], asking[np.sort(guests)]
                advance()

    def _compare(
        self, members: np.ndarray, asking: np.ndarray, n_neighbours: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Links from rows that ask to the members of a cell, and whether one may have more, in blocks."""
        for first in range(0, len(members) if len(asking) else 0, _BLOCK):
            base = members[first : first + _BLOCK]
            near = Near(stored_rows(self.embeddings, base), self.threshold)
            for start in range(0, len(asking), _BLOCK):
                asked = asking[start : start + _BLOCK]
                rows = stored_rows(self.embeddings, asked)
                row, place, cosine, has_more = near.search(rows, n_neighbours, asked, base)
                yield np.stack([asked[row], base[place]], axis=1), cosine, has_more


class Near:
    """Finds those of some rows, (b, d), whose cosine with another row reaches a threshold."""

    def __init__(self, rows: np.ndarray, threshold: float) -> None:
        self.rows, self.threshold = rows, threshold
        self.index = faiss.IndexFlatIP(rows.shape[1])
        self.index.add(unit(rows))
        self.slack = (rows.shape[1] + 8) * 2.0**-23  # more than float32 can be wrong by

    def search(
        self,
        asked: np.ndarray,
        n: int,
        asked_ids: np.ndarray | None = None,
        ids: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """The nearest rows that reach the threshold, up to n for each row asked, and one if any does.

        Args:
            asked: (q, d).
            asked_ids, ids: (q,) and (b,), if a row asked may be one of those searched: it is not near itself.

        Returns:
            (p,) places in `asked`, (p,) places in the rows, (p,) float32 cosines, and whether a row asked may
            have more.
        """
        left, units, k = np.arange(len(asked)), unit(asked), n + (ids is not None)
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        is_full = False
        while len(left):
            k = min(k, len(self.rows))
            similarity, place = self.index.search(units[left], k)
            close = similarity >= self.threshold - self.slack
            full = close.all(axis=1) & (k < len(self.rows))
            if ids is not None and asked_ids is not None:
                close &= ids[place] != asked_ids[left][:, None]
            row, column = np.nonzero(close)
            cosine, where = similarity[row, column], place[row, column]
            unsure = np.flatnonzero(cosine < self.threshold + self.slack)
            exact = cosines(asked, left[row[unsure]], self.rows, where[unsure])
            reached = np.ones(len(row), bool)
            reached[unsure] = reaches(exact, self.threshold)
            cosine[unsure] = exact
            found.append((left[row[reached]], where[reached], np.clip(cosine[reached], -1, 1)))
            has_one = np.bincount(row[reached], minlength=len(left)) > 0
            is_full |= bool((full & has_one).any())
            left = left[full & ~has_one]  # the list held only what comes close to the threshold
            k *= 4
        row, place, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else _NONE
        return row, place, cosine, is_full


def reaches(cosine: np.ndarray, threshold: float) -> np.ndarray:
    """Whether cosines in float64 reach the threshold."""
    return cosine >= threshold - ROUNDING


def cosines(a: np.ndarray, rows_a: np.ndarray, b: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
    """(p,) cosines in float64 of the rows of a at `rows_a` with those of b at `rows_b`."""
    out = np.empty(len(rows_a))
    block = max(_PIVOT_DISTANCES // a.shape[1], 1)
    for first in range(0, len(out), block):
        part = np.s_[first : first + block]
        left, right = unit(a[rows_a[part]], np.float64), unit(b[rows_b[part]], np.float64)
        out[part] = np.einsum("nd,nd->n", left, right)
    return out


def stored_rows(embeddings: "np.ndarray | EmbeddingStore", ids: np.ndarray) -> np.ndarray:
    """(m, d) rows by their ids."""
    return np.asarray(embeddings.rows(ids) if hasattr(embeddings, "rows") else embeddings[ids])


def unit(rows: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    """(m, d) rows of norm 1, whatever their scale; zero rows stay zero."""
    peak = np.abs(rows).max(axis=1, initial=0, keepdims=True)
    work = np.float64 if rows.dtype == np.float64 else dtype  # where float32 would overflow
    out = np.divide(rows, np.where(peak > 0, peak, 1), dtype=work)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    out /= np.where(norms > 0, norms, 1)
    return np.ascontiguousarray(out, dtype)


def mean_cell_size(n: int) -> int:
    """Rows in a cell for the least work: a row is compared with all pivots and with all of a few cells."""
    if n <= ONE_CELL:
        return ONE_CELL
    return min(max(_LEAST_IN_CELL, math.isqrt(n // (1 + N_PROBES)), -(-n // _MOST_CELLS)), ONE_CELL)


def choose_pivots(
    embeddings: "np.ndarray | EmbeddingStore", ids: np.ndarray, n_cells: int, seed: int
) -> np.ndarray:
    """(<= n_cells, d) rows of norm 1, of different directions."""
    drawn = np.random.default_rng(seed).choice(ids, n_cells, replace=False)
    return np.unique(unit(stored_rows(embeddings, np.sort(drawn))), axis=0)


def cells(
    embeddings: "np.ndarray | EmbeddingStore",
    ids: np.ndarray,
    pivots: np.ndarray,
    threshold: float,
    n_probes: int,
    block: int = _BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's cell, (m,), and the other cells to search for its copies, (m, n_probes), -1 for none.

    Let q be in cell a. A row within distance r of q, but in another cell c, is nearer to pivot c than to
    pivot a. So q is within r of the plane half-way between the pivots: |q - c|² - |q - a|² <= 2 r |a - c|.
    All other cells are ruled out.
    """
    apart = np.sqrt(np.maximum(2 - 2 * pivots @ pivots.T, 0))
    reach = np.sqrt(2 - 2 * threshold) + 1e-3  # distance of unit vectors at the threshold, and rounding
    dtype = np.int16 if len(pivots) < 2**15 else np.int32  # the former are sorted in linear time
    home = np.empty(len(ids), dtype)
    probes = np.full((len(ids), min(n_probes, len(pivots))), -1, dtype)
    n_cut = 0
    at_once = max(_PIVOT_DISTANCES // len(pivots), 1)
    for start in range(0, len(ids), block):
        products = 2 * unit(stored_rows(embeddings, ids[start : start + block])) @ pivots.T
        for first in range(start, start + len(products), at_once):
            margin = 2 - products[first - start : first - start + at_once]
            part, row = np.s_[first : first + len(margin)], np.arange(len(margin))
            home[part] = own = margin.argmin(axis=1)
            margin -= margin[row, own][:, None]
            margin[margin > 2 * reach * apart[own]] = np.inf
            margin[row, own] = np.inf
            n_cut += int((np.isfinite(margin).sum(axis=1) > probes.shape[1]).sum())
            for place in range(probes.shape[1]):  # a sort of all pivots would take most of the time
                nearest = margin.argmin(axis=1)
                probes[part, place] = np.where(np.isfinite(margin[row, nearest]), nearest, -1)
                margin[row, nearest] = np.inf
    if n_cut and n_probes:
        log.info(
            "near-duplicates: for %.1f %% of the samples, copies may be in more than n_probes=%d other "
            "cells; only the nearest cells were searched",
            100 * n_cut / len(ids),
            n_probes,
        )
    return home, probes


def _by_cell(cell: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in `cell`, one cell's after the other's, and where each cell's begin; -1 is in none."""
    order = np.argsort(cell, kind="stable")
    return order, np.searchsorted(cell[order], np.arange(n_cells + 1))


def _unique_pairs(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, smaller id first, in ascending order, with the larger of its two cosines."""
    pairs = np.concatenate([np.sort(p, axis=1) for p, _ in found] or [np.empty((0, 2), np.int64)])
    cosine = np.concatenate([c for _, c in found] or [np.empty(0, np.float32)])
    order = np.lexsort((-cosine, pairs[:, 1], pairs[:, 0]))
    pairs, cosine = pairs[order], cosine[order]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new], cosine[new]
