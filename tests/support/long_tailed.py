"""Rows of a long tail."""

import numpy as np


def long_tailed_rows() -> np.ndarray:
    """(1500, 6) float32 in eight groups, of which the largest is 64 times the smallest."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 6)) * 4
    which = rng.choice(8, 1500, p=np.arange(8, 0, -1) ** 2 / 204)
    return (centres[which] + rng.normal(size=(1500, 6))).astype(np.float32)
