"""The global random generators, from which views draw."""

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def generators_kept() -> Iterator[Callable[[], bool]]:
    """Restore the global random generators after the block.

    Yields a function that tells whether those of Python or numpy have been used since.
    """
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), _numpy_state()
    numpy_bytes = pickle.dumps(of_numpy)  # comparable for any bit generator

    def others_moved() -> bool:
        return pickle.dumps(_numpy_state()) != numpy_bytes or random.getstate() != of_python

    try:
        yield others_moved
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def seed_generators(seed: int, all_of_them: bool) -> None:
    """Seed torch's global generator on the CPU, and with `all_of_them` also those of Python and numpy."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the devices
    if all_of_them:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)  # noqa: NPY002
