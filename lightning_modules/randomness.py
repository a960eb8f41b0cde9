"""Random numbers that belong to a sample and a step, not to a process.

Masks drawn this way are the same whatever rank a sample lands on and wherever a run was interrupted, and no
global generator is touched.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def sample_noise(sample_ids: Tensor, n: int, *, seed: int, draw: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, n) float32: a hash of (seed, draw, sample id, column).

    Args:
        sample_ids: (B,) int64.
        n: numbers a sample.
        draw: which draw it is, for example a count of batches.
    """
    columns = torch.arange(n, device=sample_ids.device)
    x = _mix(sample_ids.to(torch.int64) + _mix_int(seed) + _mix_int(draw + 0x51ED27))
    x = _mix(x[:, None] + columns * _signed(0x9E3779B97F4A7C15))
    return ((x >> 40) & 0xFFFFFF).float() / 2**24


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with torch's generators (CPU and `device`) at a seed, and put them back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def mix(*numbers: int) -> int:
    """One 63-bit seed of several numbers."""
    state = 0
    for number in numbers:
        state = _mix_int(state + number + 0x632BE5AB)
    return state & (2**63 - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 tensors, whose products wrap around."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _mix_int(x: int) -> int:
    return int(_mix(torch.tensor(_signed((x * 0x9E3779B97F4A7C15 + 1) & (2**64 - 1)))))


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
