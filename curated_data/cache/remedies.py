"""What to do about a damaged file, at the end of an error's message."""

import contextlib
import json
import re
import stat
from pathlib import Path

from curated_data.cache.checksums import read_bytes
from curated_data.cache.holds import MARKER

MANIFEST = "manifest.json"

_ARTIFACT = re.compile(r"(tree-)?[0-9a-f]{20}", re.ASCII)  # the name of an artifact, or of its checkpoint


class Remedy:
    """What to do about a damaged file: remove the whole artifact of a cache that it belongs to.

    Worked out only when an error is shown, because it looks at every folder above the file. It only tells
    users to remove an artifact of a cache, or, outside of one, the file's folder if that is an artifact and
    holds nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        path = self.path
        if path.name == MARKER:
            return f"see what else {path.parent} has lost, and remove that file, or give another cache_dir"
        for folder in path.absolute().parents:
            if _ARTIFACT.fullmatch(folder.name) and _is_file(folder.parent.parent / MARKER):
                return f"remove {folder} to have it built again"
        if _is_artifact(path.parent):
            return f"remove {path.parent} to have it built again"
        return "restore it from a copy, or have it written again"


def _is_artifact(folder: Path) -> bool:
    """Whether a folder has a manifest, and nothing that this does not list."""
    with contextlib.suppress(Exception):
        manifest = json.loads(read_bytes(folder / MANIFEST))
        return {path.name for path in folder.iterdir()} <= {MANIFEST, *manifest["files"]}
    return False


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
