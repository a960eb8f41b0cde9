"""Accuracy by how often a class was seen in training: head, medium and tail."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from curated_data.parallel import together
from lightning_modules.evaluation.inputs import Array, as_tensor, checked_labels, count_pairs, joined_max
from lightning_modules.evaluation.result import Result

GROUPS = ("head", "medium", "tail")
THIRDS = (1 / 3, 1 / 3)


@dataclass(frozen=True)
class LongTailResult(Result):
    """Accuracies in 0..1.

    Attributes:
        accuracy: share of the samples that are right.
        class_accuracy: mean over the classes of the test set.
        groups: the same mean over the classes of each group; NaN where a group has no class in the test set.
        n_classes: classes of the test set in each group.
    """

    accuracy: float
    class_accuracy: float
    groups: dict[str, float]
    n_classes: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        return [{"accuracy": self.accuracy, "class average": self.class_accuracy, **self.groups}]


def longtail(
    predictions: Array, labels: Array, train_counts: Array, *, shares: tuple[float, float] = THIRDS
) -> LongTailResult:
    """Accuracy on a test set by the train frequency of its classes.

    Args:
        predictions: (n,) predicted classes.
        labels: (n,) classes.
        train_counts: (C,) train samples of each class.
        shares: of the classes, most frequent first, that are head and medium; the rest is tail.

    Raises:
        ValueError: shapes that do not match, labels without a train count, or no samples.

    Examples:
        >>> from lightning_modules.evaluation import longtail
        >>> result = longtail([0, 0, 1, 2], [0, 0, 1, 1], train_counts=[900, 90, 9])
        >>> result.accuracy, result.class_accuracy
        (0.75, 0.75)
    """
    with together():
        predictions = checked_labels("predictions", predictions, len(predictions))
        labels = checked_labels("labels", labels, len(predictions))
    counts = np.asarray(train_counts)
    n_labels = joined_max(labels) + 1
    if n_labels == 0:
        raise ValueError("no samples")
    if len(counts) < n_labels:
        raise ValueError(f"train_counts has {len(counts)} classes, but the labels go up to {n_labels - 1}")
    pairs = count_pairs(labels, (predictions == labels).long(), len(counts), 2).numpy()
    accuracy = per_class(pairs[:, 1], pairs.sum(1))
    groups = frequency_groups(counts, shares)
    return LongTailResult(
        accuracy=float(pairs[:, 1].sum() / pairs.sum()),
        class_accuracy=float(np.nanmean(accuracy)),
        groups={name: mean_known(accuracy[groups == i]) for i, name in enumerate(GROUPS)},
        n_classes={name: int(np.isfinite(accuracy[groups == i]).sum()) for i, name in enumerate(GROUPS)},
    )


def frequency_groups(train_counts: Array, shares: tuple[float, float] = THIRDS) -> np.ndarray:
    """For each class 0 (head), 1 (medium) or 2 (tail), by rank of its train count; ties keep their order."""
    counts = np.asarray(as_tensor(train_counts))
    if counts.ndim != 1 or len(counts) == 0 or counts.min() < 0:
        raise ValueError("train_counts must be (C,), not negative")
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"shares must be of 0..1 and add up to 1 at most, got {shares}")
    bounds = np.round(np.cumsum(shares) * len(counts)).astype(int)
    groups = np.empty(len(counts), np.int64)
    groups[np.argsort(-counts, kind="stable")] = np.searchsorted(bounds, np.arange(len(counts)), side="right")
    return groups


def per_class(right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """right / total, NaN for classes without samples."""
    return np.divide(right, total, out=np.full(len(total), np.nan), where=total > 0)


def mean_known(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
