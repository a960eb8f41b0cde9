"""Losses as functions of tensors. On several processes they see every rank's samples."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from curated_data.parallel import rank
from lightning_modules.distributed import all_reduce, gather


def nt_xent(a: Tensor, b: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross-entropy, SimCLR's loss (arXiv 2002.05709, equation 1).

    Each of this rank's 2B views has to find its partner among the other 2 * world * B - 1, by cosine.

    Args:
        a: (B, d) projections of the first views; any scale, they are normalised here.
        b: (B, d) projections of the second views of the same samples.

    Returns:
        The mean over this rank's 2B anchors.
    """
    check_pairs(a, b, temperature)
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    return _contrast(a, b, lambda x, y: x @ y.T / temperature)


def cauchy_contrast(a: Tensor, b: Tensor, *, all_ranks: bool = True) -> Tensor:
    """t-SimCNE's loss (arXiv 2210.09879): InfoNCE with the heavy-tailed kernel 1 / (1 + |z_i - z_j|^2).

    -mean log k(i, i') + mean log of the sum of k(i, j) over all j != i, positive included, over this rank's
    2B anchors i.

    Args:
        a: (B, d) outputs for the first views, not normalised; d is 2 for a map.
        b: (B, d) outputs for the second views of the same samples.
        all_ranks: compare with every rank's samples; False where this process works alone.
    """
    check_pairs(a, b)

    def log_kernel(x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] <= 8:  # differences are exact, and as cheap in a few dimensions
            squared = (x[:, None] - y[None]).square().sum(-1)
        else:  # around a common centre: products of large numbers would cancel
            centre = y.detach().mean(0)
            x, y = x - centre, y - centre
            squared = (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp_min(0)
        return -torch.log1p(squared)

    return _contrast(a.float(), b.float(), log_kernel, all_ranks)


def dino(student: Tensor, targets: Tensor, *, n_global: int = 2, temperature: float = 0.1) -> Tensor:
    """DINO's cross-entropy of each view with the targets of every other global view (arXiv 2104.14294).

    Args:
        student: (V, B, K) logits of V views, the `n_global` global ones first.
        targets: (n_global, B, K) the teacher's probabilities for the global views, without gradient.

    Returns:
        The mean over samples and over the pairs (target view, other view).
    """
    log_probabilities = F.log_softmax(student.float() / temperature, dim=-1)
    # The sum over all pairs, less the pairs of a view with itself.
    every = (targets.sum(0) * log_probabilities.sum(0)).sum()
    itself = (targets * log_probabilities[:n_global]).sum()
    n_pairs = n_global * len(student) - n_global
    return -(every - itself) / (n_pairs * student.shape[1])


def ibot(student: Tensor, targets: Tensor, weights: Tensor, *, temperature: float = 0.1) -> Tensor:
    """iBOT's cross-entropy on M masked patches (arXiv 2111.07832): logits and targets (M, K), weights (M,).

    With weights 1 / (B * masked patches of the sample) it is the mean over B images of their means.
    """
    cross_entropy = -(targets * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)
    return (cross_entropy * weights).sum()


def koleo(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """KoLeo (arXiv 1806.03198): -mean log of the distance to the nearest other sample of all ranks.

    Args:
        features: (B, d); normalised here.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=eps)
        everyone = gather(x)
        own = torch.arange(len(x), device=x.device) + rank() * len(x)
        with torch.no_grad():
            similarity = (x @ everyone.T).scatter_(1, own[:, None], -2.0)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(x, everyone[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, *, n_iterations: int = 3) -> Tensor:
    """Teacher probabilities, uniform in the mean over all ranks: Sinkhorn-Knopp (SwAV, arXiv 2006.09882).

    Args:
        logits: (N, K) of this rank; ranks may have different N, even 0.
    """
    q = logits.float() / temperature
    largest = q.max() if q.numel() else q.new_tensor(float("-inf"))
    q = torch.exp(q - all_reduce(largest, "max"))
    n = all_reduce(q.new_tensor(float(len(q)))).clamp_min(1)
    for _ in range(n_iterations):
        q = q / (all_reduce(q.sum(0)) * q.shape[1]).clamp_min(1e-30)  # each prototype gets 1/K of all mass
        q = q / (q.sum(1, keepdim=True) * n).clamp_min(1e-30)  # each sample gives 1/N
    return q * n


@torch.no_grad()
def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities softmax((logits - center) / temperature)."""
    return F.softmax((logits.float() - center) / temperature, dim=-1)


@torch.no_grad()
def updated_center(center: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """The centre moved towards the mean of all ranks' logits (N, K); unchanged where there are none."""
    total = all_reduce(
        torch.cat([logits.float().sum(0), logits.new_tensor([len(logits)], dtype=torch.float32)])
    )
    mean = total[:-1] / total[-1].clamp_min(1)
    return torch.where(total[-1] > 0, center * momentum + mean * (1 - momentum), center)


def check_pairs(a: Tensor, b: Tensor, temperature: float = 1.0) -> None:
    """Raise a ValueError unless both are (B, d) of one shape, B > 1, and the temperature is positive."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"two views must give embeddings of one shape (B, d), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if len(a) < 2:
        raise ValueError(
            "a contrastive loss needs at least 2 samples per batch, got 1: there is nothing to tell it from"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _contrast(
    a: Tensor, b: Tensor, similarity: Callable[[Tensor, Tensor], Tensor], all_ranks: bool = True
) -> Tensor:
    """Cross-entropy of telling each view's partner among all views but itself."""
    n = len(a)
    first = rank() * n if all_ranks else 0
    with torch.autocast(
        a.device.type, enabled=False
    ):  # bfloat16 cannot tell the similarities of near samples apart
        candidates = torch.cat([gather(a), gather(b)] if all_ranks else [a, b])
        n_global = len(candidates) // 2
        own = torch.arange(n, device=a.device) + first
        logits = similarity(torch.cat([a, b]), candidates)
        itself = torch.cat([own, own + n_global])
        partner = torch.cat([own + n_global, own])
        logits = logits.scatter(1, itself[:, None], float("-inf"))
        return F.cross_entropy(logits, partner)
