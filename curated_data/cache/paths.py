"""Local paths and URLs, told apart in the same way wherever a user names a place."""

import os
import re
from pathlib import Path

import fsspec

from curated_data.errors import ConfigError, CuratedDataError

_LOCAL = ("file://", "local://")
_COLLAPSED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)(.*)", re.DOTALL)


def spelled(place: str | os.PathLike[str]) -> str:
    """A path or URL as it was meant: `~` expanded, `file://` dropped, and the `//` that `Path` takes from a
    URL put back.
    """
    text = os.fspath(place)
    if isinstance(place, Path) and (parts := _COLLAPSED.fullmatch(text)) and is_protocol(parts[1]):
        text = f"{parts[1]}://{'/' if parts[1] in ('file', 'local') else ''}{parts[2]}"
    if is_chain(text):
        return text
    if text.startswith(_LOCAL):
        text = text.split("://", 1)[1]
    return text if is_url(text) else os.path.expanduser(text)


def is_url(text: str) -> bool:
    """Whether this is the URL of a file elsewhere, or a chain of such, and no local path."""
    return "://" in text or is_chain(text) or text.startswith("pipe:")


def is_protocol(name: str) -> bool:
    """Whether fsspec knows a protocol of this name."""
    return name in fsspec.available_protocols() or name in fsspec.registry


def is_chain(text: str) -> bool:
    """Whether this is one file behind several of fsspec's file systems, as `simplecache::s3://b/a.tar`."""
    first, found, _ = text.partition("::")
    return bool(found) and _wraps(first)


def parts_of(text: str) -> list[str]:
    """The places that `A::B` joins, as OpenCLIP and webdataset write it. A chain of fsspec is one place."""
    parts: list[str] = []
    link = ""
    for part in text.split("::"):
        if _wraps(part):
            link += f"{part}::"
        else:
            parts.append(link + part)
            link = ""
    if link:  # nothing follows it: no chain, but a file of that name
        parts.append(link.removesuffix("::"))
    return parts


def local_path(place: str | os.PathLike[str], what: str, error: type[CuratedDataError] = ConfigError) -> Path:
    """A path on this machine, with `~` expanded.

    Args:
        place: as the user gave it.
        what: how error messages call it.
        error: what to raise.

    Raises:
        CuratedDataError: of that type, if it is the URL of something elsewhere.
    """
    text = spelled(place)
    if is_url(text):
        raise error(f"{what}: {os.fspath(place)!r} is a URL, expected a folder or file on this machine")
    return Path(text)


def _wraps(part: str) -> bool:
    """Whether a part of a chain needs another after it: a cache, or a member of an archive."""
    protocol, found, _ = part.partition("://")
    if not found:
        return is_protocol(part)
    if part.startswith("pipe:") or not is_protocol(protocol):
        return False
    return protocol in _WRAPPERS


_WRAPPERS = {
    *("blockcache", "cached", "filecache", "simplecache", "asyncwrapper", "dir", "reference"),
    *("libarchive", "sqfs", "tar", "zip"),
}
