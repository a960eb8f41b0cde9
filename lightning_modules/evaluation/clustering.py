"""Agreement of a clustering with classes: accuracy under the best matching, F1, NMI, ARI."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch

from curated_data.parallel import together
from lightning_modules.evaluation.inputs import Array, checked_labels, count_pairs, occurring
from lightning_modules.evaluation.longtail import GROUPS, frequency_groups, mean_known, per_class
from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class ClusteringResult(Result):
    """Agreement with the classes, all but the ARI in 0..1.

    Attributes:
        accuracy: share of samples whose cluster is matched to their class, by the one-to-one matching of
            clusters and classes that maximises it (Hungarian method).
        class_accuracy: mean over classes of that share in the class.
        macro_f1: mean over classes of the F1 score of the matched cluster; 0 for a class that has none.
        nmi: mutual information over the mean of both entropies.
        ari: adjusted Rand index.
        groups: `class_accuracy` of head, medium and tail; empty without train counts.
        matching: class of each matched cluster.
        n_samples, n_clusters, n_classes: of the joined set; clusters and classes that occur.
    """

    accuracy: float
    class_accuracy: float
    macro_f1: float
    nmi: float
    ari: float
    groups: dict[str, float]
    matching: dict[int, int]
    n_samples: int
    n_clusters: int
    n_classes: int

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "accuracy": self.accuracy,
                "class average": self.class_accuracy,
                "macro F1": self.macro_f1,
                "NMI": self.nmi,
                "ARI": self.ari,
                **self.groups,
            }
        ]


def clustering(assignment: Array, labels: Array, *, train_counts: Array | None = None) -> ClusteringResult:
    """Compare clusters with classes; under `torch.distributed` every rank gives its share and gets the whole
    result.

    Args:
        assignment: (n,) cluster of each sample, >= 0, in any numbering.
        labels: (n,) classes, >= 0.
        train_counts: (C,) train samples of each class, for head (30 % of the classes), medium (40 %) and
            tail.

    Raises:
        TypeError: labels or clusters that are not integers.
        ValueError: shapes that do not match, negative values (excluded samples must be left out), or no
            samples.

    Examples:
        >>> from lightning_modules.evaluation import clustering
        >>> result = clustering([2, 2, 2, 0, 0, 1], [0, 0, 0, 1, 1, 1])
        >>> round(result.accuracy, 3), result.matching
        (0.833, {0: 1, 2: 0})
    """
    # Here, because scikit-learn takes seconds to import.
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    with together():
        assignment = checked_labels("assignment", assignment, len(assignment))
        labels = checked_labels("labels", labels, len(assignment))
    numbers, names = occurring(assignment), occurring(labels)
    n_clusters, n_classes = len(numbers), len(names)
    if n_clusters == 0:
        raise ValueError("no samples")
    if train_counts is not None and len(train_counts) <= int(names[-1]):
        raise ValueError(f"train_counts has {len(train_counts)} classes, the labels go up to {names[-1]}")
    places = torch.searchsorted(numbers, assignment), torch.searchsorted(names, labels)
    table = count_pairs(*places, n_clusters, n_classes).numpy()
    pairs = np.nonzero(table)
    joined = [np.repeat(side, table[pairs]) for side in pairs]  # the labels of all ranks' samples, sorted
    clusters, classes = scipy.optimize.linear_sum_assignment(table, maximize=True)
    right = np.zeros(n_classes, np.int64)
    predicted = np.zeros(n_classes, np.int64)
    right[classes], predicted[classes] = table[clusters, classes], table[clusters].sum(1)
    total = table.sum(0)
    accuracy = per_class(right, total)
    f1 = per_class(2 * right, predicted + total)
    groups = {}
    if train_counts is not None:
        group = frequency_groups(train_counts, (0.3, 0.4))[names.numpy()]
        groups = {name: mean_known(accuracy[group == i]) for i, name in enumerate(GROUPS)}
    return ClusteringResult(
        accuracy=float(right.sum() / total.sum()),
        class_accuracy=float(accuracy.mean()),
        macro_f1=float(f1.mean()),
        nmi=float(normalized_mutual_info_score(*joined)),
        ari=float(adjusted_rand_score(*joined)),
        groups=groups,
        matching={int(numbers[c]): int(names[k]) for c, k in zip(clusters, classes)},
        n_samples=int(total.sum()),
        n_clusters=n_clusters,
        n_classes=n_classes,
    )
