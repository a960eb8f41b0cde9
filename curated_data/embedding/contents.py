"""What the shards of a pool contain, by which their embeddings are found again wherever the files lie.

A shard's content is a digest of its samples: of their keys, extensions, offsets and sizes, which the index
has, and of the bytes of all members, which embedding reads. It is taken while a shard is embedded, and kept
with the shard's state (its place, size, and time or ETag). So three things can be said of a shard:

- in a known state: its content is known, and nothing is read;
- in a new state, but with an index that some known shard has: it may have been moved, copied or touched, or
  its bytes may have changed; its samples are read once, and their digest decides;
- with an index that no known shard has: it is new, and will be embedded.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import fingerprint
from curated_data.layout import EMBEDDINGS
from curated_data.locks import locked
from curated_data.parallel import check_ranks
from curated_data.pool import ShardPool
from curated_data.pool.known import Facts, turns
from curated_data.progress import progress

log = logging.getLogger(__name__)

VERSION = 1
_READ = 16 << 20  # bytes of samples that are read at once


class Contents:
    """The contents of a pool's shards, as far as they are known.

    Args:
        root: an opened cache.
        pool: s shards.

    Attributes:
        names: (s,) the name of each shard's content, 20 hexadecimal digits; None if it is not known.
        locks: (s,) the names by which shards are locked while they are read.
    """

    def __init__(self, root: Path, pool: ShardPool) -> None:
        self.root, self.pool = root, pool
        self.layouts = pool.shard_fingerprints
        self.locks = turns(self.layouts)
        self._counts = Counter(self.layouts)
        self._states = [shard.fingerprint for shard in pool.shards]
        self._facts = Facts(root, "contents")
        self.names: list[str | None] = [None] * len(self.layouts)
        self._known_layouts: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have found out since."""
        facts = list(self._facts.all())
        known = {fact[:2]: fact[2] for fact in facts}
        self._known_layouts = {fact[0] for fact in facts}
        for number, place in enumerate(zip(self.layouts, self._states, strict=True)):
            self.names[number] = known.get(place, self.names[number])

    def knows(self, contents: list[str]) -> bool:
        """Whether each of these contents has been found in some shard, as far as is still on record."""
        return {fact[2] for fact in self._facts.all()}.issuperset(contents)

    def look(self, number: int) -> None:
        """Take in what other processes have found out about one shard since.

        A shard that no other of the pool resembles is read if another process knows it by another state, as
        where nodes have own copies of the files.
        """
        facts = self._facts.starting(self.layouts[number])
        for _, state, content in facts:
            if state == self._states[number]:
                self.names[number] = content
        if self.names[number] is None and facts and self._counts[self.layouts[number]] == 1:
            self.read(number)

    def read(self, number: int) -> None:
        """Read the samples of a shard to learn its content."""
        first, last = self.pool.shard_ranges()[number : number + 2].tolist()
        digest = hashlib.sha256()
        ids = np.arange(first, last)
        cuts = np.flatnonzero(np.diff(np.cumsum(self.pool.sizes(ids)) // _READ, prepend=0))
        for part in np.split(ids, cuts):
            check_ranks()
            for sample in self.pool.read(part):
                digest.update(sample_digest(sample))
        self.record(number, digest.digest())

    def record(self, number: int, digest: bytes) -> str:
        """Keep the content of a shard; returns its name.

        Args:
            digest: SHA-256 of the `sample_digest` of each sample in order.
        """
        name = content_name(self.layouts[number], digest)
        if self.names[number] not in (None, name):
            log.warning(
                "%s: its bytes have changed, though not its size and time; it counts as another shard now",
                self.pool.urls[number],
            )
        if self.names[number] != name:
            self._facts.add(self.layouts[number], self._states[number], name)
        self.names[number] = name
        return name

    def recognise(self, *, every: bool = False) -> list[str | None]:
        """Find out which shards were known in another state, by reading these once; returns `names`.

        Ranks and other runs divide the reading among themselves by locks.

        Args:
            every: read all shards whose content is not known, not only those that may have been known.
        """
        unknown = [
            number
            for number, name in enumerate(self.names)
            if name is None and (every or self.layouts[number] in self._known_layouts)
        ]
        if not unknown:
            return self.names
        started = time.monotonic()
        log.info(
            "%d of %d shards are laid out like known ones, but have another place, time or version: their "
            "samples are read once, to see which are the same",
            len(unknown), len(self.names),
        )  # fmt: skip
        before = {fact[2] for fact in self._facts.all()}
        with progress("read moved or touched shards", len(unknown)) as advance:
            waiting = unknown
            for wait in (False, True):
                later = []
                for number in waiting:
                    with locked(self.root / EMBEDDINGS / self.locks[number], wait=wait) as held:
                        if not held:
                            later.append(number)
                            continue
                        self.look(number)
                        if self.names[number] is None:
                            self.read(number)
                        advance()
                waiting = later
        same = sum(self.names[number] in before for number in unknown)
        log.info("%d of them hold what was known (%.1f s)", same, time.monotonic() - started)
        return self.names


def sample_digest(sample: Mapping[str, Any]) -> bytes:
    """SHA-256 of a sample's members, as `ShardPool.read` gives them; keys are in the shard's index."""
    digest = hashlib.sha256()
    for extension in sorted(name for name in sample if not name.startswith("__")):
        data = sample[extension]
        digest.update(f"{extension}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.digest()


def content_name(layout: str, digest: bytes) -> str:
    """The name of a shard's content, by its layout and the digest of its samples' bytes."""
    return fingerprint(stage="content", layout=layout, digest=digest, version=VERSION)
