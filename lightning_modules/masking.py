"""Masks over a transformer's patches: random ones (MAE) and blocks (iBOT)."""

import torch
from torch import Tensor

from lightning_modules.randomness import sample_noise


def random_mask(
    sample_ids: Tensor, n_patches: int, n_keep: int, *, seed: int, draw: int
) -> tuple[Tensor, Tensor]:
    """Which patches to keep, in random order, and how to put all back in place.

    Returns:
        keep: (B, n_keep) indices of kept patches.
        restore: (B, n_patches): with `shuffled` = kept patches followed by the others' placeholders,
            `shuffled.gather(1, restore)` is in image order; a patch is masked where restore >= n_keep.
    """
    order = sample_noise(sample_ids, n_patches, seed=seed, draw=draw).argsort(dim=1)
    return order[:, :n_keep], order.argsort(dim=1)


def block_mask(
    sample_ids: Tensor,
    grid: tuple[int, int],
    *,
    seed: int,
    draw: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    aspect: float = 0.3,
    n_tries: int = 16,
) -> Tensor:
    """iBOT's block masks (arXiv 2111.07832, section 3.2; blocks as in BEiT).

    Returns (B, h * w) boolean, True where masked. A sample is masked with `probability`; its share of masked
    patches is uniform in `ratio`. Rectangles of random area and of aspect within (aspect, 1 / aspect) are
    laid as long as they do not mask too much; what is then missing is filled with single patches, so that the
    number is exact.
    """
    height, width = grid
    n, device = height * width, sample_ids.device
    noise = sample_noise(sample_ids, 2 + 4 * n_tries + n, seed=seed, draw=draw)
    share = ratio[0] + (ratio[1] - ratio[0]) * noise[:, 1]
    target = torch.where(noise[:, 0] < probability, (share * n).round(), torch.zeros_like(share)).long()
    mask = torch.zeros(len(sample_ids), height, width, dtype=torch.bool, device=device)
    rows = torch.arange(height, device=device)[None]
    columns = torch.arange(width, device=device)[None]
    for u_area, u_aspect, u_top, u_left in (
        noise[:, 2 : 2 + 4 * n_tries].view(-1, n_tries, 4).permute(1, 2, 0)
    ):
        left_to_mask = (target - mask.flatten(1).sum(1)).clamp_min(0)
        area = 1 + (left_to_mask - 1) * u_area
        aspects = aspect ** (2 * u_aspect - 1)
        h = (area * aspects).clamp_min(0).sqrt().round().long().clamp(1, height)
        w = (area / aspects).clamp_min(0).sqrt().round().long().clamp(1, width)
        top = (u_top * (height - h + 1)).long()
        left = (u_left * (width - w + 1)).long()
        in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        laid = mask | (in_rows[:, :, None] & in_columns[:, None, :])
        fits = laid.flatten(1).sum(1) <= target
        mask = torch.where(fits[:, None, None], laid, mask)
    mask = mask.flatten(1)
    missing = target - mask.sum(1)
    order = noise[:, -n:].masked_fill(mask, 2.0).argsort(dim=1).argsort(dim=1)
    return mask | (order < missing[:, None])
