"""Losses as functions of tensors. Under several processes they see every rank's samples (`distributed.gather`)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.distributed import gather, rank


def nt_xent(a: Tensor, b: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross-entropy, SimCLR's loss (arXiv 2002.05709, equation 1).

    Each of this rank's 2B views is told from the other 2 * world * B - 1 by the cosine to its partner.

    Args:
        a: (B, d) projections of the first views; any scale, they are normalised here.
        b: (B, d) projections of the second views of the same samples.

    Returns:
        The mean over this rank's 2B anchors.
    """
    check_pairs(a, b, temperature)
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    return _contrast(a, b, lambda x, y: x @ y.T / temperature)


def cauchy_contrast(a: Tensor, b: Tensor) -> Tensor:
    """t-SimCNE's loss (arXiv 2210.09879): InfoNCE with the heavy-tailed kernel 1 / (1 + |z_i - z_j|^2).

    -mean log k(i, i') + mean log of the sum of k(i, j) over all j != i, positive included, over this rank's 2B anchors i.

    Args:
        a: (B, d) outputs for the first views, not normalised; d is 2 for a map.
        b: (B, d) outputs for the second views of the same samples.
    """
    check_pairs(a, b)

    def log_kernel(x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] <= 8:  # differences are exact, and as cheap in a few dimensions
            squared = (x[:, None] - y[None]).square().sum(-1)
        else:
            squared = (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp_min(0)
        return -torch.log1p(squared)

    return _contrast(a.float(), b.float(), log_kernel)


def check_pairs(a: Tensor, b: Tensor, temperature: float = 1.0) -> None:
    """Raise a ValueError unless `a` and `b` are (B, d) of one shape, B > 1, and the temperature is positive."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"two views must give embeddings of one shape (B, d), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if len(a) < 2:
        raise ValueError(
            "a contrastive loss needs at least 2 samples a batch, got 1: there is nothing to tell it from"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _contrast(a: Tensor, b: Tensor, similarity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Cross-entropy of telling each view's partner among all views of all ranks but itself."""
    with torch.autocast(
        a.device.type, enabled=False
    ):  # bfloat16 cannot tell the similarities of near samples apart
        return _contrast_in_full_precision(a, b, similarity)


def _contrast_in_full_precision(
    a: Tensor, b: Tensor, similarity: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    n = len(a)
    candidates = torch.cat([gather(a), gather(b)])
    n_global = len(candidates) // 2
    own = torch.arange(n, device=a.device) + rank() * n
    logits = similarity(torch.cat([a, b]), candidates)
    itself = torch.cat([own, own + n_global])
    partner = torch.cat([own + n_global, own])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, partner)
