"""The global random generators, which views draw from."""

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def generators_kept() -> Iterator[Callable[[], bool]]:
    """Leave the global random generators as they were found; tells whether Python's or numpy's were drawn
    from.
    """
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), _numpy_state()
    numpy_bytes = pickle.dumps(of_numpy)  # whichever bit generator it is of, its state can be compared so

    def others_moved() -> bool:
        return pickle.dumps(_numpy_state()) != numpy_bytes or random.getstate() != of_python

    try:
        yield others_moved
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def seed_generators(seed: int, all_of_them: bool) -> None:
    torch.default_generator.manual_seed(seed)  # the CPU's: torch.manual_seed would reach for devices too
    if all_of_them:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)  # noqa: NPY002
