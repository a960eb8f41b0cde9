"""The few collective calls that the package needs, over `torch.distributed`; on one process they do
nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from curated_data.cache import MANIFEST, build_once


def is_distributed() -> bool:
    """Whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's place in the group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here. Only for waits that are short on every rank: a collective times out."""
    if is_distributed():
        all_reduce(np.zeros(1, np.int64))  # on gloo and nccl alike, without nccl's guess at a barrier device


def all_reduce(array: np.ndarray, op: str = "sum") -> np.ndarray:
    """The elementwise `sum`, `min` or `max` of every rank's array, on every rank; shapes and dtypes must
    agree.
    """
    if not is_distributed():
        return array
    tensor = _to_backend(array)
    dist.all_reduce(
        tensor, op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op]
    )
    return tensor.cpu().numpy()


def all_gather(array: np.ndarray) -> list[np.ndarray]:
    """Every rank's array, in rank order, on every rank; first dimensions may differ, the others may not."""
    if not is_distributed():
        return [array]
    lengths = np.zeros(world_size(), np.int64)
    lengths[rank()] = len(array)
    lengths = all_reduce(lengths)
    padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    tensor = _to_backend(padded)
    parts = [torch.empty_like(tensor) for _ in lengths]
    dist.all_gather(parts, tensor)
    return [part.cpu().numpy()[:length] for part, length in zip(parts, lengths, strict=True)]


def broadcast(array: np.ndarray, source: int = 0) -> np.ndarray:
    """`source`'s array on every rank; the others give one of the same shape and dtype."""
    if not is_distributed():
        return array
    tensor = _to_backend(array)
    dist.broadcast(tensor, source)
    return tensor.cpu().numpy()


def build_together(folder: Path, build: Callable[[Path | None], None]) -> tuple[Path, bool]:
    """`build_once` for an artifact that all ranks build with collective calls of their own.

    No rank waits in a collective for the lock, which an unrelated run may hold for hours: rank zero waits for
    it, and the others watch for a file that says whether to begin.

    Args:
        folder: the artifact's final name, on a file system that all ranks see.
        build: called on every rank at once; rank zero gets the temporary folder to write to, the others None.

    Returns:
        The folder, and whether it was there already.
    """
    if not is_distributed():
        return build_once(folder, build)
    complete = folder / MANIFEST
    found, run = broadcast(np.array([complete.exists(), np.random.SeedSequence().entropy % 2**62], np.int64))
    if found:
        return folder, True
    begin = folder.parent / ".locks" / f"{folder.name}.begin-{run}"
    if rank() == 0:

        def build_as_first(temporary: Path) -> None:
            begin.touch()
            build(temporary)

        try:
            return build_once(folder, build_as_first)
        finally:
            begin.unlink(missing_ok=True)
    while not begin.exists() and not complete.exists():
        time.sleep(0.05)
    built_by_others = not begin.exists()
    if not built_by_others:
        build(None)
        while not complete.exists():  # rank zero is writing it
            time.sleep(0.05)
    return folder, built_by_others


def _to_backend(array: np.ndarray) -> torch.Tensor:
    """A fresh tensor where the backend can work on it: nccl takes device tensors alone."""
    tensor = torch.from_numpy(np.array(array, copy=True))
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
