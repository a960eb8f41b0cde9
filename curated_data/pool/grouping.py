"""Grouping the members of an archive into samples as webdataset does.

Neighbours whose names agree up to the first dot of the base name are one sample. Links within the archive
count as the files that they lead to, and macOS's own files are left out.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from curated_data.errors import PoolError
from curated_data.pool.links import resolve_links
from curated_data.pool.notes import Notes, add_note
from curated_data.pool.tar import Link, Source, read_members

_RESERVED = ("__key__", "__url__", "__bad__", "__local_path__")  # webdataset's own fields of a sample

# How webdataset splits a name into key and extension, and the names that it skips.
_KEY_AND_EXTENSION = re.compile(rb"((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA = re.compile(rb"__[^/]*__($|/)")
_APPLE_DOUBLE = b"\0\x05\x16\x07"  # how such a file begins


class Grouped(NamedTuple):
    """The samples of an archive, as the arrays of a `ShardIndex`, but lists."""

    extensions: list[str]
    keys: list[bytes]
    member_start: list[int]
    member_extension: list[int]
    member_offset: list[int]
    member_size: list[int]
    notes: Notes


def group_members(source: Source) -> Grouped:
    """Group the members of an archive into samples, by its headers alone.

    Raises:
        PoolError: it cannot be read, or a sample has two members with the same extension.
    """
    notes: Notes = {}
    names: list[bytes] = []
    offsets: list[int] = []
    sizes: list[int] = []
    links: list[Link] = []
    for block in read_members(source, notes):
        links += [link._replace(place=link.place + len(names)) for link in block.links]
        names += block.names
        offsets += block.offsets
        sizes += block.sizes
    if links:
        names, offsets, sizes = _with_links(names, offsets, sizes, links, notes)

    of_macos = _MacOSFiles(source, names)
    keys: list[bytes] = []
    member_start: list[int] = []
    kept: list[int] = []  # the members that belong to samples
    member_extension: list[int] = []
    spelled: dict[bytes, int] = {}  # number of each spelling seen, so that lower() runs once each
    extensions: dict[str, int] = {}
    current: bytes | None = None
    seen: set[int] = set()
    for place, name in enumerate(names):
        dot = name.find(b".", name.rfind(b"/") + 1)
        if dot < 0:
            continue
        if b"__MACOSX/" in name:
            add_note(notes, "macos", 1, repr(text_of(name)))
            continue
        if dot and name[dot - 1] != 0x2F and name[:2] != b"__" and b"\n" not in name:
            key, spelling = name[:dot], name[dot + 1 :]
        else:  # dot-files, webdataset's metadata, and other odd names
            if name[dot : dot + 2] in (b"._", b".D") and of_macos(name, offsets[place]):
                add_note(notes, "macos", 1, repr(text_of(name)))
                continue
            match = None if _METADATA.match(name) else _KEY_AND_EXTENSION.match(name)
            if match is None:
                continue
            key, spelling = match.groups()
        number = spelled.get(spelling)
        if number is None:
            extension = spelling.decode("utf-8", "surrogateescape").lower()
            if extension in _RESERVED:
                raise PoolError(
                    f"{source.name}: member {text_of(name)!r} has a reserved name as its extension"
                )
            number = spelled[spelling] = extensions.setdefault(extension, len(extensions))
        if key != current:
            keys.append(key)
            member_start.append(len(kept))
            current = key
            seen = {number}
        elif number in seen:
            raise PoolError(
                f"{source.name}: sample {text_of(key)!r} has two members {list(extensions)[number]!r} "
                f"({text_of(name)!r} at offset {offsets[place]} is the second): rename one; "
                "extensions start at the first dot and are compared in lower case"
            )
        else:
            seen.add(number)
        member_extension.append(number)
        kept.append(place)
    member_start.append(len(kept))
    _note_parts_apart(keys, member_start, member_extension, list(extensions), notes)
    return Grouped(
        list(extensions),
        keys,
        member_start,
        member_extension,
        [offsets[place] for place in kept],
        [sizes[place] for place in kept],
        notes,
    )


def split_name(name: bytes) -> tuple[bytes, str] | None:
    """A member's key and extension, split as in webdataset; None for a name that it skips."""
    match = None if _METADATA.match(name) else _KEY_AND_EXTENSION.match(name)
    if match is None:
        return None
    extension = match.group(2).decode("utf-8", "surrogateescape").lower()
    return None if extension in _RESERVED else (match.group(1), extension)


def parts_apart(
    keys: Sequence[Any], member_start: Sequence[int], member_extension: Sequence[int]
) -> list[list[int]]:
    """The rows of each sample whose parts do not lie side by side: they share a key, and no extension."""
    if len(set(keys)) == len(keys):
        return []
    places: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    apart = []
    for rows in places.values():
        parts = [member_extension[member_start[row] : member_start[row + 1]] for row in rows]
        if len(rows) > 1 and len(set().union(*parts)) == sum(map(len, parts)):
            apart.append(rows)
    return apart


def text_of(name: bytes) -> str:
    """A name for a message."""
    return name.decode("utf-8", "backslashreplace")


class _MacOSFiles:
    """Recognises what macOS adds to archives: `.DS_Store`, and `._x` beside `x` or with its first bytes."""

    def __init__(self, source: Source, names: list[bytes]) -> None:
        self.source, self.names = source, names
        self.beside: set[bytes] | None = None  # all names, and their folders

    def __call__(self, name: bytes, offset: int) -> bool:
        folder, slash, base = name.rpartition(b"/")
        if not base.startswith(b"._"):
            return base == b".DS_Store"
        if self.beside is None:
            self.beside = set(self.names)
            for other in self.names:
                while (cut := other.rfind(b"/")) > 0 and other[:cut] not in self.beside:
                    other = other[:cut]
                    self.beside.add(other)
        if len(base) > 2 and folder + slash + base[2:] in self.beside:
            return True
        return len(base) > 2 and self.source.read(offset, 4) == _APPLE_DOUBLE


def _with_links(
    names: list[bytes], offsets: list[int], sizes: list[int], links: list[Link], notes: Notes
) -> tuple[list[bytes], list[int], list[int]]:
    """The members with the links as what they lead to, without those that lead to no file."""
    ends = resolve_links(names, links)
    for link in links:
        end = ends.get(link.place)
        if end is None:
            text = f"{text_of(names[link.place])!r} -> {text_of(link.target[:200])!r}"
            add_note(notes, "links", 1, text)
            sizes[link.place] = -1
        else:
            offsets[link.place], sizes[link.place] = offsets[end], sizes[end]
    if ends:
        place = next(iter(ends))
        add_note(notes, "linked", len(ends), f"{text_of(names[place])!r} is {text_of(names[ends[place]])!r}")
    kept = [place for place, size in enumerate(sizes) if size >= 0]
    return [names[p] for p in kept], [offsets[p] for p in kept], [sizes[p] for p in kept]


def _note_parts_apart(
    keys: list[bytes], member_start: list[int], member_extension: list[int], names: list[str], notes: Notes
) -> None:
    apart = parts_apart(keys, member_start, member_extension)
    if apart:
        first = apart[0]
        parts = [member_extension[member_start[row] : member_start[row + 1]] for row in first[:3]]
        shown = " and ".join("/".join(names[number] for number in part) for part in parts)
        count = sum(len(rows) - 1 for rows in apart)
        add_note(notes, "apart", count, f"{text_of(keys[first[0]])!r} with {shown}")
