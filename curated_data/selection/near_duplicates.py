"""Find exact and near duplicates, and choose which of them to keep.

Two samples are near-duplicates if the cosine of their embeddings reaches a threshold. Each sample that is not
kept has a kept one within the threshold, which is named, and no two kept ones are within it, as far as the
search can know. Groups are therefore stars around a kept sample, not chains: being near is not handed on.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from curated_data.errors import PoolError
from curated_data.pool.decode import as_extensions
from curated_data.progress import progress
from curated_data.selection.cover import Cover, independent_set
from curated_data.selection.links import N_PROBES, LinkSearch, Near, cosines, reaches, stored_rows

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore
    from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

THRESHOLD = 0.98
"""The default cosine, chosen by measurement (`benchmarks/history/sampling.md`)."""
_BLOCK = 16_384
_NO_DIRECTION = np.uint64(0)


@dataclass(frozen=True)
class NearDuplicates:
    """Which of n samples are copies, and of what.

    Attributes:
        keep: (n,) bool, False for copies of a kept sample, for copies of held-out samples, and where `valid`
            is False.
        near: (n,) int64, for copies of a kept sample that sample; -1 for all others.
        cosine: (n,) float32, of a copy with what it is a copy of, in `near` or held out; NaN for all others.
        held_out_match: (n,) int64, the row of the held-out set that the sample is a copy of, -1 for none.
        pairs: (p, 2) int64, the linked samples that were found on the way, smaller id first, in ascending
            order; of samples with equal rows only one is searched.
        similarity: (p,) float32, their cosines.
    """

    keep: np.ndarray
    near: np.ndarray
    cosine: np.ndarray
    held_out_match: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray

    @property
    def group(self) -> np.ndarray:
        """(n,) int64: the kept sample of each sample's group, which is itself if it is kept; -1 for none."""
        return np.where(self.keep, np.arange(len(self.keep)), self.near)


def near_duplicates(
    embeddings: "np.ndarray | EmbeddingStore",
    *,
    valid: np.ndarray | None = None,
    threshold: float = THRESHOLD,
    n_neighbours: int = 16,
    same: np.ndarray | None = None,
    prefer: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    stay: np.ndarray | None = None,
    n_probes: int = N_PROBES,
    cell_size: int | None = None,
    seed: int = 0,
) -> NearDuplicates:
    """Find near-duplicates, and choose which samples to keep: a cover of all by kept ones, found greedily.

    Cosines are of the stored rows, in float64; one that is 1e-12 below the threshold still reaches it. Rows
    whose bytes are equal are searched as one. Zero rows have no direction: they are near nothing and kept.

    For up to 16,384 different rows the search is exact. For more, rows are compared within the cells of
    random pivots, and a link across cells is missed if more than `n_probes` other cells are possible from
    both of its ends; the number of such samples is logged. What would be kept is searched again, with other
    pivots each time, until no link is found among it.

    Args:
        embeddings: (n, d) rows of any scale, an array, memory map or store.
        valid: (n,) bool, False for samples to exclude from the comparison.
        threshold: cosine at or above which two samples are copies, in (-1, 1].
        n_neighbours: how many links from each sample into each cell a search finds at once. With more, fewer
            searches are needed.
        same: (n,) integers, equal for samples that are known to be copies, such as from `exact_groups`, at
            whatever cosine; one of them is kept, or none if all are copies of another.
        prefer: (n,) numbers, such as the sizes of images in pixels; of two linked samples that with the
            larger is kept. None keeps that with more copies. On ties, the smallest id is kept.
        held_out: (m, d) embeddings of an evaluation set; samples within the threshold of one are not kept.
        stay: (n,) bool, samples that are kept whatever they are copies of, also of each other.
        n_probes: the most other cells that a sample is compared with.
        cell_size: mean number of samples in a cell; None derives it.
        seed: for the pivots.

    Raises:
        ValueError: a wrong shape, a number out of range, or a valid row that is not finite.
    """
    n = len(embeddings)
    if not -1 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a cosine, give a number above -1 and up to 1")
    if min(n_neighbours, n_probes + 1, 1 if cell_size is None else cell_size) < 1:
        raise ValueError(
            f"n_neighbours={n_neighbours}, n_probes={n_probes}, cell_size={cell_size}: must be positive"
        )
    for name, array in (("valid", valid), ("same", same), ("prefer", prefer), ("stay", stay)):
        if array is not None and np.shape(array) != (n,):
            raise ValueError(f"{name} needs shape ({n},), got {np.shape(array)}")
    valid = np.ones(n, bool) if valid is None else np.asarray(valid, bool)
    keep = np.zeros(n, bool) if stay is None else np.asarray(stay, bool) & valid
    prefer = None if prefer is None else np.asarray(prefer)
    code = _codes(embeddings, np.flatnonzero(valid))
    near = np.full(n, -1, np.int64)
    match = np.full(n, -1, np.int64)
    if held_out is not None:
        ids = np.flatnonzero(valid)
        match[ids] = match_held_out(embeddings, held_out, threshold=threshold, ids=ids)

    search = LinkSearch(embeddings, threshold, n_neighbours, n_probes, cell_size, seed)
    undecided = np.flatnonzero(valid & ~keep & (match < 0))
    while len(undecided):
        near[undecided] = -1
        if same is not None:
            near[undecided] = _others_first(np.asarray(same), np.flatnonzero(keep), undecided, prefer)
        _decide(search, undecided[near[undecided] < 0], keep, near, code, prefer)
        # The copy of one that was left out needs to be near what that one is near, or is decided again.
        lost = undecided[~keep[undecided]]
        lost = lost[~keep[near[lost]]]
        near[lost] = near[near[lost]]
        undecided = lost[~reaches(_cosines(embeddings, lost, embeddings, near[lost]), threshold)]

    cosine = np.full(n, np.nan, np.float32)
    out = np.flatnonzero(near >= 0)
    cosine[out] = _cosines(embeddings, out, embeddings, near[out])
    out = np.flatnonzero(match >= 0)
    if held_out is not None:
        cosine[out] = _cosines(embeddings, out, held_out, match[out])
    pairs, similarity = search.found()
    log.info(
        "near-duplicates: %d samples dropped, of them %d found in the held-out set; %d searches",
        int((valid & ~keep).sum()),
        int(((match >= 0) & ~keep).sum()),
        search.n_searches,
    )
    return NearDuplicates(keep, near, cosine, match, pairs, similarity)


def match_held_out(
    embeddings: "np.ndarray | EmbeddingStore",
    held_out: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    ids: np.ndarray | None = None,
    block: int = _BLOCK,
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
    match = np.full(len(ids), -1, np.int64)
    held_out = np.asarray(held_out)
    given = np.flatnonzero(held_out.any(axis=1))
    if not len(given):
        return match
    among = Near(held_out[given], threshold)
    for first in range(0, len(ids), block):
        rows = stored_rows(embeddings, ids[first : first + block])
        _check_finite(rows, ids[first : first + block])
        directed = np.flatnonzero(rows.any(axis=1))
        row, place, cosine, _ = among.search(rows[directed], 1)
        order = np.lexsort((place, -cosine, row))
        best = order[np.diff(row[order], prepend=-1) != 0]
        match[first + directed[row[best]]] = given[place[best]]
    return match


def similar_pairs(
    embeddings: "np.ndarray | EmbeddingStore",
    *,
    valid: np.ndarray | None = None,
    threshold: float = THRESHOLD,
    n_neighbours: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (p, 2) of samples, smaller id first, and their cosines (p,), from one search.

    Of samples with equal rows, each is in a pair with the first, and only the first is in pairs with others.
    """
    ids = np.arange(len(embeddings)) if valid is None else np.flatnonzero(valid)
    code = _codes(embeddings, ids)
    ids = ids[code[ids] != _NO_DIRECTION]
    first = _others_first(code, ids[:0], ids, None)
    equal = first >= 0
    equal[equal] = _are_equal(embeddings, ids[equal], first[equal])
    different = ids[~equal]
    pairs, cosine, _ = LinkSearch(embeddings, threshold, n_neighbours)(different, different)
    of_equal = np.stack([first[equal], ids[equal]], axis=1)
    return np.concatenate([of_equal, pairs]), np.concatenate([np.ones(len(of_equal), np.float32), cosine])


def would_leave_out(n: int, pairs: np.ndarray) -> int:
    """How many of n samples a cover leaves out, if pairs (p, 2) are all there are."""
    connections = np.bincount(pairs.ravel(), minlength=n)
    rank = np.empty(n, np.int64)
    rank[np.lexsort((np.arange(n), -connections))] = np.arange(n)
    return n - int(independent_set(pairs, rank).sum())


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


def _decide(
    search: LinkSearch,
    ids: np.ndarray,
    keep: np.ndarray,
    near: np.ndarray,
    code: np.ndarray,
    prefer: np.ndarray | None,
) -> None:
    """Fill in `keep` and `near` for samples, beside those that are kept already."""
    keep[ids[code[ids] == _NO_DIRECTION]] = True
    stay, ids = np.flatnonzero(keep & (code != _NO_DIRECTION)), ids[code[ids] != _NO_DIRECTION]
    first = _others_first(code, stay, ids, prefer)
    equal = first >= 0
    equal[equal] = _are_equal(search.embeddings, ids[equal], first[equal])
    near[ids] = np.where(equal, first, -1)
    size = np.bincount(first[equal], minlength=len(keep)) + 1
    cover = Cover(search, size, prefer)
    keep[cover.decide(ids[~equal], stay)] = True
    linked = np.flatnonzero(cover.near >= 0)
    near[linked] = cover.near[linked]
    lost = ids[equal][~keep[first[equal]]]  # equal to one that was left out
    near[lost] = near[near[lost]]


def _others_first(
    label: np.ndarray, stay: np.ndarray, ids: np.ndarray, prefer: np.ndarray | None
) -> np.ndarray:
    """(m,) for each id the sample of the same label that comes before all others, -1 if it does itself.

    Those that stay come first, then those with the larger `prefer`, then the smaller id.
    """
    both = np.concatenate([stay, ids])
    given = np.arange(len(both)) >= len(stay)
    keys = [both, given, label[both]]
    if prefer is not None:
        keys.insert(1, -prefer[both].astype(np.float64))
    order = np.lexsort(keys)
    starts = np.flatnonzero(np.diff(np.unique(label[both], return_inverse=True)[1][order], prepend=-1))
    first = np.empty(len(both), np.int64)
    first[order] = np.repeat(both[order][starts], np.diff(starts, append=len(both)))
    return np.where(first == both, -1, first)[given]


def _codes(embeddings: "np.ndarray | EmbeddingStore", ids: np.ndarray, block: int = 2_048) -> np.ndarray:
    """(n,) uint64: a number that equal rows share, and few others do; `_NO_DIRECTION` for zero rows."""
    code = np.zeros(len(embeddings), np.uint64)
    weights = np.random.default_rng(0).integers(2**63, size=embeddings.shape[1], dtype=np.uint64) * 2 + 1
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        rows = stored_rows(embeddings, part)
        _check_finite(rows, part)
        words = np.ascontiguousarray(rows + rows.dtype.type(0))  # as -0 is 0
        words = words.view(f"u{words.dtype.itemsize}").astype(np.uint64)
        code[part] = np.where(rows.any(axis=1), (words * weights).sum(axis=1) | np.uint64(1), _NO_DIRECTION)
    return code


def _are_equal(
    embeddings: "np.ndarray | EmbeddingStore", a: np.ndarray, b: np.ndarray, block: int = _BLOCK
) -> np.ndarray:
    """(m,) bool: whether the rows of ids in a and b are equal."""
    out = np.empty(len(a), bool)
    for start in range(0, len(a), block):
        part = np.s_[start : start + block]
        out[part] = (stored_rows(embeddings, a[part]) == stored_rows(embeddings, b[part])).all(axis=1)
    return out


def _cosines(
    a: "np.ndarray | EmbeddingStore",
    ids_a: np.ndarray,
    b: "np.ndarray | EmbeddingStore",
    ids_b: np.ndarray,
    block: int = _BLOCK,
) -> np.ndarray:
    """(m,) cosines in float64 of rows by their ids."""
    out = np.empty(len(ids_a))
    for start in range(0, len(out), block):
        rows_a, rows_b = (stored_rows(x, ids[start : start + block]) for x, ids in ((a, ids_a), (b, ids_b)))
        place = np.arange(len(rows_a))
        out[start : start + block] = cosines(rows_a, place, rows_b, place)
    return out.clip(-1, 1)


def _check_finite(rows: np.ndarray, ids: np.ndarray) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"embedding of sample {ids[finite.argmin()]} is not finite: mark such samples in valid="
        )


def _n_pixels(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:  # only reads the header
            return image.width * image.height
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return 0
