"""Matrices of any kind that users have: arrays, memory maps, tensors, stores of embeddings."""

from typing import Any, Protocol

import numpy as np
import torch


class Matrix(Protocol):
    """What rows are read from: a numpy array, memory map, tensor, or an `EmbeddingStore`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    @property
    def dtype(self) -> Any:
        """A floating-point type of numpy or torch."""

    def __len__(self) -> int:
        """n."""

    def __getitem__(self, which: Any, /) -> Any:
        """Some rows, by a slice or an array of ids."""


def unit(rows: np.ndarray) -> np.ndarray:
    """(m, d) rows of norm 1; rows of zeros stay as they are."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)


def read_rows(source: Matrix, which: slice | np.ndarray) -> torch.Tensor:
    """Rows of an array or tensor as float32, or as float64 if they are, on the tensor's device."""
    if isinstance(source, torch.Tensor):
        index = which if isinstance(which, slice) else torch.from_numpy(which).to(source.device)
        found = source[index].detach()
        return found if found.dtype == torch.float64 else found.float()
    rows = source[which]
    rows = np.ascontiguousarray(rows, dtype=np.float64 if rows.dtype.itemsize > 4 else np.float32)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())  # torch has no read-only tensors
