"""What is odd about shards: counted when they are indexed, and reported whenever their pool is opened."""

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from curated_data.errors import PoolError

log = logging.getLogger(__name__)


class Note(NamedTuple):
    """How often something was met, and the first place in words."""

    number: int
    example: str


Notes = dict[str, Note]  # by kind, see `_KINDS`


class _Kind(NamedTuple):
    text: str
    is_fault: bool  # samples may be lost or split: `strict` refuses it
    level: int = logging.WARNING


_KINDS = {
    "cut": _Kind(
        "data follow the end-of-archive marker, and {count} members there are not read: a page was zeroed by "
        "a failed disk or copy, or archives were joined by `cat`; copy the shard again, or join archives by "
        "`tar --concatenate`",
        True,
    ),
    "unmarked": _Kind(
        "ends without the end-of-archive marker; is it whole? Copy it again if it is not", True
    ),
    "zeros": _Kind(
        "ends in more zeros than tar pads with, as after a crash of the system that wrote it; is it whole?",
        True,
    ),
    "apart": _Kind(
        "{count} samples have the key of an earlier one of the shard, with other extensions: these are parts "
        "of one sample that do not lie side by side, and each counts as a sample that lacks the others. "
        "`curated-data import SHARD NEW` puts the parts of each sample together",
        True,
    ),
    "scattered": _Kind(
        "{count} samples have the key of one in another shard, with other extensions: if these are parts of "
        "one sample, as images in one shard and labels in another, each counts as a sample that lacks the "
        "others. Write all parts of a sample side by side: join the shards (`tar --concatenate`), then "
        "`curated-data import JOINED NEW`",
        False,
    ),
    "links": _Kind(
        "{count} members are links whose target is not in the shard; they are left out. Write the files "
        "themselves (`tar --dereference --hard-dereference`)",
        True,
    ),
    "linked": _Kind("{count} members are links, read as the files that they lead to", False, logging.INFO),
    "special": _Kind("{count} members are neither files, links nor folders; they are left out", False),
    "macos": _Kind(
        "{count} members are macOS's own (`._name`, `__MACOSX`, `.DS_Store`); they are left out", False
    ),
}


def add_note(notes: Notes, kind: str, count: int, example: str) -> None:
    """Count something; the first example is kept."""
    before = notes.get(kind)
    notes[kind] = Note(count, example) if before is None else Note(before.number + count, before.example)


def joined_notes(of_shards: Iterable[tuple[str, Notes]]) -> Notes:
    """The notes of a pool, from those of its shards with their names."""
    joined: Notes = {}
    n_shards: dict[str, int] = {}
    for url, notes in of_shards:
        for kind, note in notes.items():
            add_note(joined, kind, note.number, f"{url}: {note.example}")
            n_shards[kind] = n_shards.get(kind, 0) + 1
    return {
        kind: note
        if n_shards[kind] == 1
        else note._replace(example=f"{note.example}; and in {n_shards[kind] - 1} more shards")
        for kind, note in joined.items()
    }


def notes_from_json(content: object) -> Notes:
    """Notes as `write_manifest` wrote them.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"notes of type {type(content).__name__}")
    notes: Notes = {}
    for kind, value in content.items():
        if kind not in _KINDS or not isinstance(value, list) or [type(part) for part in value] != [int, str]:
            raise ValueError(f"an unknown note {kind!r}")
        notes[kind] = Note(*value)
    return notes


def report_notes(notes: Notes, *, strict: bool) -> None:
    """Log each note of a pool, most of them as a warning.

    Raises:
        PoolError: `strict`, and samples may be lost or split; names the first shard and place.
    """
    for kind, note in notes.items():
        text = _KINDS[kind].text.format(count=note.number)
        if strict and _KINDS[kind].is_fault:
            raise PoolError(f"{note.example}: {text} (an error because of strict=True)")
        log.log(_KINDS[kind].level, "%s (first: %s)", text, note.example)
