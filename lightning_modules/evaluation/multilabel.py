"""Linear classification of images that show several classes: one logistic regression per class, mean average
precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.parallel import together
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import Array, as_tensor, checked_features, held_out_rows, n_joined
from lightning_modules.evaluation.logistic import fit_logistic
from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class MultilabelResult(Result):
    """Average precisions in 0..1.

    Attributes:
        mean_average_precision: mean over the classes that have a positive in train and test.
        average_precision: of each class, NaN for those without.
        inverse_penalty: C chosen for each class.
    """

    mean_average_precision: float
    average_precision: list[float]
    inverse_penalty: list[float]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"mAP": self.mean_average_precision, "classes": int(np.isfinite(self.average_precision).sum())}
        ]


def multilabel(
    train_features: Array,
    train_marks: Array,
    test_features: Array,
    test_marks: Array,
    *,
    inverse_penalties: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    held_out: float = 0.2,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> MultilabelResult:
    """Fit one logistic regression for each class and rank the test images by it.

    C is chosen for each class by average precision on a held-out part of train, then fitted on all of it.
    Under `torch.distributed` every rank gives its share and gets the whole result.

    Args:
        train_features: (n, d); train_marks: (n, C) integers: 1 shows the class, 0 does not, -1 counts
            nowhere (VOC's "difficult"). test_features: (m, d); test_marks: (m, C).
        inverse_penalties: values of C.
        held_out: share of train for its choice.
        seed: of the held-out part.
        device: where to train.

    Raises:
        ValueError: shapes that do not match, other marks, fewer than two train samples, or no class with a
            positive in both sets.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import multilabel
        >>> marks = np.eye(3, dtype=int)[labels]  # 1 shows the class, 0 does not, -1 counts nowhere
        >>> result = multilabel(features[::2], marks[::2], features[1::2], marks[1::2])
        >>> result.mean_average_precision
        1.0
    """
    with together():
        x, tested = (checked_features(name, f, device)
                     for name, f in (("train", train_features), ("test", test_features)))  # fmt: skip
        y = _checked_marks("train", train_marks, len(x), device)
        truth = _checked_marks("test", test_marks, len(tested), device)
        if x.shape[1] != tested.shape[1] or y.shape[1] != truth.shape[1]:
            raise ValueError("train and test have different numbers of dimensions or of classes")
    if not 0 < held_out < 1 or not inverse_penalties:
        raise ValueError(f"bad settings: {held_out=}, {inverse_penalties=}")
    if (n := n_joined(y)) < 2:
        raise ValueError(f"train needs two samples or more, one of them to choose C on; got {n}")
    out = held_out_rows(y, held_out, seed)
    precisions, chosen = [], []
    for c in range(y.shape[1]):
        positives = all_reduce(torch.stack([(marks[:, c] == 1).sum() for marks in (y, truth)]))
        negatives = all_reduce(torch.stack([(y[:, c] == 0).sum()]))
        if int(positives.min()) == 0 or int(negatives) == 0:
            precisions.append(float("nan"))
            chosen.append(float("nan"))
            continue
        scores = {
            penalty: _precision(x[~out], y[~out, c], x[out], y[out, c], penalty)
            for penalty in sorted(inverse_penalties)
        }
        best = max(scores, key=lambda penalty: np.nan_to_num(scores[penalty], nan=-1.0))
        precisions.append(_precision(x, y[:, c], tested, truth[:, c], best))
        chosen.append(float(best))
    if not np.isfinite(precisions).any():
        raise ValueError("no class has a positive in train and in test")
    return MultilabelResult(float(np.nanmean(precisions)), precisions, chosen)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """The mean over positives of the precision at their rank; equal scores share one rank. NaN without
    one.
    """
    if not bool(positive.any()):
        return float("nan")
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    last[:-1] = scores[1:] != scores[:-1]
    places = last.nonzero().flatten()
    recall = hits[places] / hits[-1]
    gained = torch.diff(recall, prepend=recall.new_zeros(1))
    return float((gained * hits[places] / (places + 1)).sum())


def _precision(x: Tensor, y: Tensor, tested: Tensor, truth: Tensor, penalty: float) -> float:
    known, asked = y >= 0, truth >= 0
    if n_joined(y[known]) == 0:  # the part that is not held out may have no mark of a class
        return float("nan")
    head = fit_logistic(x[known], y[known], 2, inverse_penalty=penalty)
    scores = head(tested[asked])
    return average_precision(
        all_gather_rows((scores[:, 1] - scores[:, 0]).contiguous()), all_gather_rows(truth[asked] == 1)
    )


def _checked_marks(name: str, given: Array, n: int, device: str | torch.device) -> Tensor:
    given = as_tensor(given)
    marks = given.to(device, torch.int64)
    if given.is_floating_point() and not bool((given.to(device) == marks).all()):
        raise ValueError(f"{name}: marks must be 1, 0 or -1, and some are not whole numbers")
    if marks.ndim != 2 or len(marks) != n:
        raise ValueError(f"{name}: expected marks ({n}, C), got {tuple(marks.shape)}")
    if marks.numel() and (int(marks.min()) < -1 or int(marks.max()) > 1):
        raise ValueError(f"{name}: marks must be 1, 0 or -1, got {int(marks.min())}..{int(marks.max())}")
    return marks
