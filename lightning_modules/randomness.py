"""Random numbers that belong to a sample and a step, not to a process.

Masks drawn this way are the same whatever rank a sample lands on and wherever a run was interrupted, and no
global generator is touched.
"""

import torch
from torch import Tensor

from curated_data.randomness import GOLDEN, mixed, shifted


def sample_noise(sample_ids: Tensor, n: int, *, seed: int, draw: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, n) float32: a hash of (seed, draw, sample id, column).

    Args:
        sample_ids: (B,) int64.
        n: numbers per sample.
        draw: which draw it is, for example a count of batches.

    Examples:
        >>> noise = sample_noise(torch.tensor([3, 7]), 4, seed=0, draw=0)
        >>> torch.equal(noise[1:], sample_noise(torch.tensor([7]), 4, seed=0, draw=0))
        True
    """
    columns = torch.arange(n, device=sample_ids.device)
    x = mixed(sample_ids.to(torch.int64) + _mix_int(seed) + _mix_int(draw + 0x51ED27))
    x = mixed(x[:, None] + columns * GOLDEN)
    return shifted(x, 40).float() / 2**24


def mix(*numbers: int) -> int:
    """One 63-bit seed of several numbers.

    Examples:
        >>> mix(1, 2) == mix(2, 1)
        False
    """
    state = 0
    for number in numbers:
        state = _mix_int(state + number + 0x632BE5AB)
    return state & (2**63 - 1)


def _mix_int(x: int) -> int:
    word = (x * GOLDEN + 1) & (2**64 - 1)
    return int(mixed(torch.tensor(word - 2**64 if word >= 2**63 else word)))
