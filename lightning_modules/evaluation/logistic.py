"""Multinomial logistic regression by L-BFGS on features that ranks hold in shares, up to a known gap."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from curated_data.parallel import rank
from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.inputs import n_joined

log = logging.getLogger(__name__)

_BLOCK = 2**25  # scores, or features, of a block: 256 MB
_FLAT, _GAP = 1e-7, 1e-6  # derivative of the mean loss, and share of the objective, at which a search ends
_WARN_GAP = 5e-5  # above which a search that has not converged warns
_COPY = 2**30  # bytes of features up to which they are copied as float64


@dataclass(frozen=True)
class Head:
    """Scores x @ weight + bias of features x (n, d): weight (d, C), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        size = max(1, _BLOCK // x.shape[1])
        return torch.cat([torch.addmm(self.bias, rows.to(dtype), self.weight) for rows in x.split(size)])


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
    size = max(1, _BLOCK // max(n_classes, d))
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
    if x.numel() * 8 <= _COPY:
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
