"""Linear classification of frozen features: a grid of heads in one pass, logistic regression, few labels a
class.

The grid is DINOv2's protocol (arXiv 2304.07193, appendix B.3): every learning rate with every kind of
features is a head, and all are trained on the same batches; the head that is best on a held-out part of train
is tested.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from curated_data.parallel import rank, together, world_size
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import (
    Array,
    checked_features,
    checked_labels,
    count_pairs,
    first_row,
    n_joined,
    occurring,
)
from lightning_modules.evaluation.longtail import GROUPS, frequency_groups, mean_known, per_class
from lightning_modules.evaluation.result import PER_SAMPLE, Result
from lightning_modules.schedules import cosine

log = logging.getLogger(__name__)

PROTOCOLS = ("sgd", "logistic", "few_shot")
_LOGISTIC_BLOCK = 2**25  # scores, or features, of a block: 256 MB
_FLAT, _GAP = 1e-7, 1e-6  # derivative of the mean loss, and share of the objective, at which a search ends
_WARN_GAP = 5e-5  # of which a search that has not ended is told of
_LOGISTIC_COPY = 2**30  # bytes of features up to which they are copied as float64
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

    Example:
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


@dataclass(frozen=True)
class Head:
    """Scores x @ weight + bias of features x (n, d): weight (d, C), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        size = max(1, _LOGISTIC_BLOCK // x.shape[1])
        return torch.cat([torch.addmm(self.bias, rows.to(dtype), self.weight) for rows in x.split(size)])


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

    Example:
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
    held_out = _held_out_rows(y, n, settings)

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


def fit_logistic(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    *,
    inverse_penalty: float,
    max_iter: int = 1000,
    start: Head | None = None,
) -> Head:
    """Multinomial logistic regression by L-BFGS, scikit-learn's objective: C sum(cross-entropy) + |W|² / 2.

    Works on centred features in the scale of what they do to the objective: offsets and scales of features do
    not slow it down, and the penalty stays that of W. A search ends when its gradient shows that the
    objective is within 1e-6 of the minimum. Where `max_iter` iterations are too few for that, as they can be
    for collinear features with a large C, as many more follow along the features' principal axes. Warns if
    the objective may even then be 5e-5 above the minimum.

    Args:
        x: this rank's share of the features, (n, d) floating point; y: (n,) labels.
        n_classes: columns of the head.
        inverse_penalty: C.
        max_iter: of L-BFGS, in each of the two coordinates.
        start: head to begin at.

    Returns:
        A head of float64: where features are far from 0, an intercept of float32 would blur the scores.
    """
    n, d = n_joined(y), x.shape[1]
    # Scores of a block of samples at a time: those of a million samples for a thousand classes are 10 GB.
    size = max(1, _LOGISTIC_BLOCK // max(n_classes, d))
    weight = 1 / (inverse_penalty * n)  # of |W|² / 2, beside the mean of the loss
    mean, deviation = _moments(x, n, size)
    # Divided by the roots of the objective's second derivatives.
    frame = _Frame(mean, (deviation.square() / 4 + weight).sqrt(), None)
    head, gap = _minimised(x, y, frame, n, n_classes, weight, max_iter, size, start)
    if gap > _GAP:
        variance, axes = torch.linalg.eigh(_covariance(x, mean, n, size))
        frame = _Frame(mean, (variance.clamp(min=0) / 4 + weight).sqrt(), axes)
        head, gap = _minimised(x, y, frame, n, n_classes, weight, max_iter, size, head)
    if gap > _WARN_GAP and rank() == 0:
        log.warning(
            "logistic regression with C=%g has not converged after %d iterations (the objective may be up to "
            "%.2g of itself above its minimum): raise max_iter=%d, or lower C",
            inverse_penalty, 2 * max_iter, gap, max_iter,
        )  # fmt: skip
    return head


@dataclass(frozen=True)
class _Frame:
    """Coordinates (x - mean) @ axes / scale of features; axes (d, d) are orthonormal, None for none."""

    mean: Tensor
    scale: Tensor
    axes: Tensor | None

    def rows(self, x: Tensor) -> Tensor:
        x = x.double() - self.mean
        return (x if self.axes is None else x @ self.axes) / self.scale

    def inside(self, head: Head) -> Tensor:
        """(d + 1, C), the weights and below them the intercepts."""
        w, bias = head.weight.double(), head.bias.double()
        turned = w if self.axes is None else self.axes.T @ w
        return torch.cat([turned * self.scale[:, None], (bias + self.mean @ w)[None]])

    def outside(self, w: Tensor) -> Head:
        weight = w[:-1] / self.scale[:, None]
        weight = weight if self.axes is None else self.axes @ weight
        return Head(weight, w[-1] - self.mean @ weight)


def _minimised(
    x: Tensor,
    y: Tensor,
    frame: _Frame,
    n: int,
    n_classes: int,
    weight: float,
    max_iter: int,
    size: int,
    start: Head | None,
) -> tuple[Head, float]:
    """The best head that L-BFGS finds in a frame, and how far above the minimum its objective may be, as a
    share of itself.
    """
    d = x.shape[1]
    convert: Callable[[Tensor], Tensor] = frame.rows
    if x.numel() * 8 <= _LOGISTIC_COPY:
        x, convert = convert(x), lambda rows: rows  # once; larger sets block by block in every pass
    penalty = torch.cat([weight / frame.scale.square(), frame.scale.new_zeros(1)])[:, None]
    best: tuple[float, float, np.ndarray] = (np.inf, np.inf, np.zeros((d + 1) * n_classes))
    slope = np.inf

    def mean_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, slope
        w = torch.from_numpy(flat).to(x.device).reshape(d + 1, n_classes)
        gradient, loss = torch.zeros_like(w), w.new_zeros(1)
        for rows, answers in zip(x.split(size), y.split(size)):
            rows = convert(rows)
            log_p = torch.addmm(w[d], rows, w[:d]).log_softmax(1)
            loss -= log_p.gather(1, answers[:, None]).sum()
            p = log_p.exp_()
            p.scatter_add_(1, answers[:, None], p.new_full((len(p), 1), -1))
            gradient[:d].addmm_(rows.T, p)
            gradient[d] += p.sum(0)
        # One message: the gradient and, as a last row, the loss.
        total = all_reduce(torch.cat([gradient.flatten(), loss])) / n
        gradient = total[:-1].reshape(d + 1, n_classes) + penalty * w
        value = float(total[-1] + (penalty * w.square()).sum() / 2)
        gap = _gap(gradient, penalty[:d], value)
        slope = float(gradient.abs().max())
        if (gap > _GAP, value) <= (best[1] > _GAP, best[0]):
            best = (value, gap, flat.copy())
        return value, gradient.flatten().cpu().numpy()

    def stop(intermediate_result: object) -> None:
        if slope <= _FLAT and best[1] <= _GAP:
            raise StopIteration

    first = best[2] if start is None else frame.inside(start).flatten().cpu().numpy()
    # Its own tolerances are of slopes and steps, which are small on collinear features or for a large C long
    # before the objective is near its minimum.
    options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "gtol": 0.0, "ftol": 0.0}
    scipy.optimize.minimize(mean_loss, first, jac=True, method="L-BFGS-B", options=options, callback=stop)
    return frame.outside(torch.from_numpy(best[2]).to(x.device).reshape(d + 1, n_classes)), best[1]


def _gap(gradient: Tensor, penalty: Tensor, value: float) -> float:
    """The most that an objective can be above its minimum, as a share of it.

    The penalty is its least curvature: along weights the minimum is at most g² / 2 penalty lower. That of the
    intercepts, which have none, is about the loss where this is small.
    """
    weights = float((gradient[:-1].square() / penalty).sum()) / 2
    intercepts = gradient.shape[1] * float(gradient[-1].square().sum()) / (2 * min(value, 0.25))
    return (weights + intercepts) / value


def _covariance(x: Tensor, mean: Tensor, n: int, size: int) -> Tensor:
    """(d, d) float64 over all ranks' n samples."""
    total = mean.new_zeros(len(mean), len(mean))
    for rows in x.split(size):
        rows = rows.double() - mean
        total.addmm_(rows.T, rows)
    return all_reduce(total) / n


def _moments(x: Tensor, n: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over all ranks' n samples, (d,) float64."""
    total, squares = (x.new_zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    for rows in x.split(size):
        total += rows.double().sum(0)
    mean = all_reduce(total) / n
    for rows in x.split(size):
        squares += (rows.double() - mean).square().sum(0)
    return mean, (all_reduce(squares) / n).sqrt()


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
    scores = {
        "accuracy": float(pairs[:, 1].sum() / pairs.sum()),
        "class_average": float(accuracy.mean()),
    }
    if train_counts is not None:
        groups = frequency_groups(train_counts)
        labels = present.cpu().numpy()
        if len(groups) <= labels[-1]:
            raise ValueError(f"train_counts has {len(groups)} classes, test labels go up to {labels[-1]}")
        scores |= {name: mean_known(accuracy[groups[labels] == i]) for i, name in enumerate(GROUPS)}
    return scores


def _held_out_rows(y: Tensor, n: int, settings: LinearSettings) -> Tensor:
    """Which of this rank's train samples are held out: a seeded draw from the joined set."""
    count = min(max(1, round(settings.held_out * n)), n - 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[:count]] = True
    first = first_row(y)
    return mask[first : first + len(y)].to(y.device)


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
