"""Files of a cache rewritten with checksums that fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import MANIFEST, with_checksum
from curated_data.cache.checksums import file_checksum


def forge(path: Path, change: Callable[[Any], Any]) -> None:
    """Change an array, or the content of a manifest or of an embedding's JSON."""
    if path.suffix == ".npy":
        np.save(path, change(np.load(path)))
        seal = {path.name: file_checksum(path)}
        forge(path.parent / MANIFEST, lambda manifest: manifest | {"files": manifest["files"] | seal})
        return
    content = json.loads(path.read_text())
    content.pop("seal", None)
    path.write_text(json.dumps(with_checksum(change(content))))
