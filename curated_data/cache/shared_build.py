"""Artifacts that all ranks build together, in a cache that all of them see."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from curated_data.cache.artifacts import MANIFEST, build_once
from curated_data.cache.locks import writable
from curated_data.cache.removal import TEMPORARY, remove
from curated_data.errors import CacheError
from curated_data.parallel import all_gather, broadcast, check_same, is_distributed, rank, together

_VISIBLE_WITHIN = 30.0  # seconds within which a shared file system shows every rank what one has written


def build_together(
    folder: Path, build: Callable[[Path | None], None], check: Callable[[], None] | None = None
) -> tuple[Path, bool]:
    """`build_once` for an artifact that all ranks build together, with collective calls.

    Rank zero takes the lock, and may have to wait for an unrelated run that holds it; the others wait for
    rank zero.

    Args:
        folder: the artifact's final path, on a file system that all ranks share.
        build: called on every rank; rank zero gets the temporary folder to write to, the others None.
        check: called first, on rank zero only.

    Returns:
        The folder, and whether it already existed.

    Raises:
        ConfigError: ranks ask for different artifacts.
        CacheError: a rank does not see what rank zero has written.
        RankError: another rank has failed or ended.
    """

    def build_as_first(temporary: Path) -> None:
        if check is not None:
            check()
        broadcast(np.array([True]))
        build(temporary)

    if not is_distributed():
        return build_once(folder, build_as_first)

    with together():
        check_same(**{f"what determines {folder.parent.name}/{folder.name}": folder.name})
        if rank() == 0:
            _, cached = build_once(folder, build_as_first)
            if cached:
                broadcast(np.array([False]))
        else:
            cached = not broadcast(np.array([False]))[0]
            if not cached:
                build(None)
    with together():  # all have left the block above, so it is published
        _wait_for(folder / MANIFEST)
    return folder, cached


def check_shared(root: Path) -> None:
    """Check that every rank sees what rank zero writes to a folder.

    Raises:
        CacheError: one does not. Raised on every rank.
    """
    if not is_distributed():
        return
    token = broadcast(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    probe = root / f"{TEMPORARY}{token.tobytes().hex()[:12]}-ranks"
    if rank() == 0:
        with writable(probe):
            probe.touch()
    seen = all_gather(np.array([_appears(probe)]))
    if rank() == 0:
        remove(probe, below=root)
    blind = np.flatnonzero(~np.concatenate(seen))
    if len(blind):
        raise CacheError(_unseen(root, int(blind[0])))


def _wait_for(path: Path) -> None:
    if not _appears(path):
        raise CacheError(_unseen(path.parent, rank()))


def _appears(path: Path) -> bool:
    started = time.monotonic()
    while not path.exists():
        if time.monotonic() - started > _VISIBLE_WITHIN:
            return False
        time.sleep(0.05)
    return True


def _unseen(folder: Path, blind: int) -> str:
    return (
        f"{folder}: what rank 0 writes to its cache_dir, rank {blind} does not see; give all ranks one "
        "folder of a file system that they share"
    )
