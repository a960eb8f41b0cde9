"""The few collective calls that the package needs, over `torch.distributed`; no-ops on one process."""

import contextlib
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from curated_data.cache import MANIFEST, build_once, is_complete
from curated_data.errors import CacheError, ConfigError, RankError, first_line
from curated_data.locks import while_waiting
from curated_data.watch import Watch

_EXPLAINED_WITHIN = 10.0  # seconds in which it shows why a collective call broke
_SHARED_WITHIN = 30.0  # seconds within which a shared file system shows every rank what one has written

_watch: Watch | None = None  # of the block of `watched` that runs


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
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    _complete(dist.all_reduce, tensor, op=operations[op])
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
    _complete(dist.all_gather, parts, tensor)
    return [part.cpu().numpy()[:length] for part, length in zip(parts, lengths, strict=True)]


def broadcast(array: np.ndarray, source: int = 0) -> np.ndarray:
    """The array of rank `source`, on every rank; the others pass one of the same shape and dtype."""
    if not is_distributed():
        return array
    tensor = _to_backend(array)
    _complete(dist.broadcast, tensor, source)
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


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """If the block fails on one rank, all raise an error. For blocks that are short on every rank.

    Raises:
        RankError: the block failed on another rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not all_reduce(np.array([failure is not None], np.int64), "max")[0]:
        return
    why = "" if failure is None else f"rank {rank()} failed: {first_line(failure, with_type=True)}"
    told = [part.tobytes().decode() for part in all_gather(np.frombuffer(why.encode(), np.uint8))]
    raise failure or RankError(next(filter(None, told)))


@contextlib.contextmanager
def watched(root: Path) -> Iterator[Watch | None]:
    """Within the block, a rank that fails or dies ends the others soon, with an error that names it.

    All ranks enter and leave it together. A block within another joins that one.

    Args:
        root: a folder that all ranks share.

    Yields:
        The watch; None on one process.

    Raises:
        CacheError: some rank does not see what rank zero writes to the folder. Raised on every rank.
        RankError: another rank has failed or died.
    """
    global _watch
    if _watch is not None or not is_distributed():
        yield _watch
        return
    watch = Watch(root / "ranks", f"{broadcast(_random())[0]:x}", rank(), world_size())
    with contextlib.ExitStack() as kept:
        with failing_together():
            kept.enter_context(watch.kept_up())
        _check_shared(root, watch)
        _watch = watch
        while_waiting.append(watch.check)
        try:
            yield watch
            if not watch.has_met_after_failure:
                watch.meet()
        finally:
            while_waiting.remove(watch.check)
            _watch = None
        barrier()  # short, as all have met; from here on nobody reads what the others remove


def check_ranks() -> None:
    """End long work within `watched` if another rank has failed or died.

    Raises:
        RankError: names the rank and the reason.
    """
    if _watch is not None:
        _watch.check()


def meet_ranks() -> None:
    """Within `watched`: wait, outside of any collective call, until all ranks are here.

    Before a collective call that follows work of which one rank may have had more.

    Raises:
        RankError: another rank has failed or died.
    """
    if _watch is not None:
        _watch.meet()


def build_together(
    folder: Path, build: Callable[[Path | None], None], check: Callable[[], None] | None = None
) -> tuple[Path, bool]:
    """`build_once` for an artifact that all ranks build together, with collective calls.

    The lock may be held by an unrelated run for hours, so no rank waits for it in a collective: rank zero
    takes the lock, and the others look at what it announces.

    Args:
        folder: the artifact's final path, on a file system that all ranks share.
        build: called on every rank; rank zero gets the temporary folder to write to, the others None.
        check: called first, on rank zero only, while the others wait outside of any collective.

    Returns:
        The folder, and whether it already existed.

    Raises:
        ConfigError: ranks ask for different artifacts.
        RankError: another rank has failed or died.
    """
    meet_ranks()
    name = f"{folder.name}-{broadcast(_random())[0]}"

    def build_as_first(temporary: Path) -> None:
        if check is not None:
            check()
        if watch is not None:
            watch.announce(name)
        build(temporary)

    check_same(**{f"what determines {folder.parent.name}/{folder.name}": folder.name})
    if broadcast(np.array([is_complete(folder)], np.int64))[0]:
        return folder, True
    with watched(folder.parent) as watch:
        if watch is None or rank() == 0:
            return build_once(folder, build_as_first)
        complete = folder / MANIFEST
        watch.wait_for(lambda: watch.announced(0) == name or complete.exists())
        began = watch.announced(0) == name
        if began:
            build(None)
            watch.wait_for(complete.exists)  # rank zero is writing it
    return folder, not began


def _check_shared(folder: Path, watch: Watch) -> None:
    started = time.monotonic()
    while not (seen := watch.sees(0)) and time.monotonic() - started < _SHARED_WITHIN:
        time.sleep(0.05)
    blind = np.flatnonzero(np.concatenate(all_gather(np.array([not seen]))))
    if len(blind):
        raise CacheError(
            f"{folder}: what rank 0 writes to its cache_dir, rank {blind[0]} does not see; give all ranks "
            "one folder of a file system that they share"
        )


def _random() -> np.ndarray:
    return np.array([secrets.randbits(62)], np.int64)


def _complete(begin: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Make a collective call. Within `watched`, it ends if another rank has failed.

    Its own error would only mention sockets.
    """
    watch = _watch
    try:
        work = begin(*arguments, **options, async_op=True)
        if watch is not None:
            watch.n_collectives += 1
            pause = 20e-6
            while not work.is_completed():
                watch.check()
                time.sleep(pause)
                pause = min(1.2 * pause, 0.01)
        work.wait()
    except RankError:
        raise
    except RuntimeError as error:
        if watch is not None:
            watch.explain(_EXPLAINED_WITHIN)
        raise RuntimeError(
            f"rank {rank()} of {world_size()}: another rank has ended, or is behind by more than the process "
            f"group's timeout; see the first error of the other ranks ({first_line(error)})"
        ) from error


def _to_backend(array: np.ndarray) -> torch.Tensor:
    """A new tensor on a device that the backend supports: nccl only takes CUDA tensors."""
    tensor = torch.from_numpy(np.array(array, copy=True))
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
