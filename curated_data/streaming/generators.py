"""The global random generators, from which views draw."""

import pickle
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

Loaded = TypeVar("Loaded")


class Generators:
    """Seeds the global random generators for the views of a sample, and puts them back after a batch.

    Those of Python and numpy are seeded only once views have drawn from them, which costs 12 µs per sample:
    most views draw from torch's alone.
    """

    def __init__(self) -> None:
        self._seeds_others = False

    def seed(self, seed: int) -> None:
        """Seed torch's generator on the CPU, and if views draw from them, those of Python and numpy."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the devices
        if self._seeds_others:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002

    def kept(self, load: Callable[[], Loaded]) -> Loaded:
        """What `load` gives, with all generators put back.

        If it draws from Python's or numpy's while these are not seeded, they are from now on, and it is
        called again.
        """
        of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), _numpy_state()
        others_moved = True
        try:
            found = load()
            if not self._seeds_others:  # numpy's state takes 0.1 ms to read and to set
                moved = pickle.dumps(_numpy_state()) != pickle.dumps(of_numpy)  # for any bit generator
                if not moved and random.getstate() == of_python:
                    others_moved = False
                else:
                    self._seeds_others = True
                    found = load()
            return found
        finally:
            torch.set_rng_state(of_torch)
            if others_moved:
                random.setstate(of_python)
                np.random.set_state(of_numpy)  # noqa: NPY002


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)  # noqa: NPY002
