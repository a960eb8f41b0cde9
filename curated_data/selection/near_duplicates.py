"""Find exact and near duplicates, and choose which of them to keep.

Two samples are near-duplicates if the cosine of their embeddings reaches a threshold. Groups are the
connected components of these links, and one sample of each group is kept. The search needs memory for two
blocks of rows, for a pool of any size: rows are divided into the cells of random pivots, and a sample is
compared with its own cell and with those others that a row within the threshold can be in.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import faiss
import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curated_data.errors import PoolError
from curated_data.pool.decode import as_extensions
from curated_data.progress import progress

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore
    from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

CELL_SIZE = 16_384
"""Mean number of samples in a cell, which is searched as a whole."""
N_PROBES = 4
"""The most other cells that a sample is compared with."""
_PIVOT_DISTANCES = 1 << 22  # looked at at once


@dataclass(frozen=True)
class NearDuplicates:
    """Groups of copies among n samples.

    Attributes:
        keep: (n,) bool, False for copies of a kept sample, for copies of held-out samples, and where `valid`
            is False.
        group: (n,) int64, the smallest id of the sample's group, which is its own if it has no copies; -1 if
            not valid.
        pairs: (p, 2) int64, the linked samples, smaller id first, in ascending order.
        similarity: (p,) float32, their cosines.
        held_out_match: (n,) int64, the row of the held-out set that the sample is a copy of, -1 for none.
    """

    keep: np.ndarray
    group: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray
    held_out_match: np.ndarray


def near_duplicates(
    embeddings: "np.ndarray | EmbeddingStore",
    *,
    valid: np.ndarray | None = None,
    threshold: float = 0.95,
    n_neighbours: int = 16,
    same: np.ndarray | None = None,
    prefer: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    n_probes: int = N_PROBES,
    cell_size: int = CELL_SIZE,
    seed: int = 0,
) -> NearDuplicates:
    """Find groups of near-duplicates, and choose one sample of each group to keep.

    For up to `cell_size` samples the search is exact, up to `n_neighbours` links per sample. For more, a link
    across cells is missed only if more than `n_probes` other cells are possible from both of its ends; the
    number of such samples is logged.

    Args:
        embeddings: (n, d) rows of any scale, an array, memory map or store.
        valid: (n,) bool, False for samples to exclude from the comparison.
        threshold: cosine at or above which two samples are copies, in (-1, 1].
        n_neighbours: how many links from each sample into each cell are searched.
        same: (n,) integers, equal for samples that are known to be copies, such as from `exact_groups`; these
            are joined whatever their embeddings.
        prefer: (n,) numbers, such as the sizes of images in pixels; the member with the largest is kept. None
            keeps the member nearest to the group's mean embedding. On ties, the smallest id is kept.
        held_out: (m, d) embeddings of an evaluation set; samples within the threshold of one are not kept.
        n_probes: the most other cells that a sample is compared with.
        cell_size: mean number of samples in a cell.
        seed: for the pivots.

    Raises:
        ValueError: a wrong shape, a number out of range, or a valid row that is not finite.
    """
    n = len(embeddings)
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a cosine, give a number above -1 and up to 1")
    if min(n_neighbours, n_probes + 1, cell_size) < 1:
        raise ValueError(
            f"n_neighbours={n_neighbours}, n_probes={n_probes}, cell_size={cell_size}: must be positive"
        )
    for name, array in (("valid", valid), ("same", same), ("prefer", prefer)):
        if array is not None and np.shape(array) != (n,):
            raise ValueError(f"{name} needs shape ({n},), got {np.shape(array)}")
    valid = np.ones(n, bool) if valid is None else np.asarray(valid, bool)
    ids = np.flatnonzero(valid)

    found = list(_links(embeddings, ids, threshold, n_neighbours, n_probes, cell_size, seed))
    pairs, similarity = _unique_pairs(found)
    group = np.where(valid, _components(n, pairs, same, valid), -1)

    held_out_match = np.full(n, -1, np.int64)
    if held_out is not None:
        held_out_match[ids] = match_held_out(embeddings, held_out, threshold=threshold, ids=ids)
    candidates = valid & (held_out_match < 0)
    if prefer is None:
        prefer = _closeness_to_mean(embeddings, group)
    keep = _best_of_each_group(group, candidates, np.asarray(prefer))
    log.info(
        "near-duplicates: %d pairs, %d groups, %d samples dropped, of them %d found in the held-out set",
        len(pairs),
        len(np.unique(group[(group >= 0) & _in_larger_group(group)])),
        int((valid & ~keep).sum()),
        int((held_out_match >= 0).sum()),
    )
    return NearDuplicates(keep, group, pairs, similarity, held_out_match)


def match_held_out(
    embeddings: "np.ndarray | EmbeddingStore",
    held_out: np.ndarray,
    *,
    threshold: float = 0.95,
    ids: np.ndarray | None = None,
    block: int = 16_384,
) -> np.ndarray:
    """For each sample, the nearest row of a held-out set if their cosine reaches the threshold; otherwise -1.

    Args:
        embeddings: (n, d).
        held_out: (m, d), kept in memory.
        ids: (q,) samples to compare; None for all.

    Returns:
        (q,) int64.
    """
    ids = np.arange(len(embeddings)) if ids is None else ids
    held_out = _unit(np.asarray(held_out), np.arange(len(held_out)))
    match = np.full(len(ids), -1, np.int64)
    if not len(held_out):
        return match
    index = faiss.IndexFlatIP(held_out.shape[1])
    index.add(held_out)
    for first in range(0, len(ids), block):
        similarity, nearest = index.search(_unit(embeddings, ids[first : first + block]), 1)
        match[first : first + block] = np.where(_reaches(similarity, threshold), nearest, -1)[:, 0]
    return match


class Contents(NamedTuple):
    """Digests and sizes of the samples' image files, to find exact duplicates and to choose among copies.

    Attributes:
        digest: (n, 2) uint64, of the file's bytes; zero for samples without an image.
        n_pixels: (n,) int64, width times height from the file's header, 0 if unknown.
    """

    digest: np.ndarray
    n_pixels: np.ndarray


def image_contents(
    pool: "ShardPool", extensions: Sequence[str] | None = None, *, batch_size: int = 1024
) -> Contents:
    """Read every sample's image once, for a digest of its bytes and its size.

    Args:
        pool: of images; of several images of a sample, the first in the order of `extensions` is used.
        extensions: of the members to compare; None for the pool's image extensions.

    Raises:
        PoolError: no sample has such a member.
    """
    present = pool.index().extensions
    given = as_extensions(extensions or (), "extensions")
    extensions = [e for e in given or pool.image_extensions if e in present] or list(given)
    if not extensions:
        raise PoolError(f"the pool has no images, its members are {', '.join(present)}: give extensions=")
    digest = np.zeros((len(pool), 2), np.uint64)
    n_pixels = np.zeros(len(pool), np.int64)
    with progress("hashing images", len(pool), "images") as advance:
        for first in range(0, len(pool), batch_size):
            ids = np.arange(first, min(first + batch_size, len(pool)))
            for i, sample in zip(ids, pool.read(ids, extensions), strict=True):
                data = next((sample[e] for e in extensions if e in sample), None)
                if data is not None:
                    raw = hashlib.blake2b(data, digest_size=16).digest()
                    digest[i] = np.frombuffer(raw, np.uint64)
                    n_pixels[i] = _n_pixels(data)
            advance(len(ids))
    return Contents(digest, n_pixels)


def exact_groups(digest: np.ndarray) -> np.ndarray:
    """(n,) int64: the smallest id with the same digest (n, 2); a sample's own id if its digest is zero."""
    digest = np.ascontiguousarray(digest, np.uint64)
    _, first, inverse = np.unique(
        digest.view([("a", np.uint64), ("b", np.uint64)])[:, 0], return_index=True, return_inverse=True
    )
    return np.where(digest.any(axis=1), first[inverse], np.arange(len(digest)))


def _links(
    embeddings: "np.ndarray | EmbeddingStore",
    ids: np.ndarray,
    threshold: float,
    n_neighbours: int,
    n_probes: int,
    cell_size: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of ids (p, 2) whose cosine reaches the threshold, with their cosines, cell by cell."""
    n_cells = -(-len(ids) // cell_size)
    if n_cells <= 1:
        yield from _search(embeddings, ids, ids, threshold, n_neighbours, cell_size)
        return
    home, probes = _cells(embeddings, ids, threshold, n_cells, n_probes, cell_size, seed)
    by_home = np.argsort(home, kind="stable")
    starts = np.searchsorted(home[by_home], np.arange(n_cells + 1))
    visitors = np.argsort(probes, axis=None, kind="stable")  # flat indices into `probes`, by cell
    visits = np.searchsorted(probes.ravel()[visitors], np.arange(n_cells + 1))
    with progress("near-duplicates", n_cells, "cells") as advance:
        for cell in range(n_cells):
            members = ids[by_home[starts[cell] : starts[cell + 1]]]
            guests = ids[np.sort(visitors[visits[cell] : visits[cell + 1]] // max(probes.shape[1], 1))]
            yield from _search(embeddings, members, members, threshold, n_neighbours, cell_size)
            yield from _search(embeddings, members, guests, threshold, n_neighbours, cell_size)
            advance()


def _cells(
    embeddings: "np.ndarray | EmbeddingStore",
    ids: np.ndarray,
    threshold: float,
    n_cells: int,
    n_probes: int,
    block: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's cell, (m,), and the other cells to search for its copies, (m, n_probes), -1 for none.

    Let q be in cell a. A row within distance r of q, but in another cell c, is nearer to pivot c than to
    pivot a. So q is within r of the plane half-way between the pivots: |q - c|² - |q - a|² <= 2 r |a - c|.
    All other cells are ruled out.
    """
    rng = np.random.default_rng(seed)
    pivots = np.unique(_unit(embeddings, np.sort(rng.choice(ids, n_cells, replace=False))), axis=0)
    apart = np.sqrt(np.maximum(2 - 2 * pivots @ pivots.T, 0))
    reach = np.sqrt(2 - 2 * threshold) + 1e-3  # distance of unit vectors at the threshold, and rounding
    dtype = np.int16 if len(pivots) < 2**15 else np.int32  # the former are sorted in linear time
    home = np.empty(len(ids), dtype)
    probes = np.full((len(ids), min(n_probes, len(pivots))), -1, dtype)
    n_cut = 0
    at_once = max(_PIVOT_DISTANCES // len(pivots), 1)
    for start in range(0, len(ids), block):
        products = 2 * _unit(embeddings, ids[start : start + block]) @ pivots.T
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
    if n_cut:
        log.info(
            "near-duplicates: for %.1f %% of the samples, copies may be in more than n_probes=%d other "
            "cells; only the nearest cells were searched",
            100 * n_cut / len(ids),
            n_probes,
        )
    return home, probes


def _search(
    embeddings: "np.ndarray | EmbeddingStore",
    members: np.ndarray,
    queries: np.ndarray,
    threshold: float,
    n_neighbours: int,
    block: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Links from queries to members of one cell, in blocks of both."""
    for first in range(0, len(members) if len(queries) else 0, block):
        base = members[first : first + block]
        rows = _unit(embeddings, base)
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
        for start in range(0, len(queries), block):
            asked = queries[start : start + block]
            similarity, place = index.search(_unit(embeddings, asked), min(n_neighbours + 1, len(base)))
            linked = _reaches(similarity, threshold) & (base[place] != asked[:, None])
            row, column = np.nonzero(linked)
            yield np.stack([asked[row], base[place[row, column]]], axis=1), similarity[row, column]


def _unique_pairs(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, smaller id first, in ascending order, with the larger of its two cosines."""
    pairs = np.concatenate([np.sort(p, axis=1) for p, _ in found] or [np.empty((0, 2), np.int64)])
    similarity = np.concatenate([s for _, s in found] or [np.empty(0, np.float32)])
    order = np.lexsort((-similarity, pairs[:, 1], pairs[:, 0]))
    pairs, similarity = pairs[order], similarity[order]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new], np.minimum(similarity[new], 1)


def _components(n: int, pairs: np.ndarray, same: np.ndarray | None, valid: np.ndarray) -> np.ndarray:
    """(n,) the smallest id of each sample's connected component."""
    links = [pairs]
    if same is not None:
        held = np.flatnonzero(valid)
        _, first, inverse = np.unique(np.asarray(same)[held], return_index=True, return_inverse=True)
        links.append(np.stack([held, held[first[inverse]]], axis=1))
    row, column = np.concatenate(links).T
    graph = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(n, n))
    n_components, component = connected_components(graph, directed=False)
    smallest = np.empty(n_components, np.int64)
    smallest[component[::-1]] = np.arange(n - 1, -1, -1)  # of several values, the last is kept
    return smallest[component]


def _in_larger_group(group: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the sample has copies."""
    count = np.bincount(group[group >= 0], minlength=len(group))
    return (group >= 0) & (count[group] > 1)


def _closeness_to_mean(
    embeddings: "np.ndarray | EmbeddingStore", group: np.ndarray, most: int = 1024, block: int = 16_384
) -> np.ndarray:
    """(n,) cosine of each sample with the mean of its group; 0 for samples without copies.

    To bound memory, only the first `most` members of a larger group are considered; the others get -inf.
    """
    closeness = np.zeros(len(group), np.float64)
    members = np.flatnonzero(_in_larger_group(group))
    members = members[np.argsort(group[members], kind="stable")]
    bounds = np.flatnonzero(np.diff(group[members], prepend=-2, append=-2))
    place = np.arange(len(members)) - np.repeat(bounds[:-1], np.diff(bounds))
    closeness[members[place >= most]] = -np.inf
    members = members[place < most]
    bounds = np.concatenate([[0], np.cumsum(np.minimum(np.diff(bounds), most))])
    first = 0
    while first + 1 < len(bounds):  # as many whole groups as fit a block
        last = int(np.searchsorted(bounds, bounds[first] + block, side="right")) - 1
        part = members[bounds[first] : bounds[last]]
        rows = _unit(embeddings, part)
        means = np.add.reduceat(rows, bounds[first:last] - bounds[first], axis=0)
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        means = np.repeat(means, np.diff(bounds[first : last + 1]), axis=0)
        closeness[part] = np.einsum("nd,nd->n", rows, means).round(6)  # so that equal rows tie
        first = last
    return closeness


def _best_of_each_group(group: np.ndarray, candidates: np.ndarray, prefer: np.ndarray) -> np.ndarray:
    """(n,) bool: of each group's candidates, the one with the largest `prefer`; on ties the smallest id."""
    keep = candidates & ~_in_larger_group(np.where(candidates, group, -1))  # all but those with a choice
    ids = np.flatnonzero(candidates & ~keep)
    ids = ids[np.lexsort((ids, -prefer[ids].astype(np.float64), group[ids]))]
    keep[ids[np.diff(group[ids], prepend=-1) != 0]] = True
    return keep


def _reaches(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """Whether cosines reach the threshold, up to float32 rounding, so that equal rows reach 1."""
    return similarity >= threshold - 1e-6


def _unit(embeddings: "np.ndarray | EmbeddingStore", ids: np.ndarray) -> np.ndarray:
    """(m, d) float32 rows of norm 1; zero rows stay zero, and are near nothing."""
    rows = embeddings.rows(ids) if hasattr(embeddings, "rows") else embeddings[ids]
    rows = np.ascontiguousarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        bad = ids[np.flatnonzero(~np.isfinite(norms))[0]]
        raise ValueError(f"embedding of sample {bad} is not finite: mark such samples in valid=")
    return rows / np.maximum(norms, np.finfo(np.float32).tiny)


def _n_pixels(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:  # only reads the header
            return image.width * image.height
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return 0
