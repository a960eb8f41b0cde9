"""Expanding the patterns that a user gives to the list of shards of a pool."""

import difflib
import fnmatch
import glob
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import braceexpand
import fsspec

from curated_data.cache.paths import is_chain, parts_of, spelled
from curated_data.errors import PoolError, printable
from curated_data.pool import http

_MANY = 256  # files, from which they are looked up in parallel
_SILENCE = 60.0  # seconds without an answer, after which a listing has failed
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}  # what installs a protocol's packages
Result = TypeVar("Result")


def is_remote(url: str) -> bool:
    """Whether a shard is read through fsspec instead of as a local file."""
    return ("://" in url or is_chain(url)) and not is_pipe(url)


def is_pipe(url: str) -> bool:
    """Whether a shard is the output of a command, in webdataset's notation."""
    return url.startswith("pipe:")


def unreachable(url: str, error: Exception) -> PoolError:
    """The error for a URL whose protocol is unknown or needs a package that is not installed."""
    protocol = url.rpartition("::")[2].partition("://")[0]
    extra = _EXTRAS.get(protocol) if isinstance(error, ImportError) else None
    hint = f"; pip install 'curated-data[{extra}]'" if extra else ""
    return PoolError(f"{url}: cannot be reached ({printable(error)}){hint}")


def absolute_url(url: str) -> str:
    """A local path as an absolute one, which stays valid if the process changes its working directory."""
    return url if is_remote(url) or is_pipe(url) else os.path.abspath(url)


def expand_urls(
    urls: str | Path | Sequence[str | Path],
    storage_options: Mapping[str, Any] | None = None,
    *,
    pipes: bool = False,
) -> list[str]:
    """Expand brace patterns and globs. Matches of a glob are sorted, all else keeps its order.

    Args:
        urls: a path or fsspec URL, with braces (`pool-{000..099}.tar`) or `*`, `?`, `[...]` and `**` (only
            `*` for remote URLs), or a list of these. `A::B` is the shards of A, then those of B, as in
            webdataset; a chain of fsspec's (`simplecache::s3://...`) is one URL. An existing file whose name
            contains such characters is taken literally.
        storage_options: for fsspec, to list a remote pattern.
        pipes: accept `pipe:<command>` too.

    Raises:
        PoolError: an empty list, a pattern without a match (names the nearest existing path), a folder, or a
            shard given twice.
    """
    if not isinstance(urls, str | Path | Iterable):
        raise PoolError(f"a pool is a path, a URL or a list of these, not {urls!r}")
    patterns = [urls] if isinstance(urls, str | Path) else list(urls)
    if not patterns:
        raise PoolError("the pool is empty: the list of shards has no entry")
    expanded: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str | Path):
            raise PoolError(
                f"a shard is named by a path or URL, not by {pattern!r} ({type(pattern).__name__})"
            )
        for part in _joined(pattern):
            expanded.extend(_expand(part, storage_options or {}, pipes))
    seen: set[str] = set()
    for url in expanded:
        place = absolute_url(url)
        if place in seen:
            raise PoolError(f"{url}: is given twice in the pool's {len(expanded)} shards; name each once")
        seen.add(place)
    return expanded


def map_files(ask: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    """Apply `ask` to each path, in order; to many in parallel, because a network folder takes about a
    millisecond for each.
    """
    if len(paths) < _MANY:
        return list(map(ask, paths))
    blocks = [paths[first : first + _MANY] for first in range(0, len(paths), _MANY)]
    with ThreadPoolExecutor(32) as threads:
        answers = threads.map(lambda block: list(map(ask, block)), blocks)
        return list(itertools.chain.from_iterable(answers))


def missing_shard(path: str, note: str = "") -> PoolError:
    """The error for a missing local shard or pattern; names the nearest existing path."""
    parent, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(parent):
        while parent and not os.path.isdir(parent):
            parent, name = os.path.split(parent)
        return PoolError(
            f"no shard matches {path!r}{note}: folder {parent!r} has no {name!r}{_nearest(parent, name)}"
        )
    return PoolError(f"no shard matches {path!r}{note}{_nearest(parent, name)}")


def a_folder(url: str) -> PoolError:
    """The error for a folder in place of shards; says how to import it if it holds images or parquet."""
    if not is_remote(url) and os.path.isdir(url):
        upper = itertools.islice(os.walk(url), 20)  # the first folders
        ends = {os.path.splitext(name)[1].lower() for _, _, names in upper for name in names}
        if ".tar" not in ends and ends & {".jpg", ".jpeg", ".png", ".webp", ".parquet"}:
            return PoolError(
                f"{url!r} is a folder without shards; make shards of it by `curated-data import "
                f"{shlex.quote(url)} NEW`, or give 'folder:{url}' to have that done in the cache"
            )
    return PoolError(f"{url!r} is a folder; give its shards, for example {os.path.join(url, '*.tar')!r}")


def _joined(pattern: str | Path) -> list[str]:
    """The places that a pattern joins with `::`, spelled out."""
    text = spelled(pattern)
    if "::" not in text or os.path.isfile(text):
        return [text]
    parts = parts_of(text)
    if not all(parts):
        raise PoolError(f"{text!r}: names nothing before or after one of its '::'; write A.tar::B.tar")
    return [spelled(part) for part in parts]


def _expand(pattern: str, storage_options: Mapping[str, Any], pipes: bool) -> list[str]:
    if is_pipe(pattern):
        if pipes:
            return _braces(pattern)
        raise PoolError(
            f"{pattern!r}: a pipe has no offsets to read samples at; store its output as shards: "
            f"`curated-data import {shlex.quote(pattern)} NEW`"
        )
    remote = is_remote(pattern)
    if remote and pattern.endswith("/"):
        raise a_folder(pattern)
    if not remote:
        if os.path.isfile(pattern):
            return [pattern]
        if os.path.isdir(pattern):
            raise a_folder(pattern)
    pieces = _braces(pattern)
    found: list[str] = []
    for piece in pieces:
        if remote and "*" in piece:
            found.extend(_glob_remote(piece, storage_options))
        elif not remote and glob.has_magic(piece) and not os.path.isfile(piece):
            folder, name = os.path.split(piece)
            if glob.has_magic(folder) and os.path.isdir(folder):  # a folder with such a name, as "runs [1]"
                piece = os.path.join(glob.escape(folder), name)
            # A link that leads nowhere matches: it is named as missing below, not passed over.
            matches = sorted(path for path in glob.glob(piece, recursive=True) if not os.path.isdir(path))
            if not matches:
                raise missing_shard(piece)
            found.extend(matches)
        else:
            found.append(piece)
    if not remote:
        is_file = map_files(os.path.isfile, found)
        missing = [path for path, there in zip(found, is_file, strict=True) if not there]
        if missing:
            of = (
                f" ({len(missing)} of the {len(found)} shards of {pattern!r} are missing)"
                if len(found) > 1
                else ""
            )
            raise missing_shard(missing[0], of)
    return found


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise PoolError(f"{pattern!r}: cannot expand its braces ({error})") from error


def _glob_remote(pattern: str, storage_options: Mapping[str, Any]) -> list[str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern, **storage_options)
        folder = pattern.rpartition("/")[0]
        if pattern.startswith(("http://", "https://")) and "*" not in folder and "[" not in folder:
            matches = _glob_http(filesystem, pattern)
        else:
            matches = sorted(filesystem.glob(path))
    except ImportError as error:
        raise unreachable(pattern, error) from error
    except Exception as error:  # each protocol has its own
        raise PoolError(f"{pattern!r}: cannot be listed ({printable(error)})") from error
    if not matches:
        raise PoolError(
            f"no shard matches {pattern!r}; check the bucket or host, the folder, and the pattern"
        )
    return [filesystem.unstrip_protocol(path) for path in matches]


def _glob_http(filesystem: Any, pattern: str) -> list[str]:
    """The files that the page of a folder links to; `?` is not a wildcard in these URLs."""
    folder, _, name = pattern.rpartition("/")
    found = fsspec.asyn.sync(filesystem.loop, http.links, filesystem, f"{folder}/", _SILENCE)
    wanted = re.compile(re.escape(f"{folder}/") + fnmatch.translate(name.replace("?", "[?]")))
    return sorted({url for url in found if wanted.fullmatch(url) and "/" not in url[len(folder) + 1 :]})


def _nearest(folder: str, name: str) -> str:
    try:
        entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    except OSError:
        return ""
    if not entries:
        return f"; {folder!r} is empty"
    close = difflib.get_close_matches(name, entries, 1, cutoff=0.0)
    return f"; the nearest of the {len(entries)} entries of {folder!r} is {close[0]!r}"
