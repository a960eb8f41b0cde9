"""Checks that the evaluations share, and the layout of data that ranks hold in shares.

Under `torch.distributed` every rank gives its own share of each set, of any length; the set is the shares
joined in rank order, and every rank gets the result of the joined set.
"""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.parallel import rank
from lightning_modules.distributed import all_gather_rows, all_reduce

Array = np.ndarray | Tensor


def checked_features(name: str, features: Array, device: str | torch.device = "cpu") -> Tensor:
    """Finite features (n, d) as float32 on `device`.

    Raises:
        ValueError: another shape, or rows that are not finite, which are named.
    """
    features = as_tensor(features)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: expected features (n, d), got {tuple(features.shape)}")
    features = features.to(device, torch.float32)
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"{name}: {len(rows)} rows of features are not finite, the first at {rows[:5]}")
    return features


def as_tensor(array: Any) -> Tensor:
    """A tensor without gradient of an array, a copy only where torch cannot take the array's memory: that of
    a memory map is read-only, that of a flipped array has negative strides, and files have any byte order.
    """
    if isinstance(array, np.ndarray):
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if not array.flags.writeable or min(array.strides, default=0) < 0:
            array = np.array(array)
    return torch.as_tensor(array).detach()


def checked_k(k: int | Iterable[int], largest: int, of: str) -> list[int]:
    """One number of neighbours or several, as a rising list of different ones.

    Raises:
        TypeError: numbers that are not whole.
        ValueError: an empty list, or a number outside of 1..`largest`, the size of what `of` names.
    """
    ks = sorted({operator.index(each) for each in (k if isinstance(k, Iterable) else [k])})
    if not ks or ks[0] < 1 or ks[-1] > largest:
        raise ValueError(f"k must lie in 1..{largest} (the {of}'s size), got {ks}")
    return ks


def checked_bank(name: str, features: Any) -> Any:
    """Features (n, d) as they are, to be read by slice: an array, a tensor, a memory map, or a store on disk.

    Raises:
        ValueError: another shape.
    """
    if not hasattr(features, "shape"):
        features = torch.as_tensor(features)
    if len(features.shape) != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: expected features (n, d), got {tuple(features.shape)}")
    return features


def checked_labels(name: str, labels: Array, n: int, device: str | torch.device = "cpu") -> Tensor:
    """Labels (n,) >= 0 as int64 on `device`.

    Raises:
        TypeError: labels that are not integers.
        ValueError: another shape, or negative labels.
    """
    labels = as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
    if tuple(labels.shape) != (n,):
        raise ValueError(f"{name}: expected {n} labels, one per sample, got shape {tuple(labels.shape)}")
    labels = labels.to(device, torch.int64).contiguous()
    if n and int(labels.min()) < 0:
        raise ValueError(
            f"{name}: labels must be >= 0 (found {int(labels.min())}): leave unlabelled samples out"
        )
    return labels


def n_joined(x: Tensor) -> int:
    """Rows of all ranks' shares together."""
    return int(all_reduce(torch.tensor([len(x)], device=x.device)))


def first_row(x: Tensor) -> int:
    """Where this rank's share begins in the joined set."""
    return int(all_gather_rows(torch.tensor([len(x)], device=x.device))[: rank()].sum())


def longest_share(x: Tensor) -> int:
    """Rows of the rank that has most: as many blocks on every rank, where each block is a collective."""
    return int(all_gather_rows(torch.tensor([len(x)], device=x.device)).max())


def gather_with_own(x: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows joined, and which of these are this rank's."""
    first = first_row(x)
    return all_gather_rows(x), slice(first, first + len(x))


def held_out_rows(y: Tensor, share: float, seed: int) -> Tensor:
    """Which of this rank's rows are held out (n,) bool: a seeded draw of a share of the joined set, of two
    rows or more.
    """
    n, first = n_joined(y), first_row(y)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[: min(max(1, round(share * n)), n - 1)]] = True
    return mask[first : first + len(y)].to(y.device)


def joined_max(x: Tensor) -> int:
    """The largest value of all ranks' shares; -1 where there is none."""
    own = x.max() if len(x) else x.new_tensor(-1)
    return int(all_reduce(own.reshape(1).clone(), "max"))


def occurring(*shares: Tensor) -> Tensor:
    """The different labels, ascending, that any rank has in any of these arrays (n,): (C,).

    Arrays are sized by their number, not by the largest label: taxon ids of a few classes go up to millions.
    `torch.searchsorted` gives each label's place among them.
    """
    return all_gather_rows(torch.cat(shares).unique()).unique()


def count_pairs(a: Tensor, b: Tensor, n_a: int, n_b: int) -> Tensor:
    """How often each pair of two label arrays occurs, over all ranks: (n_a, n_b) int64, on the CPU."""
    counts = torch.bincount(a * n_b + b, minlength=n_a * n_b).reshape(n_a, n_b)
    return all_reduce(counts).cpu()
