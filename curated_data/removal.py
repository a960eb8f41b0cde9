"""The one place that removes files and folders.

Everything else calls it with the folder that the caller owns: a cache root, an output folder, a folder of
its own temporary files. What is removed is found below that folder after links are resolved, or the call
raises. A name that was read from a file never reaches it but through `artifact_folder`, which lets nothing
pass except a stage's folder and a fingerprint.
"""

import contextlib
import os
import re
import shutil
import uuid
from pathlib import Path

from curated_data.errors import CacheError

TEMPORARY = ".tmp-"
"""How the names of temporary files and folders begin."""

STAGES = ("embeddings", "near_duplicates", "selection", "tree")
"""The folders of a cache that hold artifacts which may be removed by name."""

_FINGERPRINT = re.compile(r"[0-9a-f]{20}")


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
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path
    if not path.name.startswith(TEMPORARY):
        aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}-removed")
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # another process removed it
            return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(aside)


def owned(path: Path | str, below: Path | str) -> Path:
    """The path with the links of its parents resolved, if it lies below a folder.

    Raises:
        CacheError: it does not, or the folder is the root of the file system.
    """
    path, root = Path(path), Path(below).resolve()
    if path.name in ("", ".", "..") or "\0" in str(path):
        raise CacheError(f"{str(path)!r}: does not name a file or folder to remove")
    real = path.parent.resolve() / path.name
    if root == Path(root.anchor) or root not in real.parents:
        raise CacheError(f"{path}: lies outside {root}, so it is not removed")
    return real


def artifact_folder(root: Path | str, name: object) -> Path:
    """The folder of an artifact by its name relative to the cache, "STAGE/FINGERPRINT", read from anywhere.

    Raises:
        CacheError: it is anything else than a stage of ours and a fingerprint, or it is a link.
    """
    stage, _, print_ = name.partition("/") if isinstance(name, str) else ("", "", "")
    if stage not in STAGES or not _FINGERPRINT.fullmatch(print_):
        raise CacheError(f"{name!r}: expected the name of an artifact, such as {STAGES[0]}/{'0' * 20}")
    folder = owned(Path(root) / stage / print_, root)
    if folder.is_symlink():
        raise CacheError(f"{folder}: is a link, expected a folder of this cache")
    return folder
