"""The one place that removes files and folders.

Everything else calls it with the folder that the caller owns: a cache root, an output folder, a folder of
its own temporary files. What is removed is found below that folder after links are resolved, or the call
raises. A name that was read from a file never reaches it but through `artifact_folder`, which lets nothing
pass except a stage's folder and a fingerprint.
"""

import contextlib
import logging
import os
import re
import shutil
import uuid
from pathlib import Path

from curated_data.cache.layout import REMOVABLE
from curated_data.errors import CacheError

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
"""How the names of temporary files and folders begin."""

_FINGERPRINT = re.compile(r"[0-9a-f]{20}", re.ASCII)


def remove(path: Path | str, *, below: Path | str) -> None:
    """Remove a file, a link, or a folder with all that it holds. What is missing is fine.

    A link is removed itself, never what it points to. A folder is first renamed, so that a kill leaves no
    part of it under its own name.

    Args:
        path: what to remove.
        below: the folder that the caller owns. It is never removed itself.

    Raises:
        CacheError: `path` does not lie below it.
        OSError: the system refuses.
    """
    path = owned(path, below)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path if path.name.startswith(TEMPORARY) else set_aside(path, below=below)
    if aside is not None:
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            shutil.rmtree(aside)


def tidy(path: Path | str, *, below: Path | str) -> None:
    """`remove` what is only in the way of nothing: where it cannot be removed, a warning says so."""
    try:
        remove(path, below=below)
    except (OSError, CacheError) as error:
        log.warning("%s: is not needed any more, but stays: %s", path, error)


def set_aside(path: Path | str, *, below: Path | str) -> Path | None:
    """Rename a file or folder to a temporary name beside it, for `remove`; None if there is none.

    Raises:
        CacheError: `path` does not lie below the folder that the caller owns.
        OSError: the system refuses.
    """
    path = owned(path, below)
    aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-removed")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return None
    return aside


def owned(path: Path | str, below: Path | str) -> Path:
    """The path with the links of its parents resolved, if it lies below a folder.

    Raises:
        CacheError: it does not, or the folder is the root of the file system, where only temporary names are
            anybody's to remove.
    """
    path = Path(path)
    if path.name in ("", ".", "..") or "\0" in str(path):
        raise CacheError(f"{str(path)!r}: does not name a file or folder to remove")
    try:
        root, real = Path(below).resolve(), path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:  # links that form a cycle, a name that is too long
        raise CacheError(f"{path}: cannot be found below {below} ({error}), so it is not removed") from error
    is_bare_root = root == Path(root.anchor)
    if root not in real.parents or (is_bare_root and not _is_temporary(real)):
        raise CacheError(f"{path}: lies outside {root}, so it is not removed")
    return real


def is_fingerprint(name: object) -> bool:
    """Whether a value is the name of an artifact: 20 hexadecimal digits."""
    return isinstance(name, str) and _FINGERPRINT.fullmatch(name) is not None


def artifact_name(name: object) -> str:
    """The name of an artifact relative to the cache, "STAGE/FINGERPRINT", read from anywhere.

    Raises:
        CacheError: it is anything else than a stage of ours and a fingerprint.
    """
    if isinstance(name, str):
        stage, _, print_ = name.partition("/")
        if stage in REMOVABLE and is_fingerprint(print_):
            return name
    raise CacheError(f"{shown(name)}: expected the name of an artifact, such as {REMOVABLE[0]}/{'0' * 20}")


def artifact_folder(root: Path | str, name: object) -> Path:
    """The folder of an artifact by its `artifact_name`.

    Raises:
        CacheError: it is not such a name, or the folder is a link.
    """
    folder = owned(Path(root) / artifact_name(name), root)
    if folder.is_symlink():
        raise CacheError(f"{folder}: is a link, expected a folder of this cache")
    return folder


def shown(value: object) -> str:
    """A value that was read from a file, for an error message: of bounded length, on one line."""
    try:
        text = repr(value)
    except Exception:  # of a hostile object
        text = f"a {type(value).__name__}"
    text = " ".join(text[:1000].split())  # arrays and tensors take several lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_temporary(path: Path) -> bool:
    return path.parent == Path(path.anchor) and path.name.startswith(TEMPORARY)
