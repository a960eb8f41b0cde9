"""Linear classification of frozen features: a grid of heads in one pass, logistic regression, few labels a
class.

The grid is DINOv2's protocol (arXiv 2304.07193, appendix B.3): every learning rate with every kind of
features is a head, and all are trained on the same batches; the head that is best on a held-out part of train
is tested.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curated_data.parallel import together, world_size
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import (
    Array,
    checked_features,
    checked_labels,
    count_pairs,
    first_row,
    held_out_rows,
    n_joined,
    occurring,
)
from lightning_modules.evaluation.logistic import Head, fit_logistic
from lightning_modules.evaluation.longtail import GROUPS, frequency_groups, mean_known, per_class
from lightning_modules.evaluation.result import PER_SAMPLE, Result
from lightning_modules.schedules import cosine

PROTOCOLS = ("sgd", "logistic", "few_shot")
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@dataclass(frozen=True)
class LinearSettings:
    """How heads are trained.

    Attributes:
        protocols: which of "sgd", "logistic" and "few_shot" to run.
        learning_rates: of the grid, for a batch of 256.
        n_iter, batch_size, momentum: of SGD, with a cosine to 0 and no weight decay.
        inverse_penalties: logistic regression's values of C, for the loss C sum(cross-entropy) + |W|² / 2.
        max_iter: of L-BFGS, for each C.
        held_out: share of train on which head and C are chosen; the chosen C is then fitted on all of train.
        shots, n_draws: labelled samples per class, and how often they are drawn.
        few_shot_inverse_penalty: C of the few-shot heads.
        seed: of the held-out part, the batches and the draws.

    Examples:
        >>> from lightning_modules.evaluation import LinearSettings
        >>> settings = LinearSettings(protocols=("sgd", "few_shot"), n_iter=500, shots=(1, 5))
        >>> settings.batch_size
        128
    """

    protocols: tuple[str, ...] = ("sgd",)
    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_iter: int = 12_500
    batch_size: int = 128
    momentum: float = 0.9
    inverse_penalties: tuple[float, ...] = tuple(10 ** np.linspace(-6, 5, 45))
    max_iter: int = 1000
    held_out: float = 0.1
    shots: tuple[int, ...] = (1, 5, 10)
    n_draws: int = 5
    few_shot_inverse_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.protocols) - set(PROTOCOLS)
        if unknown or not self.protocols:
            raise ValueError(f"protocols {sorted(unknown)}: expected some of {PROTOCOLS}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be in 0..1, got {self.held_out}")
        for name in ("learning_rates", "inverse_penalties"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name} must be positive numbers, got {values}")
        if min(self.n_iter, self.batch_size, self.max_iter, self.n_draws, *self.shots) < 1:
            raise ValueError("n_iter, batch_size, max_iter, n_draws and shots must be 1 or more")


@dataclass(frozen=True)
class LinearResult(Result):
    """Test accuracies of the chosen heads.

    Attributes:
        heads: one for each protocol and number of shots: protocol, features, setting, held_out (accuracy),
            accuracy, class_average, and head, medium, tail where train counts say which classes these are;
            few-shot heads have deviations over the draws, too.
        grid: held-out accuracy of every head, by "protocol/features/setting".
        n_train, n_test, n_classes: of the joined sets; classes of train.
        correct: for each head, whether each of this rank's test samples is right (few shots: in what share of
            the draws), float64.
    """

    heads: list[dict[str, Any]]
    grid: dict[str, float]
    n_train: int
    n_test: int
    n_classes: int
    settings: LinearSettings
    correct: list[np.ndarray] = field(repr=False, compare=False, metadata=PER_SAMPLE)

    @property
    def accuracy(self) -> float:
        """The first protocol's test accuracy."""
        return self.heads[0]["accuracy"]

    def rows(self) -> list[dict[str, Any]]:
        return self.heads


def linear(
    train_features: Array | Mapping[str, Array],
    train_labels: Array,
    test_features: Array | Mapping[str, Array],
    test_labels: Array,
    *,
    settings: LinearSettings | None = None,
    train_counts: Array | None = None,
    device: str | torch.device = "cpu",
) -> LinearResult:
    """Train linear classifiers on train features and score the chosen ones on test features.

    Test labels serve for the scores alone. Under `torch.distributed` every rank gives its share of both sets;
    batches are drawn from the joined set, gradients are summed, and all ranks get the same result as one
    process would.

    Args:
        train_features: (n, d), or such arrays by name (class token, average of patches, more blocks), all of
            which the grid tries.
        train_labels: (n,) integers >= 0.
        test_features: (m, d), or arrays by the same names; test_labels: (m,). Test classes that train lacks
            are always wrong; train classes that the test set lacks do not enter its class average.
        settings: defaults are the paper's.
        train_counts: (C,) for accuracies of head, medium and tail classes.
        device: where to train.

    Raises:
        TypeError: labels that are not integers.
        ValueError: shapes that do not match, non-finite features, one class only, too few samples.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import LinearSettings, linear
        >>> settings = LinearSettings(protocols=("logistic",), inverse_penalties=(1.0,))
        >>> result = linear(features[::2], labels[::2], features[1::2], labels[1::2], settings=settings)
        >>> result.heads[0]["accuracy"]
        1.0
    """
    settings = settings or LinearSettings()
    with together():
        train_sets, test_sets = _by_name(train_features), _by_name(test_features)
        if set(train_sets) != set(test_sets):
            raise ValueError(f"train has features {sorted(train_sets)}, test {sorted(test_sets)}")
        train = {name: checked_features(f"train {name}", x, device) for name, x in train_sets.items()}
        test = {name: checked_features(f"test {name}", x, device) for name, x in test_sets.items()}
        y = checked_labels("train", train_labels, len(next(iter(train.values()))), device)
        truth = checked_labels("test", test_labels, len(next(iter(test.values()))), device)
        for name in train:
            if len(train[name]) != len(y) or len(test[name]) != len(truth):
                raise ValueError(f"features {name!r} have another number of samples than the labels")
            if train[name].shape[1] != test[name].shape[1]:
                raise ValueError(
                    f"features {name!r}: {train[name].shape[1]} dimensions in train, {test[name].shape[1]} "
                    "in test"
                )
    n, m = n_joined(y), n_joined(truth)
    if m == 0 or n < 2:
        raise ValueError(f"not enough samples: {n} train, {m} test")
    classes = occurring(y)  # a head has a column for each
    if len(classes) < 2:
        raise ValueError("train has one class only: there is nothing to tell apart")
    y = torch.searchsorted(classes, y)
    held_out = held_out_rows(y, settings.held_out, settings.seed)

    heads, correct = [], []
    grid: dict[str, float] = {}
    for protocol in settings.protocols:
        if protocol == "few_shot":
            rows, hits = _few_shot(train, y, test, truth, n, classes, settings, train_counts)
            heads += rows
            correct += hits
            continue
        fit = _train_grid if protocol == "sgd" else _logistic_path
        candidates = fit(train, y, (~held_out).nonzero().flatten(), len(classes), settings)
        scores: dict[tuple[str, float], float] = {}
        for (name, setting), head in candidates.items():
            right = (head(train[name][held_out]).argmax(1) == y[held_out]).sum()
            scores[name, setting] = int(all_reduce(right)) / n_joined(y[held_out])
        grid |= {f"{protocol}/{name}/{setting:g}": score for (name, setting), score in scores.items()}
        name, setting = max(scores, key=scores.__getitem__)
        head = candidates[name, setting]
        if protocol == "logistic":
            head = fit_logistic(
                train[name], y, len(classes), inverse_penalty=setting, max_iter=settings.max_iter
            )
        row = {"protocol": protocol, "features": name, "setting": setting, "held_out": scores[name, setting]}
        hit = classes[head(test[name]).argmax(1)] == truth
        heads.append(row | _test_scores(hit, truth, train_counts))
        correct.append(hit.double().cpu().numpy())
    return LinearResult(heads, grid, n, m, len(classes), settings, correct)


def _logistic_path(
    train: Mapping[str, Tensor], y: Tensor, rows: Tensor, n_classes: int, settings: LinearSettings
) -> dict[tuple[str, float], Head]:
    """Heads for each kind of features and each C, in rising order of C, each starting at the last."""
    heads: dict[tuple[str, float], Head] = {}
    for name, x in train.items():
        chosen, head = x[rows], None
        for c in sorted(settings.inverse_penalties):
            head = fit_logistic(
                chosen, y[rows], n_classes, inverse_penalty=c, max_iter=settings.max_iter, start=head
            )
            heads[name, float(c)] = head
    return heads


def _train_grid(
    train: Mapping[str, Tensor], y: Tensor, kept: Tensor, n_classes: int, settings: LinearSettings
) -> dict[tuple[str, float], Head]:
    """A head for each kind of features and each learning rate, all in one pass over the batches.

    Heads that share features lie side by side in one matrix: a step is two products and an update of the
    whole.
    """
    rates = torch.tensor(settings.learning_rates, device=y.device) * settings.batch_size / 256
    n_heads, n_own, device = len(rates), len(kept), y.device
    n, first = n_joined(kept), first_row(kept)
    size = min(settings.batch_size, n)
    parameters = {
        name: torch.zeros(x.shape[1] + 1, n_heads * n_classes, device=device) for name, x in train.items()
    }
    velocities = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
    column_rates = rates.repeat_interleave(n_classes)
    next_batch = batches_of(n, size, settings.seed)
    for step in range(settings.n_iter):
        rows = next_batch() - first
        rows = kept[rows[(rows >= 0) & (rows < n_own)].to(device)]
        answer = y[rows].repeat_interleave(n_heads)[:, None]
        factor = cosine(step, total=settings.n_iter, start=1.0, final=0.0)
        for name, x in train.items():
            features = F.pad(x[rows], (0, 1), value=1.0)  # the bias is the last row of the weights
            weight, velocity = parameters[name], velocities[name]
            p = (features @ weight).view(-1, n_classes).softmax(1)
            p.scatter_add_(1, answer, p.new_full((len(p), 1), -1))
            p = p.view(len(rows), n_heads * n_classes)
            if world_size() == 1:  # the product adds itself to the velocity, no gradient is written
                velocity.addmm_(features.T, p, beta=settings.momentum, alpha=1 / size)
            else:
                velocity.mul_(settings.momentum).add_(all_reduce(features.T @ p), alpha=1 / size)
            weight.addcmul_(velocity, column_rates, value=-factor)
    heads = {}
    for name, weight in parameters.items():
        split = weight.view(-1, n_heads, n_classes)
        for i, rate in enumerate(settings.learning_rates):
            heads[name, rate] = Head(split[:-1, i].contiguous(), split[-1, i].contiguous())
    return heads


def _few_shot(
    train: dict[str, Tensor],
    y: Tensor,
    test: dict[str, Tensor],
    truth: Tensor,
    n: int,
    classes: Tensor,
    settings: LinearSettings,
    train_counts: Array | None,
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Logistic regression on n labels per class; a class with fewer gives all that it has.

    Returns:
        A row for each kind of features and number of shots, and as many arrays of hits, means over the draws.
    """
    labels, first = all_gather_rows(y).cpu(), first_row(y)
    rows, correct = [], []
    for name, x in train.items():
        for shots in settings.shots:
            scores, hits = [], []
            for draw in range(settings.n_draws):
                generator = torch.Generator().manual_seed(settings.seed + 1000 * shots + draw)
                chosen = first_of_each(torch.randperm(n, generator=generator), labels, shots).sort().values
                own = (chosen[(chosen >= first) & (chosen < first + len(y))] - first).to(x.device)
                penalty = settings.few_shot_inverse_penalty
                head = fit_logistic(
                    x[own], y[own], len(classes), inverse_penalty=penalty, max_iter=settings.max_iter
                )
                hits.append(classes[head(test[name]).argmax(1)] == truth)
                scores.append(_test_scores(hits[-1], truth, train_counts))
            row: dict[str, Any] = {"protocol": f"{shots}-shot", "features": name}
            row |= {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
            row |= {
                f"{key}_deviation": float(np.std([s[key] for s in scores]))
                for key in ("accuracy", "class_average")
            }
            rows.append(row)
            correct.append(torch.stack(hits).double().mean(0).cpu().numpy())
    return rows, correct


def first_of_each(order: Tensor, labels: Tensor, n: int) -> Tensor:
    """The first n rows of each class in an order of all rows, fewer where a class has no more."""
    by_class = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    start = (sizes.cumsum(0) - sizes)[labels[by_class]]
    return by_class[torch.arange(len(order)) - start < n]


def _test_scores(hit: Tensor, truth: Tensor, train_counts: Array | None) -> dict[str, float]:
    present = occurring(truth)
    pairs = count_pairs(torch.searchsorted(present, truth), hit.long(), len(present), 2).numpy()
    accuracy = per_class(pairs[:, 1], pairs.sum(1))
    scores = {"accuracy": float(pairs[:, 1].sum() / pairs.sum()), "class_average": float(accuracy.mean())}
    if train_counts is not None:
        groups = frequency_groups(train_counts)
        labels = present.cpu().numpy()
        if len(groups) <= labels[-1]:
            raise ValueError(f"train_counts has {len(groups)} classes, test labels go up to {labels[-1]}")
        scores |= {name: mean_known(accuracy[groups[labels] == i]) for i, name in enumerate(GROUPS)}
    return scores


def batches_of(n: int, size: int, seed: int) -> Callable[[], Tensor]:
    """Rows of the next batch: cut from one seeded permutation of 0 .. n - 1 after another."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)

    def next_batch() -> Tensor:
        nonlocal left
        while len(left) < size:
            left = torch.cat([left, torch.randperm(n, generator=generator)])
        batch, left = left[:size], left[size:]
        return batch

    return next_batch


def _by_name(features: Array | Mapping[str, Array]) -> dict[str, Array]:
    if isinstance(features, Mapping):
        if not features:
            raise ValueError("no features")
        return dict(features)
    return {"features": features}
