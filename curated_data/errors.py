"""The package's exceptions, one for each kind of bad input. All are `ValueError`s, so that one `except`
catches them.
"""

import difflib
from collections.abc import Iterable


class CuratedDataError(ValueError):
    """Base of the package's errors. The message names the thing, its value, and what to do about it."""


class PoolError(CuratedDataError):
    """A pool, a shard or a member cannot be read as asked: missing, truncated, changed, not a tar."""


class SampleError(CuratedDataError):
    """One sample cannot be used: no such member, undecodable bytes. Names shard, key and member."""


class EmbedderError(CuratedDataError):
    """An embedder cannot be found or loaded, or gives outputs of the wrong form."""


class ConfigError(CuratedDataError):
    """A configuration field is unknown, of the wrong type, or contradicts another."""


class CacheError(CuratedDataError):
    """The cache folder cannot be used: not writable, written by another version, or damaged."""


class RankError(CuratedDataError, RuntimeError):
    """Another rank of the run has failed or died. Names it, and the reason if it is known."""


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """The first line of an error's message, for a message of ours; the type's name if it has none."""
    name, lines = type(error).__name__, str(error).splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0]}"[:300] if with_type else lines[0][:300]


def nearest(value: object, names: Iterable[str], n: int = 1) -> str:
    """The end of an error about a value that is none of these names: which one may be meant; or nothing."""
    close = difflib.get_close_matches(str(value), list(names), n, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def printable(error: BaseException | str, longest: int = 200) -> str:
    """What an error of another library says, as part of a line of ours: its type and first line, short, and
    without the bytes of a server's reply.
    """
    if isinstance(error, str):
        text = error
    else:
        name, message = type(error).__name__, str(error)
        text = f"{name}: {message}" if message else name
    line = next((line for line in text.splitlines() if line.strip()), "")
    line = "".join(letter if letter.isprintable() else "?" for letter in line[: longest + 1])
    return line if len(line) <= longest else line[: longest - 1] + "…"
