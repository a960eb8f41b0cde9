"""Retrieval by cosine: of images of the same instance (revisited Oxford and Paris), or of the same label."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.parallel import together, world_size
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import (
    Array,
    checked_bank,
    checked_features,
    checked_k,
    checked_labels,
    first_row,
    gather_with_own,
    longest_share,
    n_joined,
    occurring,
)
from lightning_modules.evaluation.nearest import SCORES, TILE_NUMBERS, RowSource, bank_tiles, scaled_rows
from lightning_modules.evaluation.result import PER_SAMPLE, Result

DIFFICULTIES = {  # which lists are right, and which are passed over
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Means over queries that have something right to find.

    Attributes:
        scores: for labels: {"k": {"map", "recall", "hit_rate"}} by k: mean average precision of the first k
            (the mean of the precisions at what is right among them, as torchmetrics has it, 0 for nothing),
            recall, and the share of queries with something right among them. For instances, by difficulty:
            "map" (the trapezoid rule of the Oxford protocol) and "precision@k".
        n_queries: queries counted in each row.
        n_without: queries that have nothing right to find, left out of each row.
        average_precision: for each row, that of each of this rank's queries, NaN where it is left out.
    """

    scores: dict[str, dict[str, float]]
    n_queries: dict[str, int]
    n_without: dict[str, int]
    average_precision: dict[str, np.ndarray] = field(repr=False, compare=False, metadata=PER_SAMPLE)

    def rows(self) -> list[dict[str, Any]]:
        return [{"": name, **values, "queries": self.n_queries[name]} for name, values in self.scores.items()]


def retrieval(
    query_features: Array,
    gallery_features: Array | RowSource,
    *,
    query_labels: Array | None = None,
    gallery_labels: Array | None = None,
    ground_truth: Sequence[Mapping[str, Sequence[int]]] | None = None,
    k: int | Sequence[int] = (1, 5, 10),
    leave_one_out: bool = False,
    block_size: int = 4096,
    device: str | torch.device = "cpu",
) -> RetrievalResult:
    """Rank the gallery by cosine for each query, and score the ranking.

    By labels, everything of the query's label is right. By `ground_truth`, which lists each query's places in
    the joined gallery as "easy", "hard" and "junk", the protocol is that of revisited Oxford and Paris (arXiv
    1803.11285): junk is passed over. Ties are broken by place in the gallery. Under `torch.distributed` every
    rank gives its shares of queries (with their labels or ground truth) and gallery, and gets the whole
    result; the gallery is never gathered.

    Args:
        query_features: (n, d); gallery_features: (m, d), in memory or on disk: a memory map or a store that
            gives rows by slice is read tile by tile, once for each block of queries.
        query_labels, gallery_labels: (n,) and (m,) integers.
        ground_truth: for each query a mapping with "easy", "hard", "junk", each optional.
        k: cut-offs.
        leave_one_out: queries and gallery are the same set: a query does not find itself. By labels alone.
        block_size: queries of each rank that are compared at once; fewer by `ground_truth` in a large
            gallery, which is ranked as a whole.
        device: where to compare.

    Raises:
        ValueError: neither or both kinds of truth, shapes that do not match, k below 1 or above the gallery,
            no query with anything right to find.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import retrieval
        >>> result = retrieval(
        ...     features, features, query_labels=labels, gallery_labels=labels, leave_one_out=True
        ... )
        >>> result.scores["1"]["map"]
        1.0
    """
    with together():
        queries, _ = scaled_rows(checked_features("queries", query_features, device))
        gallery = checked_bank("gallery", gallery_features)
        n_own = gallery.shape[0]
        if queries.shape[1] != gallery.shape[1]:
            raise ValueError(f"queries have {queries.shape[1]} dimensions, the gallery {gallery.shape[1]}")
        by_label = query_labels is not None and gallery_labels is not None
        if by_label == (ground_truth is not None):
            raise ValueError("give query_labels and gallery_labels, or ground_truth")
        own = theirs = torch.empty(0)
        if query_labels is not None and gallery_labels is not None:
            if leave_one_out and len(queries) != n_own:
                raise ValueError(f"leave_one_out: {len(queries)} queries, but {n_own} in the gallery")
            own = checked_labels("queries", query_labels, len(queries), device)
            theirs = checked_labels("gallery", gallery_labels, n_own, device)
        elif leave_one_out:
            raise ValueError("leave_one_out goes with labels; list the query itself as junk instead")
        elif len(ground_truth or ()) != len(queries):
            raise ValueError(f"{len(queries)} queries, but ground truth for {len(ground_truth or ())}")
    n = int(all_reduce(torch.tensor([n_own], device=queries.device)))
    ks = checked_k(k, n - leave_one_out, "gallery")
    if ground_truth is not None:
        return _by_ground_truth(queries, gallery, n, ground_truth, ks, block_size)
    return _by_label(queries, own, gallery, theirs, ks, leave_one_out, block_size)


def _by_label(
    queries: Tensor,
    own: Tensor,
    gallery: RowSource,
    theirs: Tensor,
    ks: list[int],
    leave_one_out: bool,
    block_size: int,
) -> RetrievalResult:
    labels = occurring(own, theirs)
    own, theirs = (torch.searchsorted(labels, each) for each in (own, theirs))
    n_right = all_reduce(torch.bincount(theirs, minlength=len(labels)))[own] - int(leave_one_out)
    first = first_row(queries)
    ranks = torch.arange(1, ks[-1] + 1, device=queries.device, dtype=torch.float64)
    sums = torch.zeros(len(ks), 3, dtype=torch.float64, device=queries.device)
    each = torch.full((len(ks), len(queries)), torch.nan, dtype=torch.float64, device=queries.device)
    for start in range(0, longest_share(queries), block_size):
        block = slice(start, start + block_size)
        skipped = torch.arange(len(own), device=own.device)[block] + first if leave_one_out else None
        found = _nearest_labels(queries[block], gallery, theirs, ks[-1], skipped)
        counted = n_right[block] > 0
        right = (found == own[block, None])[counted].double()
        possible = n_right[block][counted].double()
        precision = right.cumsum(1) / ranks
        for i, cut in enumerate(ks):
            n_found = right[:, :cut].sum(1)
            average = (precision * right)[:, :cut].sum(1) / n_found.clamp_min(1)
            each[i, start : start + block_size][counted] = average
            sums[i] += torch.stack([average.sum(), (n_found / possible).sum(), (n_found > 0).double().sum()])
    total = int(all_reduce((n_right > 0).sum()))
    if total == 0:
        raise ValueError("no query has anything of its label in the gallery")
    means = (all_reduce(sums) / total).tolist()
    names = [str(cut) for cut in ks]
    without = n_joined(own) - total
    return RetrievalResult(
        scores={name: dict(zip(("map", "recall", "hit_rate"), mean)) for name, mean in zip(names, means)},
        n_queries=dict.fromkeys(names, total),
        n_without=dict.fromkeys(names, without),
        average_precision=dict(zip(names, each.cpu().numpy())),
    )


def _nearest_labels(
    block: Tensor, gallery: RowSource, labels: Tensor, k: int, skipped: Tensor | None
) -> Tensor:
    """Labels (b, k) of the k most similar over all ranks; `skipped`: for each query a place to pass over."""
    (asked, own), first = gather_with_own(block), first_row(labels)
    passed = None if skipped is None else all_gather_rows(skipped) - first
    values, found = asked.new_empty(len(asked), 0), labels.new_empty(len(asked), 0)
    with together():
        for start, tile in _tiles(gallery, asked):
            similarity = asked @ tile.T
            if passed is not None:
                rows = ((passed >= start) & (passed < start + len(tile))).nonzero().flatten()
                similarity[rows, passed[rows] - start] = -torch.inf
            best, places = _stable_top(similarity, min(k, len(tile)))
            values = torch.cat([values, best], dim=1)
            found = torch.cat([found, labels[start + places]], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)  # earlier tiles first
            values, found = values[:, :k], found.gather(1, order[:, :k])
    if world_size() == 1:
        return found
    # Candidates travel as columns, of which each rank may have its own number; rank order keeps ties in place
    # order.
    values = all_gather_rows(values.T.contiguous()).T[own]
    found = all_gather_rows(found.T.contiguous()).T[own]
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return found.gather(1, order)


def _stable_top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order, ties by place."""
    if 4 * k < similarity.shape[1]:
        values, _ = similarity.topk(k, dim=1)
        # topk may cut through a tie: everything as large as the k-th is a candidate, taken by place.
        candidate = similarity >= values[:, -1:]
        if int(candidate.sum(1).max()) == k:
            places = candidate.nonzero()[:, 1].reshape(len(similarity), k)
            values, order = similarity.gather(1, places).sort(dim=1, descending=True, stable=True)
            return values, places.gather(1, order)
    values, places = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places[:, :k]


def _by_ground_truth(
    queries: Tensor,
    gallery: RowSource,
    n_gallery: int,
    ground_truth: Sequence[Mapping[str, Sequence[int]]],
    ks: list[int],
    block_size: int,
) -> RetrievalResult:
    with together():
        places = [
            {name: _places(truth, name, n_gallery) for name in ("easy", "hard", "junk")}
            for truth in ground_truth
        ]
    sums = torch.zeros(len(DIFFICULTIES), 2 + len(ks), dtype=torch.float64)  # queries, AP, precisions
    each = np.full((len(DIFFICULTIES), len(queries)), np.nan)
    block_size = max(1, min(block_size, SCORES // (n_gallery * world_size())))
    for start in range(0, longest_share(queries), block_size):
        similarity = _similarities(queries[start : start + block_size], gallery)
        order = similarity.sort(dim=1, descending=True, stable=True).indices
        for place, ranking in enumerate(order.cpu().numpy(), start):
            lists = places[place]
            for i, (right, junk) in enumerate(DIFFICULTIES.values()):
                positives = np.concatenate([lists[name] for name in right])
                if len(positives) == 0:
                    continue
                passed = np.concatenate([lists[name] for name in junk])
                kept = ranking[~np.isin(ranking, passed)]
                hits = np.flatnonzero(np.isin(kept, positives))
                precisions = [np.mean(hits < cut) * len(hits) / min(cut, hits[-1] + 1) for cut in ks]
                each[i, place] = trapezoid_average_precision(hits)
                sums[i] += torch.tensor([1.0, each[i, place], *precisions], dtype=torch.float64)
    sums = all_reduce(sums.to(queries.device)).cpu()
    n = n_joined(queries)
    counts = sums[:, 0].long().tolist()
    if not any(counts):
        raise ValueError("no query has an easy or hard match")
    means = sums[:, 1:] / sums[:, :1]
    columns = ["map", *(f"precision@{cut}" for cut in ks)]
    return RetrievalResult(
        scores={name: dict(zip(columns, row)) for name, row in zip(DIFFICULTIES, means.tolist())},
        n_queries=dict(zip(DIFFICULTIES, counts)),
        n_without={name: n - count for name, count in zip(DIFFICULTIES, counts)},
        average_precision=dict(zip(DIFFICULTIES, each)),
    )


def _similarities(block: Tensor, gallery: RowSource) -> Tensor:
    """Cosines (b, n) of this rank's queries and the joined gallery, of which no rank sees another's share."""
    asked, own = gather_with_own(block)
    with together():
        parts = [tile @ asked.T for _, tile in _tiles(gallery, asked)]
    joined = all_gather_rows(torch.cat(parts) if parts else asked.new_empty(0, len(asked)))
    return joined[:, own].T


def _tiles(gallery: RowSource, asked: Tensor) -> Iterator[tuple[int, Tensor]]:
    width = max(1, min(TILE_NUMBERS // asked.shape[1], SCORES // max(1, len(asked))))
    return bank_tiles(gallery, width, asked.device, metric="cosine", name="gallery")


def trapezoid_average_precision(hits: np.ndarray) -> float:
    """Average precision of the Oxford protocol: precision before and after each hit, averaged.

    For a hit at 0-based rank r with i hits before it: (i / r + (i + 1) / (r + 1)) / 2, where i / r is 1 at
    rank 0.
    """
    before = np.arange(len(hits))
    previous = np.divide(before, hits, out=np.ones(len(hits)), where=hits > 0)
    return float(np.mean((previous + (before + 1) / (hits + 1)) / 2))


def _places(truth: Mapping[str, Sequence[int]], name: str, n: int) -> np.ndarray:
    places = np.asarray(truth.get(name, ()), np.int64).reshape(-1)
    if len(places) and (places.min() < 0 or places.max() >= n):
        raise ValueError(f"ground truth names place {int(places.max())} of a gallery of {n}")
    return places
