"""The few collective calls that the package needs, over `torch.distributed`; no-ops on one process."""

import contextlib
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from curated_data.cache import MANIFEST, build_once, is_complete
from curated_data.errors import CacheError, ConfigError, first_line
from curated_data.heartbeat import Heartbeat

_SHARED_WITHIN = 30.0  # seconds within which a shared file system shows every rank what one has written


def is_distributed() -> bool:
    """Whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank. Only for waits that are short on every rank: collectives time out."""
    if is_distributed():
        all_reduce(np.zeros(1, np.int64))  # works on gloo and nccl; nccl's own barrier would guess a device


def all_reduce(array: np.ndarray, op: str = "sum") -> np.ndarray:
    """The elementwise `sum`, `min` or `max` of all ranks' arrays (same shape and dtype), on every rank."""
    if not is_distributed():
        return array
    tensor = _to_backend(array)
    with _explained():
        dist.all_reduce(
            tensor, op={"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op]
        )
    return tensor.cpu().numpy()


def all_gather(array: np.ndarray) -> list[np.ndarray]:
    """Every rank's array, in rank order, on every rank. Only the first dimension may differ."""
    if not is_distributed():
        return [array]
    lengths = np.zeros(world_size(), np.int64)
    lengths[rank()] = len(array)
    lengths = all_reduce(lengths)
    padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    tensor = _to_backend(padded)
    parts = [torch.empty_like(tensor) for _ in lengths]
    with _explained():
        dist.all_gather(parts, tensor)
    return [part.cpu().numpy()[:length] for part, length in zip(parts, lengths, strict=True)]


def broadcast(array: np.ndarray, source: int = 0) -> np.ndarray:
    """The array of rank `source`, on every rank; the others pass one of the same shape and dtype."""
    if not is_distributed():
        return array
    tensor = _to_backend(array)
    with _explained():
        dist.broadcast(tensor, source)
    return tensor.cpu().numpy()


def check_same(**parts: str) -> None:
    """Check that all ranks were given the same; if not, they would wait for each other forever.

    Args:
        parts: the values that must agree, by the names that the error uses.

    Raises:
        ConfigError: a part differs. Raised on every rank, and names a rank that differs.
    """
    if not is_distributed():
        return
    own = np.array([zlib.crc32(value.encode()) for value in parts.values()], np.int64)
    everyones = np.stack(all_gather(own[None]))[:, 0]
    for number, name in enumerate(parts):
        others = np.flatnonzero(everyones[:, number] != everyones[0, number])
        if len(others):
            raise ConfigError(
                f"{name}: rank {others[0]} was given another than rank 0 ({len(others)} of {world_size()} "
                "ranks differ from it); give all ranks the same"
            )


def check_shared(folder: Path) -> None:
    """Check that all ranks see the same folder.

    Raises:
        CacheError: some rank does not see what rank zero writes there. Raised on every rank, and names it.
    """
    if not is_distributed():
        return
    token = folder / f".tmp-seen-by-all-{broadcast(_random())[0]}"
    if rank() == 0:
        token.touch()
    barrier()
    started = time.monotonic()
    while not (seen := token.exists()) and time.monotonic() - started < _SHARED_WITHIN:
        time.sleep(0.05)
    blind = np.flatnonzero(np.concatenate(all_gather(np.array([not seen]))))
    if rank() == 0:
        token.unlink(missing_ok=True)
    if len(blind):
        raise CacheError(
            f"{folder}: what rank 0 writes to its cache_dir, rank {blind[0]} does not see; give all ranks "
            "one folder of a file system that they share"
        )


def build_together(
    folder: Path, build: Callable[[Path | None], None], check: Callable[[], None] | None = None
) -> tuple[Path, bool]:
    """`build_once` for an artifact that all ranks build together, with collective calls.

    The lock may be held by an unrelated run for hours, so no rank waits for it in a collective: rank zero
    takes the lock, and the others watch a file to which it writes its state. If rank zero fails or dies, the
    others end too: at once on the same host, after ten minutes without a heartbeat on other hosts.

    Args:
        folder: the artifact's final path, on a file system that all ranks share.
        build: called on every rank; rank zero gets the temporary folder to write to, the others None.
        check: called first, on rank zero only, while the others wait outside of any collective.

    Returns:
        The folder, and whether it already existed.

    Raises:
        ConfigError: ranks ask for different artifacts.
        RuntimeError: rank zero failed or died. Raised on the other ranks.
    """

    def build_alone(temporary: Path) -> None:
        if check is not None:
            check()
        build(temporary)

    if not is_distributed():
        return build_once(folder, build_alone)
    check_same(**{f"what determines {folder.parent.name}/{folder.name}": folder.name})
    found, run = broadcast(np.array([is_complete(folder), _random()[0]], np.int64))
    if found:
        return folder, True
    heartbeat = Heartbeat(folder.parent / f"{folder.name}-{run}")
    if rank() == 0:

        def build_as_first(temporary: Path) -> None:
            if check is not None:
                check()
            heartbeat.say("begin")
            build(temporary)

        with heartbeat.kept_up():
            barrier()
            return build_once(folder, build_as_first)
    barrier()  # rank zero's heartbeat has begun
    complete = folder / MANIFEST
    began = heartbeat.wait_for(lambda said: said == "begin" or complete.exists()) == "begin"
    if began:
        build(None)
        heartbeat.wait_for(lambda said: complete.exists())  # rank zero is writing it
    return folder, not began


def _random() -> np.ndarray:
    return np.array([secrets.randbits(62)], np.int64)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Explain a collective's error, whose own message only mentions sockets."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank()} of {world_size()}: another rank has ended, or is behind by more than the process "
            f"group's timeout; see the first error of the other ranks ({first_line(error)})"
        ) from error


def _to_backend(array: np.ndarray) -> torch.Tensor:
    """A new tensor on a device that the backend supports: nccl only takes CUDA tensors."""
    tensor = torch.from_numpy(np.array(array, copy=True))
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
