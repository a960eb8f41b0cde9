"""Weighted k-nearest-neighbour classification of frozen features: cosine, votes exp(similarity / 0.07)."""

from collections.abc import Sequence
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
    gather_with_own,
    longest_share,
    occurring,
)
from lightning_modules.evaluation.nearest import RowSource, scaled_rows, top_rows
from lightning_modules.evaluation.result import PER_SAMPLE, Result


@dataclass(frozen=True)
class KNNResult(Result):
    """Accuracies in 0..1 for each k.

    Attributes:
        accuracy: share of test samples classified right.
        class_accuracy: mean over the classes of the test set of their accuracies: each class counts alike.
        per_class: for each k, the accuracy of each label of the test set.
        n_train, n_test: samples used.
        correct: for each k, whether each of this rank's test samples is right, bool.
    """

    accuracy: dict[int, float]
    class_accuracy: dict[int, float]
    per_class: dict[int, dict[int, float]]
    n_train: int
    n_test: int
    correct: dict[int, np.ndarray] = field(repr=False, compare=False, metadata=PER_SAMPLE)

    @property
    def best(self) -> float:
        """The highest accuracy over all k."""
        return max(self.accuracy.values())

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"k": k, "accuracy": self.accuracy[k], "class_accuracy": self.class_accuracy[k]}
            for k in self.accuracy
        ]


def knn(
    train_features: Array | RowSource,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    k: int | Sequence[int] = (10, 20, 100, 200),
    temperature: float | None = 0.07,
    metric: str = "cosine",
    block_size: int = 8192,
    device: str | torch.device = "cpu",
) -> KNNResult:
    """Classify test features by the labels of their nearest train features.

    A neighbour at cosine s votes for its class with weight exp(s / temperature) (Wu et al. 2018, arXiv
    1805.01978). Under `torch.distributed` every rank gives its own share of both sets, of any length; the
    bank stays sharded, queries travel, and all ranks get the result of the joined sets.

    Args:
        train_features: (n, d), any float type, in memory or on disk: a memory map or a store that gives rows
            by slice is read tile by tile, never as a whole; train_labels: (n,) integers >= 0.
        test_features: (m, d); test_labels: (m,).
        k: numbers of neighbours.
        temperature: None gives every neighbour one vote.
        metric: "cosine", or "euclidean" (then every neighbour has one vote, `temperature` does not apply).
        block_size: test features of each rank that are compared at once; the bank is read once for each such
            block.
        device: where to compare.

    Raises:
        ValueError: shapes that do not match, non-finite features, negative labels, or k larger than the train
            set.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import knn
        >>> result = knn(features[::2], labels[::2], features[1::2], labels[1::2], k=5)
        >>> result.accuracy
        {5: 1.0}
    """
    with together():
        bank = checked_bank("train", train_features)
        bank_labels = checked_labels("train", train_labels, bank.shape[0], device)
        queries = checked_features("test", test_features, device)
        query_labels = checked_labels("test", test_labels, len(queries), device)
        if bank.shape[1] != queries.shape[1]:
            raise ValueError(
                f"train features have {bank.shape[1]} dimensions, test features {queries.shape[1]}"
            )
    counts = all_reduce(torch.tensor([len(bank_labels), len(queries)], device=device)).tolist()
    if not counts[0] or not counts[1]:
        raise ValueError(f"no samples: {counts[0]} train, {counts[1]} test")
    ks = checked_k(k, counts[0], "train set")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric {metric!r}: expected 'cosine' or 'euclidean'")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive or None, got {temperature}")
    if metric == "cosine":
        queries, _ = scaled_rows(queries)
    else:
        temperature = None

    classes = occurring(bank_labels, query_labels)
    bank_places, query_places = (torch.searchsorted(classes, own) for own in (bank_labels, query_labels))
    hits: dict[int, list[Tensor]] = {n: [] for n in ks}
    right = torch.zeros(len(ks), len(classes), dtype=torch.int64, device=device)
    for start in range(0, longest_share(queries), block_size):
        block = queries[start : start + block_size]
        similarity, voters = _nearest(block, bank, bank_places, ks[-1], metric)
        # Less the nearest's, whose weight is then 1, so that weights neither overflow nor all vanish: votes
        # are compared within a sample alone.
        weights = torch.ones_like(similarity)
        if temperature is not None:
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
        truth = query_places[start : start + block_size]
        for i, n in enumerate(ks):
            hit = _voted(voters[:, :n], weights[:, :n], len(classes)) == truth
            hits[n].append(hit)
            right[i] += torch.bincount(truth[hit], minlength=len(classes))
    right = all_reduce(right).cpu()
    total = all_reduce(torch.bincount(query_places, minlength=len(classes))).cpu()
    present = total.nonzero().flatten()
    shares = right[:, present].double() / total[present]
    names = classes.cpu()[present].tolist()
    return KNNResult(
        accuracy={n: int(right[i].sum()) / counts[1] for i, n in enumerate(ks)},
        class_accuracy={n: float(shares[i].mean()) for i, n in enumerate(ks)},
        per_class={n: dict(zip(names, shares[i].tolist())) for i, n in enumerate(ks)},
        n_train=counts[0],
        n_test=counts[1],
        correct={n: torch.cat(found).cpu().numpy() for n, found in hits.items()},
    )


def _voted(labels: Tensor, weights: Tensor, n_classes: int, size: int = 1024) -> Tensor:
    """The class with the largest sum of weights in each row of labels (m, k): (m,)."""
    chosen = [labels.new_empty(0)]
    for voters, w in zip(labels.split(size), weights.split(size)):
        chosen.append(w.new_zeros(len(w), n_classes).scatter_add_(1, voters, w).argmax(1))
    return torch.cat(chosen)


def _nearest(
    block: Tensor, bank: RowSource, bank_labels: Tensor, k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Similarities and labels (b, k) of this rank's block's nearest in all ranks' banks, nearest first."""
    asked, own = gather_with_own(block)
    values, rows = top_rows(asked, bank, k, metric=metric, name="train")
    labels = bank_labels[rows]
    if world_size() == 1:
        return values, labels
    # Shards may hold fewer than k rows, so candidates travel as columns, of which each rank may have its own
    # number.
    values = all_gather_rows(values.T.contiguous()).T[own]
    labels = all_gather_rows(labels.T.contiguous()).T[own]
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], labels.gather(1, order[:, :k])
