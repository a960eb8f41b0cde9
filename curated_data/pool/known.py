"""What is known of shards by their state, so that a shard in a known state need not be read again.

Each fact is an empty file whose name is the fact: fingerprints joined by hyphens. So a fact is published
whole or not at all, a hundred thousand are read by listing 256 folders, and damage to a file's bytes changes
none. Names of any other form are ignored. A fact that is lost costs one more look at the shard.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.locks import writable
from curated_data.cache.publishing import flush_entry
from curated_data.cache.removal import remove

_FOLDER = ".shards"
_BUCKETS = 256

Fact = tuple[str, ...]


class Facts:
    """Facts of one kind in a cache. Any number of processes may add some at once.

    Args:
        root: an opened cache.
        kind: "layouts" holds (state, layout), "contents" holds (layout, state, content).
    """

    def __init__(self, root: Path | str, kind: str) -> None:
        self.root, self.length = Path(root), {"layouts": 2, "contents": 3}[kind]
        self.folder = self.root / _FOLDER / kind
        self._form = re.compile("-".join(["([0-9a-f]{20})"] * self.length))

    def all(self) -> Iterator[Fact]:
        """All facts, in no order."""
        for number in range(_BUCKETS):
            yield from self._bucket(f"{number:02x}")

    def starting(self, first: str) -> list[Fact]:
        """The facts whose first fingerprint is this, as they are on disk now."""
        return [fact for fact in self._bucket(first[:2]) if fact[0] == first]

    def add(self, *fact: str) -> None:
        """Record a fact. Others with all but the last fingerprint in common are forgotten first."""
        folder = self.folder / fact[0][:2]
        path = folder / "-".join(fact)
        for other in self.starting(fact[0]):
            if other[:-1] == fact[:-1] and other != fact:
                remove(folder / "-".join(other), below=self.root)
        with writable(folder, makes_folder=True):
            folder.mkdir(parents=True, exist_ok=True)
        with writable(path):
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666))
            flush_entry(folder)

    def _bucket(self, name: str) -> Iterator[Fact]:
        try:
            names = os.listdir(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for found in sorted(names):
            if match := self._form.fullmatch(found):
                yield match.groups()


def turns(layouts: list[str]) -> list[str]:
    """A name for each shard of a pool to be locked by: its layout, and how often that occurred before.

    Equal for all ranks and for every pool that holds the same shards, wherever their files are.
    """
    seen: dict[str, int] = {}
    names = []
    for layout in layouts:
        names.append(fingerprint(layout=layout, copy=seen.get(layout, 0)))
        seen[layout] = seen.get(layout, 0) + 1
    return names
