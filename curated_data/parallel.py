"""What several ranks need to work together: collective calls that may wait for days, and errors told to all.

Collective calls go through a gloo group of our own, whose time limit is long, beside any group that trains.
So a rank that must wait for another one's long stage waits in a collective call. Within `together` each such
call begins with a roll call: a rank that has failed answers the next one of the others with its reason, and
all leave the block with an error, in step. A rank that died breaks its connections, which ends the others'
calls; to end a whole job is the launcher's business (torchrun, Lightning, `srun --kill-on-bad-exit`).

On one process every function does nothing.
"""

import contextlib
import datetime
import logging
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from curated_data.errors import ConfigError, RankError, first_line
from curated_data.waiting import while_waiting

log = logging.getLogger(__name__)

_LIMIT = datetime.timedelta(days=7)
_LOOK = 1.0  # seconds between looks at whether another rank has failed


@dataclass
class _Block:
    """A block of `together`."""

    number: int  # of this run's blocks
    looked: float = 0.0
    has_ended: bool = False  # because a rank has failed, as all ranks know
    informed: bool = False  # of another rank's failure, through the store


_block: _Block | None = None
_n_blocks = 0
# The group of all ranks, and ours. Weak, so that both end when torch destroys them: a group that outlives its
# process's other threads aborts the process as it exits.
_ours: tuple[weakref.ref[Any], weakref.ref[Any]] | None = None


def is_distributed() -> bool:
    """Whether a process group of more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If the block fails on one rank, it ends on all with an error that names that rank and the reason.

    All ranks enter it, and all have left it before any continues. The others hear of a failure at their next
    collective call, at their next `check_ranks`, or at the end. A block within another is part of that one.

    Raises:
        RankError: the block failed on another rank, or another rank has ended.
    """
    global _block, _n_blocks
    if _block is not None or not is_distributed():
        yield
        return
    _n_blocks += 1
    _block = block = _Block(_n_blocks)
    try:
        yield
        _roll_call()
    except BaseException as error:
        if not block.has_ended:
            with contextlib.suppress(RankError):
                _tell(error)
        raise
    finally:
        _block = None


def check_ranks() -> None:
    """Within `together`: end long work if another rank has failed. Cheap enough to call for every batch.

    Raises:
        RankError: names the rank and the reason.
    """
    now = time.monotonic()
    if _block is None or _block.has_ended or now - _block.looked < _LOOK:
        return
    _block.looked = now
    with _broken_connections():
        store, key = _store(), _key()
        if store is not None and store.check([key]):
            _block.informed = True
            raise RankError(store.get(key).decode())


while_waiting.append(check_ranks)


def barrier() -> None:
    """Wait for every rank."""
    all_reduce(np.zeros(1, np.int64))


def all_reduce(array: np.ndarray, op: str = "sum") -> np.ndarray:
    """The elementwise `sum`, `min` or `max` of all ranks' arrays (same shape and dtype), on every rank."""
    if not is_distributed():
        return array
    _roll_call()
    operations = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    tensor = _copied(array)
    with _broken_connections():
        dist.all_reduce(tensor, op=operations[op], group=_group())
    return tensor.numpy()


def all_gather(array: np.ndarray) -> list[np.ndarray]:
    """Every rank's array, in rank order, on every rank. Only the first dimension may differ."""
    if not is_distributed():
        return [array]
    _roll_call()
    with _broken_connections():
        return _gathered(array)


def broadcast(array: np.ndarray, source: int = 0) -> np.ndarray:
    """The array of rank `source`, on every rank; the others pass one of the same shape and dtype."""
    if not is_distributed():
        return array
    _roll_call()
    tensor = _copied(array)
    with _broken_connections():
        dist.broadcast(tensor, source, group=_group())
    return tensor.numpy()


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
            error = ConfigError(
                f"{name}: rank {others[0]} was given another than rank 0 ({len(others)} of {world_size()} "
                "ranks differ from it); give all ranks the same"
            )
            if _block is not None:
                _block.has_ended = True  # on all ranks, at this very call
            raise error


def _tell(error: BaseException) -> None:
    """Tell the others that this rank has failed, and wait until they know."""
    assert _block is not None
    reason = ""
    if not _block.informed:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        log.error("rank %d failed, and waits until the others know: %s", rank(), reason)
        with contextlib.suppress(RuntimeError):  # the store is gone with its rank
            store = _store()
            if store is not None:
                store.set(_key(), f"rank {rank()} failed: {reason}")
    _roll_call(failure=reason, has_failed=True)


def _roll_call(failure: str = "", has_failed: bool = False) -> None:
    """Within `together`: whether all ranks are well, before they make a collective call.

    Raises:
        RankError: one has failed, or has ended.
    """
    if _block is None:
        return
    with _broken_connections():
        n_failed = torch.tensor([has_failed], dtype=torch.int32)
        dist.all_reduce(n_failed, group=_group())
        if not int(n_failed):
            return
        _block.has_ended = True
        reasons = [part.tobytes().decode() for part in _gathered(np.frombuffer(failure.encode(), np.uint8))]
    at = next((at for at, reason in enumerate(reasons) if reason), 0)
    raise RankError(f"rank {at} failed: {reasons[at]}")


@contextlib.contextmanager
def _broken_connections() -> Iterator[None]:
    """Explain a collective call that broke; its own error only mentions sockets."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        if _block is not None:
            _block.has_ended = True
        raise RankError(
            f"rank {rank()} of {world_size()}: another rank has ended; see the first error of the other "
            f"ranks, and start all again to continue ({first_line(error)})"
        ) from error


def _gathered(array: np.ndarray) -> list[np.ndarray]:
    lengths = torch.zeros(world_size(), dtype=torch.int64)
    lengths[rank()] = len(array)
    dist.all_reduce(lengths, group=_group())
    padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    parts = [torch.from_numpy(np.empty_like(padded)) for _ in lengths]
    dist.all_gather(parts, torch.from_numpy(padded), group=_group())
    return [part.numpy()[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]


def _group() -> Any:
    """Our group of all ranks, made at the first call of all."""
    global _ours
    world = dist.group.WORLD
    group = None if _ours is None or _ours[0]() is not world else _ours[1]()
    if group is None:
        if dist.get_backend(world) == "gloo":
            # Of a rank that has died already, its connections here tell; the new group would wait for it as
            # long as its limit.
            dist.all_reduce(torch.zeros(1), group=world)
        group = dist.new_group(backend="gloo", timeout=_LIMIT)
        _ours = weakref.ref(world), weakref.ref(group)
    return group


def _store() -> Any:
    """The store through which the ranks found each other."""
    return dist.distributed_c10d._get_default_store()


def _key() -> str:
    assert _block is not None
    return f"curated_data/failed/{_block.number}"


def _copied(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, copy=True))
