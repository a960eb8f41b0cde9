"""Folders given as pools: `folder:PATH` is imported into the cache, once for each state of its files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curated_data.cache.artifacts import build_once, fingerprint, open_cache, write_manifest
from curated_data.cache.paths import local_path
from curated_data.errors import PoolError
from curated_data.pool.writer import import_folder

PREFIX = "folder:"
VERSION = 1


def folder_of(urls: Any) -> str | None:
    """The path in `folder:PATH`, given by itself or as a list's only entry; None for all else."""
    if isinstance(urls, Sequence) and not isinstance(urls, str) and len(urls) == 1:
        urls = urls[0]
    return urls.removeprefix(PREFIX) if isinstance(urls, str) and urls.startswith(PREFIX) else None


def imported_shards(folder: str, cache_dir: str | Path | None) -> list[str]:
    """The shards in a cache that hold the images of a folder; made now if they are not there.

    Args:
        folder: as for `import_folder`, or of parquet files as for `import_tables`.
        cache_dir: where they are kept.

    Raises:
        PoolError: there is no cache, no such folder, or it holds no images.
    """
    path = local_path(folder, "folder")
    if cache_dir is None:
        raise PoolError(f"{PREFIX}{folder}: is imported into a cache; give cache_dir, or import it yourself")
    if not path.is_dir():
        raise PoolError(f"{PREFIX}{folder}: is not a folder; give one of images")
    state = sorted(
        (os.path.relpath(os.path.join(place, name), path), status.st_size, status.st_mtime_ns)
        for place, _, names in os.walk(path)
        for name in names
        if (status := os.stat(os.path.join(place, name), follow_symlinks=False))
    )
    name = fingerprint(stage="imported", path=str(path.resolve()), state=state, version=VERSION)

    def build(temporary: Path) -> None:
        if all(Path(file).suffix == ".parquet" for file, *_ in state):
            from curated_data.pool.tables import import_tables

            import_tables(path, temporary)
        else:
            import_folder(path, temporary)
        write_manifest(temporary, "imported", {"folder": str(path)})

    shards, _ = build_once(open_cache(cache_dir) / "imported" / name, build)
    return sorted(map(str, shards.glob("*.tar")))
