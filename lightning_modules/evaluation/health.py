"""Health of a representation without labels: effective rank, alignment, uniformity."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curated_data.parallel import rank, together, world_size
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.inputs import Array, checked_features, first_row, n_joined
from lightning_modules.evaluation.nearest import scaled_rows
from lightning_modules.evaluation.result import Result


@dataclass(frozen=True)
class HealthResult(Result):
    """Figures of a set of features.

    Attributes:
        effective_rank: exp of the entropy of the singular values' shares (RankMe, arXiv 2210.02885), 1 .. d.
        alignment: mean squared distance of the unit features of two views of a sample (arXiv 2005.10242), 0
            .. 4, less is better; NaN without second views.
        uniformity: log of the mean of exp(-2 squared distance) over pairs of different samples' unit features
            (same paper), less is better.
        feature_deviation: mean over features of their standard deviation, of unit features times sqrt(d); 0
            where all samples have the same features, 1 for an even spread.
        n_samples, n_features: of the joined set.
    """

    effective_rank: float
    alignment: float
    uniformity: float
    feature_deviation: float
    n_samples: int
    n_features: int

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "effective rank": self.effective_rank,
                "of": self.n_features,
                "alignment": self.alignment,
                "uniformity": self.uniformity,
                "deviation": self.feature_deviation,
            }
        ]


def health(
    features: Array,
    second_view: Array | None = None,
    *,
    max_pairs_samples: int = 20_000,
    block_size: int = 2048,
    device: str | torch.device = "cpu",
) -> HealthResult:
    """Measure features; under `torch.distributed` every rank gives its share and gets the whole result.

    Args:
        features: (n, d), finite.
        second_view: (n, d) features of other views of the same samples.
        max_pairs_samples: uniformity compares all pairs among at most this many samples, taken evenly from
            the set.
        block_size: samples compared at once.
        device: where to work.

    Raises:
        ValueError: fewer than two samples, features that are not finite or all zero, shapes that do not
            match.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import health
        >>> result = health(features)
        >>> 1 < result.effective_rank <= 3
        True
    """
    with together():
        x = checked_features("features", features, device)
        other = None if second_view is None else checked_features("second_view", second_view, device)
        if other is not None and other.shape != x.shape:
            raise ValueError(f"second_view is {tuple(other.shape)}, features are {tuple(x.shape)}")
    n, d = n_joined(x), x.shape[1]
    if n < 2:
        raise ValueError(f"health needs two samples or more, got {n}")
    unit, _ = scaled_rows(x)
    alignment = float("nan")
    if other is not None:
        squared = (unit - scaled_rows(other)[0]).square().sum(dtype=torch.float64)
        alignment = float(all_reduce(squared)) / n
    gram = all_reduce(x.double().T @ x.double())
    if not float(gram.diagonal().sum()) > 0:
        raise ValueError("all features are zero")
    moments = all_reduce(torch.stack([unit.double().sum(0), unit.double().square().sum(0)])) / n
    deviation = (moments[1] - moments[0].square()).clamp_min(0).sqrt().mean() * d**0.5
    return HealthResult(
        effective_rank=_effective_rank(gram),
        alignment=alignment,
        uniformity=_uniformity(_evenly_taken(unit, n, max_pairs_samples), block_size),
        feature_deviation=float(deviation),
        n_samples=n,
        n_features=d,
    )


def _effective_rank(gram: Tensor) -> float:
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum()
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def _evenly_taken(x: Tensor, n: int, limit: int) -> Tensor:
    """Every (n / limit)-th row of the joined set, on every rank; all rows if there are no more."""
    step = -(-n // limit)
    return all_gather_rows(x[-first_row(x) % step :: step].contiguous())


def _uniformity(x: Tensor, block_size: int) -> float:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    blocks = range(0, len(x), block_size)
    for start in blocks[rank() :: world_size()]:
        block = x[start : start + block_size]
        # Unit vectors: the squared distance is 2 - 2 cosine. A sample's own pair, exp(0), is taken off again.
        pairs = torch.exp(4 * (block @ x.T) - 4)
        own = torch.arange(len(block), device=x.device)
        pairs[own, own + start] = 0
        total += pairs.sum(dtype=torch.float64)
    return float(torch.log(all_reduce(total) / (len(x) * (len(x) - 1))))
