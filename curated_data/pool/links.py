"""Where the links within an archive lead."""

from bisect import bisect_left
from collections.abc import Sequence

from curated_data.pool.tar import Link

_LONGEST_PATH = 4096  # bytes, as everywhere on Linux
_MOST_HOPS = 40  # from one symbolic link to the next, as the kernel follows
_ROOT = b"/"


def resolve_links(names: Sequence[bytes], links: Sequence[Link]) -> dict[int, int]:
    """The place of the file that each link leads to, by the link's place; without those that lead to none.

    A hard link means the last earlier member of that name, or without one the first later; a symbolic link
    means what is there once all members are unpacked, and may pass over links to folders. None leads out of
    the archive. Takes time in proportion to the length of all names and targets.

    Args:
        names: of all files and links of the archive.
        links: with their places among `names`.
    """
    return _Links(names, links).resolved()


class _Links:
    """The tree of the archive's names. Node 0 is the folder where it would be unpacked."""

    def __init__(self, names: Sequence[bytes], links: Sequence[Link]) -> None:
        self.links = {link.place: link for link in links}
        self.children: dict[tuple[int, bytes], int] = {}
        self.parents = [0]
        self.places: list[list[int]] = [[]]  # of the members with the name of each node, in order
        self.node_of: dict[int, int] = {}  # of links
        self.targets: dict[int, int | None] = {}  # nodes that symbolic links lead to, by place
        for place, name in enumerate(names):
            node = self._named(_normal(name), makes=True)
            assert node is not None
            self.places[node].append(place)
            if place in self.links:
                self.node_of[place] = node

    def resolved(self) -> dict[int, int]:
        found: dict[int, int | None] = {}
        for place in self.links:
            chain: dict[int, None] = {}
            at: int | None = place
            while at in self.links and at not in found and at not in chain:
                chain[at] = None
                at = self._behind(self.links[at])
            end = None if at is None or at in chain else found.get(at, at)
            found |= dict.fromkeys(chain, end)
        return {place: end for place, end in found.items() if end is not None}

    def _behind(self, link: Link) -> int | None:
        """The place of the member that a link leads to: a file or a hard link, or after a hard link any."""
        if link.is_symbolic:
            node = self._followed(link, 0)
            return self.places[node][-1] if node is not None and self.places[node] else None
        parts = _normal(link.target)
        node = self._named(parts)
        if node is None and parts[:1] == [_ROOT]:  # which tar removes from names
            node = self._named(parts[1:])
        others = self.places[node] if node is not None else []
        earlier = bisect_left(others, link.place)
        if earlier:
            return others[earlier - 1]
        return next((place for place in others if place != link.place), None)

    def _followed(self, link: Link, hops: int) -> int | None:
        """The node that a symbolic link leads to."""
        if link.place in self.targets:
            return self.targets[link.place]
        if hops == _MOST_HOPS:
            return None
        node, n_missing = self.parents[self.node_of[link.place]], 0  # folders that no member lies in
        for part in _parts(link.target):
            if part == b"..":
                if n_missing:
                    n_missing -= 1
                elif node == 0 or self.children.get((0, _ROOT)) == node:
                    return None
                else:
                    node = self.parents[node]
                continue
            child = None if n_missing else self.children.get((0 if part == _ROOT else node, part))
            if child is None:
                n_missing += 1
                continue
            other = self.links.get(self.places[child][-1]) if self.places[child] else None
            if other is not None and other.is_symbolic:
                child = self._followed(other, hops + 1)
                if child is None:
                    return None
            node = child
        self.targets[link.place] = None if n_missing else node
        return self.targets[link.place]

    def _named(self, parts: list[bytes], makes: bool = False) -> int | None:
        """The node of a path without `.` and `..`."""
        node = 0
        for part in parts:
            child = self.children.get((node, part))
            if child is None:
                if not makes:
                    return None
                child = self.children[node, part] = len(self.parents)
                self.parents.append(node)
                self.places.append([])
            node = child
        return node


def _parts(path: bytes) -> list[bytes]:
    """The parts of a path; of one that is too long, a way out of the archive."""
    if len(path) > _LONGEST_PATH:
        return [b".."] * _LONGEST_PATH
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    return [_ROOT, *parts] if path.startswith(b"/") else parts


def _normal(path: bytes) -> list[bytes]:
    """The parts of a path without what `..` takes back."""
    parts: list[bytes] = []
    for part in _parts(path):
        if part == b".." and parts and parts[-1] not in (b"..", _ROOT):
            parts.pop()
        else:
            parts.append(part)
    return parts
