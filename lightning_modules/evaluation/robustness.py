"""A head trained once on a base set, tested on shifted sets that hold some of its classes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.parallel import together
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import (
    Array,
    as_tensor,
    checked_features,
    checked_labels,
    held_out_rows,
    n_joined,
    occurring,
)
from lightning_modules.evaluation.logistic import fit_logistic
from lightning_modules.evaluation.result import PER_SAMPLE, Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShiftedSet:
    """A test set of another look.

    Attributes:
        features: (n, d).
        labels: (n,) its own labels; or (n, m) several right answers per sample, -1 where there are fewer
            (ImageNet-ReaL). Samples without a right answer are left out.
        classes: for each of its own labels the base classes that it stands for, one or several (ObjectNet);
            None: its labels are base classes (others cannot be predicted, and are warned of). Predictions are
            limited to the base classes named here, as ImageNet-A, -R and ObjectNet are scored.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.evaluation import ShiftedSet
        >>> sketches = ShiftedSet(np.zeros((2, 3)), labels=np.array([0, 1]), classes=[[4], [7, 9]])
    """

    features: Array
    labels: Array
    classes: Sequence[int | Sequence[int]] | None = None


@dataclass(frozen=True)
class RobustnessResult(Result):
    """Accuracies in 0..1 for each set.

    Attributes:
        sets: accuracy, class_average (over the set's own labels; NaN with several right answers), n,
            n_left_out (samples without a right answer), and n_classes (base classes among which the head
            chose). "base" is the base set's held-out part.
        inverse_penalty: C of the head.
        correct: for each set 1.0 or 0.0 for each of this rank's samples, NaN where it has no right answer.
    """

    sets: dict[str, dict[str, float]]
    inverse_penalty: float
    correct: dict[str, np.ndarray] = field(repr=False, compare=False, metadata=PER_SAMPLE)

    def rows(self) -> list[dict[str, Any]]:
        return [{"set": name, **values} for name, values in self.sets.items()]


def robustness(
    train_features: Array,
    train_labels: Array,
    shifted: Mapping[str, ShiftedSet],
    *,
    inverse_penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0),
    held_out: float = 0.1,
    top: int = 1,
    max_iter: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> RobustnessResult:
    """Train one logistic regression on the base set and test it on every shifted set.

    C is chosen on a held-out part of the base set; shifted labels serve for scores alone. Under
    `torch.distributed` every rank gives its shares and gets the whole result.

    Args:
        train_features: (n, d) of the base set; train_labels: (n,).
        shifted: the sets by name.
        inverse_penalties: values of C to choose from.
        held_out: share of the base set for that choice, and for the "base" row.
        top: a sample is right if a right class is among this many highest scores (5 for DollarStreet).
        max_iter: of L-BFGS.
        seed: of the held-out part.
        device: where to train.

    Raises:
        TypeError: labels that are not integers.
        ValueError: no sets, shapes that do not match, labels outside a class map, class maps outside the base
            classes.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import ShiftedSet, robustness
        >>> noisy = ShiftedSet(features + 0.1 * rng.normal(size=(60, 3)), labels)
        >>> result = robustness(features, labels, {"noisy": noisy}, inverse_penalties=(1.0,))
        >>> sorted(result.sets)
        ['base', 'noisy']
    """
    with together():
        x = checked_features("train", train_features, device)
        y = checked_labels("train", train_labels, len(x), device)
    if not shifted:
        raise ValueError("no shifted sets")
    if "base" in shifted:
        raise ValueError('a shifted set cannot be named "base": results have the base set under that name')
    if not 0 < held_out < 1 or not inverse_penalties or top < 1:
        raise ValueError(f"bad settings: {held_out=}, {inverse_penalties=}, {top=}")
    n, classes = n_joined(y), occurring(y)
    if n < 2 or len(classes) < 2:
        raise ValueError("the base set has one class only, or no samples")
    with together():
        prepared = {
            name: _prepared(name, data, x.shape[1], classes, device) for name, data in shifted.items()
        }

    out = held_out_rows(y, held_out, seed)
    places = torch.searchsorted(classes, y)  # of the labels, among the columns of a head
    fitted, answers = x[~out], places[~out]
    scores, head = [], None
    heads = []
    for c in sorted(inverse_penalties):
        head = fit_logistic(fitted, answers, len(classes), inverse_penalty=c, max_iter=max_iter, start=head)
        heads.append(head)
        scores.append(int(all_reduce((head(x[out]).argmax(1) == places[out]).sum())))
    best = int(np.argmax(scores))
    head = heads[best]
    every = torch.ones_like(classes, dtype=torch.bool)
    results, correct = {}, {}
    for name, (features, right, own, allowed) in {
        "base": (x[out], y[out, None], y[out], every),
        **prepared,
    }.items():
        results[name], correct[name] = _scores(head(features), classes, right, own, allowed, top)
    return RobustnessResult(results, float(sorted(inverse_penalties)[best]), correct)


def _prepared(
    name: str, data: ShiftedSet, dimension: int, classes: Tensor, device: str | torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Features, right base classes (n, m), -1 for none, own labels, and which of `classes` to choose from."""
    features = checked_features(name, data.features, device)
    if features.shape[1] != dimension:
        raise ValueError(f"{name}: features have {features.shape[1]} dimensions, the base set's {dimension}")
    labels = as_tensor(data.labels).to(device)
    if labels.is_floating_point():
        raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
    if labels.ndim not in (1, 2) or len(labels) != len(features):
        raise ValueError(
            f"{name}: expected {len(features)} labels, (n,) or (n, m), got {tuple(labels.shape)}"
        )
    labels = labels.long()
    own = labels if labels.ndim == 1 else None
    right = labels[:, None] if labels.ndim == 1 else labels
    allowed = torch.ones_like(classes, dtype=torch.bool)
    if data.classes is not None:
        groups = [[c] if isinstance(c, int | np.integer) else list(c) for c in data.classes]
        flat = [int(c) for group in groups for c in group]
        if not flat or min(flat) < 0 or max(flat) > int(classes[-1]):
            raise ValueError(f"{name}: its class map names base classes outside 0..{int(classes[-1])}")
        if len(right) and int(right.max()) >= len(groups):
            raise ValueError(f"{name}: label {int(right.max())} is not in its map of {len(groups)} classes")
        width = max(map(len, groups))
        table = torch.full((len(groups) + 1, width), -1)
        for i, group in enumerate(groups):
            table[i, : len(group)] = torch.tensor(group)
        table = table.to(device)
        right = table[right.clamp_min(-1)].flatten(1)  # -1 takes the last row, which is empty
        allowed = torch.isin(classes, torch.tensor(flat, device=device))
    elif unknown := int(((right >= 0).any(1) & ~torch.isin(right, classes).any(1)).sum()):
        log.warning(
            "%s: %d of %d samples have labels that no base class has (the %d base classes lie in %d..%d), "
            "which no prediction can meet; give `classes` if the labels are numbered differently",
            name, unknown, len(right), len(classes), int(classes[0]), int(classes[-1]),
        )  # fmt: skip
    return features, right, own, allowed


def _scores(
    logits: Tensor, classes: Tensor, right: Tensor, own: Tensor | None, allowed: Tensor, top: int
) -> tuple[dict[str, float], np.ndarray]:
    """The figures of a set over all ranks, and which of this rank's samples are right."""
    best = logits.masked_fill(~allowed, -torch.inf).topk(min(top, int(allowed.sum())), dim=1).indices
    known = (right >= 0).any(1)
    hits = (right[:, :, None] == classes[best][:, None, :]).flatten(1).any(1)
    hit = hits[known].long()
    total = n_joined(hit)
    class_average = float("nan")
    if own is not None and total:
        _, labels = all_gather_rows(own[known]).unique(return_inverse=True)
        count = torch.bincount(labels)
        shares = torch.bincount(labels, weights=all_gather_rows(hit).double()) / count
        class_average = float(shares.mean())
    figures = {
        "accuracy": int(all_reduce(hit.sum())) / total if total else float("nan"),
        "class_average": class_average,
        "n": total,
        "n_left_out": n_joined(known) - total,
        "n_classes": int(allowed.sum()),
    }
    return figures, torch.where(known, hits.double(), torch.nan).cpu().numpy()
