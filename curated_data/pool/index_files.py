"""The indexes of shards and pools on disk: written whole, and checked before a place in them is believed."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import (
    MANIFEST,
    read_array,
    read_arrays,
    read_manifest,
    verify_once,
    write_manifest,
)
from curated_data.cache.checksums import reading
from curated_data.cache.layout import INDEX, POOL
from curated_data.cache.publishing import atomic_path, new_array
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import shown
from curated_data.pool.grouping import split_name
from curated_data.pool.index import ARRAYS, PoolIndex, ShardIndex, join, layout
from curated_data.pool.notes import notes_from_json

_CHECKED = 1 << 22  # values of an array that are checked at once
_FARTHEST = 1 << 62  # bytes into a shard


def save_shard_index(folder: Path, index: ShardIndex, *, url: str) -> None:
    """Publish a shard's index as an artifact folder."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        arrays = io.BytesIO()  # in memory first: on a full disk an open archive raises again when closed
        np.savez(arrays, **{name: getattr(index, name) for name in ARRAYS})
        (temporary / "arrays.npz").write_bytes(arrays.getbuffer())
        write_manifest(
            temporary,
            INDEX,
            {
                "url": url,
                "extensions": index.extensions,
                "n_samples": len(index),
                "n_members": len(index.member_size),
                "n_key_bytes": len(index.key_bytes),
                "n_bytes": int(index.member_size.sum()),
                "notes": index.notes,
            },
        )


def write_pool_index(folder: Path, shard_folders: Sequence[Path]) -> None:
    """Write a pool's index into `folder` as `.npy` files, one shard in memory at a time.

    Args:
        folder: an existing, empty folder (a temporary one, published as a whole).
        shard_folders: the index artifacts of the shards, in the order of the pool.
    """
    manifests = [_read_shard_manifest(path) for path in shard_folders]
    n_samples, n_members, n_key_bytes, n_bytes = (
        sum(manifest[name] for manifest in manifests)
        for name in ("n_samples", "n_members", "n_key_bytes", "n_bytes")
    )
    arrays = {
        name: new_array(folder / f"{name}.npy", dtype, shape)
        for name, (dtype, shape) in layout(n_samples, n_members, n_key_bytes).items()
    }
    shards = zip(shard_folders, manifests, strict=True)
    found = join(arrays, ((of["url"], _read_shard_index(path, of)) for path, of in shards))
    np.save(folder / "shard_start.npy", found.pop("shard_start"))
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    urls = [manifest["url"] for manifest in manifests]
    write_manifest(folder, POOL, {"shards": urls, "n_samples": n_samples, "n_bytes": n_bytes, **found})


def load_pool_index(folder: Path, *, checked: bool = True) -> PoolIndex:
    """Open what `write_pool_index` wrote, as memory maps.

    Args:
        checked: verify the checksums and the places of all samples; a process's workers need not.

    Raises:
        CacheError: missing, damaged, or written by another version.
    """
    manifest = read_manifest(folder, POOL)
    if checked:
        verify_once(folder, manifest)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        _check_extensions(manifest["extensions"])
        n_members, n_key_bytes = (
            len(read_array(folder, name, manifest, map_mode="r", dtype=dtype, shape=(None,)))
            for name, dtype in (("member_size", np.int64), ("key_bytes", np.uint8))
        )
        shapes = layout(manifest["n_samples"], n_members, n_key_bytes)
        shapes["shard_start"] = (np.int64, (len(manifest["shards"]) + 1,))
        arrays = {
            # A plain view of the map: indexing an np.memmap costs microseconds per call.
            name: np.asarray(read_array(folder, name, manifest, map_mode="r", dtype=dtype, shape=shape))
            for name, (dtype, shape) in shapes.items()
        }
        index = PoolIndex(
            manifest["extensions"],
            **arrays,
            notes=notes_from_json(manifest["notes"]),
            n_duplicate_keys=manifest["n_duplicate_keys"],
            duplicate_example=manifest["duplicate_example"],
        )
        if checked:
            _check(index, len(index), len(index.member_size), len(index.key_bytes))
            _check_starts("shard_start", index.shard_start, len(index))
        return index


def _read_shard_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard's index, whose fields are of the types that `save_shard_index` writes.

    Raises:
        CacheError: it is missing, damaged, or holds something else.
    """
    manifest = read_manifest(folder, INDEX)
    with reading(folder / MANIFEST, Remedy(folder / MANIFEST)):
        # Room for the pool's index is made by these: the arrays' own file says how many there can be.
        size = (folder / "arrays.npz").stat().st_size
        most = {"n_samples": size // 8, "n_members": size // 8, "n_key_bytes": size, "n_bytes": _FARTHEST}
        for name, limit in most.items():
            if type(manifest[name]) is not int or not 0 <= manifest[name] <= limit:
                raise ValueError(f"{name} is {shown(manifest[name])}")
        if not isinstance(manifest["url"], str):
            raise ValueError(f"url is {shown(manifest['url'])}")
        _check_extensions(manifest["extensions"])
        notes_from_json(manifest["notes"])
    return manifest


def _check_extensions(names: object) -> None:
    """Check that names of extensions are a list of different ones that members can have."""
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and _is_extension(name) for name in names)
        or len(set(names)) != len(names)
    ):
        raise ValueError(f"extensions are {shown(names)}")


def _is_extension(name: str) -> bool:
    return split_name(b"x." + name.encode("utf-8", "surrogateescape")) == (b"x", name)


def _read_shard_index(folder: Path, manifest: Mapping[str, Any]) -> ShardIndex:
    path = folder / "arrays.npz"
    arrays = read_arrays(folder, "arrays", ARRAYS, manifest)
    with reading(path, Remedy(path)):
        index = ShardIndex(manifest["extensions"], **arrays, notes=notes_from_json(manifest["notes"]))
        _check(index, *(manifest[name] for name in ("n_samples", "n_members", "n_key_bytes")))
    return index


def _check(index: ShardIndex, n_samples: int, n_members: int, n_key_bytes: int) -> None:
    """Check that the arrays of an index fit each other, so that none leads outside another.

    Raises:
        ValueError: one does not; names it.
    """
    for name, (dtype, shape) in layout(n_samples, n_members, n_key_bytes).items():
        array = getattr(index, name)
        if array.dtype != dtype or array.shape != shape:
            expected = f"{np.dtype(dtype)} {shape}"
            raise ValueError(f"{name} holds {array.dtype} {array.shape}, expected {expected}")
    _check_starts("key_start", index.key_start, n_key_bytes)
    _check_starts("member_start", index.member_start, n_members)
    for name, most in (
        ("member_extension", len(index.extensions) - 1),
        ("member_offset", _FARTHEST),
        ("member_size", _FARTHEST),
    ):
        array = getattr(index, name)
        for first in range(0, n_members, _CHECKED):
            part = array[first : first + _CHECKED]
            if part.min() < 0 or part.max() > most:
                raise ValueError(f"{name} holds {part.min()} to {part.max()}, expected 0 to {most}")


def _check_starts(name: str, starts: np.ndarray, stop: int) -> None:
    """Check the starts of rows that follow each other up to `stop`."""
    for first in range(0, len(starts), _CHECKED):
        part = starts[first : first + _CHECKED + 1]
        if (part[1:] < part[:-1]).any():
            raise ValueError(f"{name} is not in ascending order")
    if starts[0] != 0 or starts[-1] != stop:
        raise ValueError(f"{name} runs from {starts[0]} to {starts[-1]}, expected 0 to {stop}")
