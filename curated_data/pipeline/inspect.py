"""What a cache folder holds: each artifact with its size, its age and the inputs that determined it.

This reads manifests and takes nothing from `curated_data.stages`. A stage object needs the settings and the
inputs of a run, and a cache may hold artifacts of runs whose settings nobody knows any more, of earlier
versions, or of runs that were killed. It would also import torch, which takes longer than listing a cache.
"""

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curated_data.cache.artifacts import (
    MANIFEST,
    absolute,
    check_artifact,
    check_format,
    is_complete,
    read_json,
)
from curated_data.cache.checksums import reading
from curated_data.cache.holds import MARKER
from curated_data.cache.layout import EMBEDDINGS, STAGES, TREE
from curated_data.cache.remedies import Remedy
from curated_data.errors import CacheError

_WHOLE = tuple(stage for stage in STAGES if stage != EMBEDDINGS)  # whose artifacts appear as a whole


@dataclass(frozen=True)
class Artifact:
    """One artifact of a cache.

    Attributes:
        stage: the folder of the cache that holds it: index, embeddings, tree, selection, …
        name: its fingerprint.
        size: of its files, in bytes.
        modified: in seconds since 1970.
        details: from its manifest: the inputs and settings that determined it, and what was found.
        complete: whether it has a manifest; if not, a run is writing it or was killed.
    """

    stage: str
    name: str
    size: int
    modified: float
    details: dict[str, Any]
    complete: bool


def inspect_cache(cache_dir: str | Path) -> list[Artifact]:
    """The artifacts of a cache, stage by stage, newest first in each.

    Raises:
        CacheError: the folder is not a cache, or another format version wrote it.
    """
    root = absolute(cache_dir)
    check_is_cache(root)
    others = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found: list[Artifact] = []
    for stage in [*STAGES, *(name for name in others if name not in STAGES)]:
        folders = [path for path in (root / stage).glob("*") if path.is_dir() and path.name[0] != "."]
        artifacts = [_artifact(stage, folder) for folder in folders]
        found += sorted(artifacts, key=lambda artifact: -artifact.modified)
    return found


def check_is_cache(root: Path) -> None:
    """Check that a folder is a cache of this format version, without creating anything there.

    Raises:
        CacheError: it is not.
    """
    if not (root / MARKER).exists():
        raise CacheError(f"{root}: no cache here (it has no {MARKER}); give the cache_dir of a curation")
    check_format(root)


def verify_cache(cache_dir: str | Path) -> list[str]:
    """Read every artifact and compare it with its checksums; returns one line for each problem.

    Curations check sizes, and the checksums of what they read. This checks everything, which for a large pool
    takes as long as reading its embeddings once.

    Raises:
        CacheError: as for `inspect_cache`.
    """
    from curated_data.embedding.shard_files import check_shard  # here, because its package imports torch

    root = absolute(cache_dir)
    check_is_cache(root)
    problems: list[str] = []
    for folder in [path for stage in _WHOLE for path in sorted(root.glob(f"{stage}/[!.]*"))]:
        with _collected(problems, folder):
            if not is_complete(folder) or (folder.parent.name == TREE and not is_complete(folder / "tree")):
                raise CacheError(f"{folder}: a part of it is missing; {Remedy(folder / MANIFEST)}")
    for manifest in sorted(root.glob(f"[!.]*/[!.]*/**/{MANIFEST}")):
        if any(part.startswith(".") for part in manifest.relative_to(root).parts):
            continue
        with _collected(problems, manifest):
            check_artifact(manifest.parent)
    for details in sorted(root.glob(f"{EMBEDDINGS}/[!.]*/*.json")):
        with _collected(problems, details):
            check_shard(details.parent, details.stem)
    return problems


@contextlib.contextmanager
def _collected(problems: list[str], manifest: Path) -> Iterator[None]:
    """Collect a problem with an artifact, unless a run has removed the artifact meanwhile."""
    try:
        yield
    except CacheError as error:
        if os.path.lexists(manifest):
            problems.append(str(error))


def _artifact(stage: str, folder: Path) -> Artifact:
    files = dict(_sizes(folder))
    manifest = folder / MANIFEST
    if stage == EMBEDDINGS:
        shards = sorted(path for path in files if path.suffix == ".json" and path.parent == folder)
        # The last of those of one content; of a shard that was filtered there are several.
        shards = list({path.stem.partition("-")[0]: path for path in shards}.values())
        details = [read_json(path) for path in shards]
        with reading(folder, Remedy(folder / MANIFEST)):
            content: dict[str, Any] = {
                "embedder": next((item.get("embedder") for item in details), None),
                "shards": len(shards),
                "samples": sum(item["samples"] for item in details),
                "failed": sum(len(item["failures"]) for item in details),
            }
        complete = True  # each shard by itself; which of them are needed depends on the pool
    else:
        complete = manifest.exists()
        content = read_json(manifest) if complete else {}
    return Artifact(
        stage=stage,
        name=folder.name,
        size=sum(status.st_size for status in files.values()),
        modified=max((status.st_mtime for status in files.values()), default=time.time()),
        details={name: value for name, value in content.items() if name not in ("stage", "format", "files")},
        complete=complete,
    )


def _sizes(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of an artifact, except its locks and those that a run removes meanwhile."""
    for place, folders, names in os.walk(folder):  # which skips folders that are gone
        folders[:] = [name for name in folders if name != ".locks"]
        for path in map(Path(place).joinpath, names):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()  # no file of ours is a link
                if stat.S_ISREG(status.st_mode):
                    yield path, status


def age(seconds_since_epoch: float) -> str:
    """How long ago, as text in the largest unit that fits."""
    seconds = max(time.time() - seconds_since_epoch, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
