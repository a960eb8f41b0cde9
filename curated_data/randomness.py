"""Random numbers by hashing, and blocks with a seed of their own: the same on every rank and in every run."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

Words = TypeVar("Words", np.ndarray, torch.Tensor)

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The step of SplitMix64, as a signed word."""


def mixed(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of words that leaves no pattern.

    Args:
        x: int64 of any shape; products wrap around.

    Examples:
        >>> mixed(np.array([GOLDEN], np.int64)).view(np.uint64) == 0xE220A8397B1DCDAF
        array([ True])
    """
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)


def shifted(x: Words, by: int) -> Words:
    """Shifted right, as unsigned words.

    Examples:
        >>> shifted(np.array([-1]), 60)
        array([15])
    """
    return (x >> by) & ((1 << (64 - by)) - 1)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run a block with torch's generators (CPU and `device`) at a seed, and put them back.

    Examples:
        >>> with seeded(0):
        ...     a = torch.rand(2)
        >>> with seeded(0):
        ...     assert torch.equal(torch.rand(2), a)
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
