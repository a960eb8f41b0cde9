"""Reopen an earlier curation from the cache, by the name of its selection."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curated_data.cache import MANIFEST, absolute, named_folder, read_array, read_manifest
from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.errors import CacheError
from curated_data.inspect import check_is_cache
from curated_data.levels import Level
from curated_data.pipeline import Curation, read_selection
from curated_data.remedies import Remedy
from curated_data.removal import is_fingerprint, shown
from curated_data.seals import load_npy, reading


def selections(cache_dir: str | Path) -> list[str]:
    """The names of the selections in a cache, newest first."""
    found = [path.parent for path in (absolute(cache_dir) / "selection").glob(f"*/{MANIFEST}")]
    found = [path for path in found if is_fingerprint(path.name)]
    return [path.name for path in sorted(found, key=lambda path: (-path.lstat().st_mtime, path.name))]


def open_curation(cache_dir: str | Path, selection: str) -> Curation:
    """The curation that a selection belongs to: ids, tree and embeddings, without the pool or the embedder.

    Args:
        cache_dir: of the curation.
        selection: its name, the last part of `curation.folders["selection"]`.

    Returns:
        A curation with the settings that its artifacts record; all others have their defaults. Its report is
        that of the run that drew the selection, without `cached` and `seconds`.

    Raises:
        CacheError: no such selection, one of an earlier version, or its tree or embeddings are no longer in
            the cache.
    """
    root = absolute(cache_dir)  # only read, so it may belong to another user
    check_is_cache(root)
    folders = {"selection": root / "selection" / str(selection)}
    if not is_fingerprint(selection) or not (folders["selection"] / MANIFEST).exists():
        known = ", ".join(selections(root)[:5]) or "none"
        raise CacheError(f"{root}: no selection {shown(selection)}; there are, newest first: {known}")
    chosen = read_manifest(folders["selection"], "selection")
    folders["tree"] = named_folder(root, "tree", chosen, "inputs", "tree", of=folders["selection"])
    grown = read_manifest(folders["tree"], "clustering")
    with reading(folders["tree"] / MANIFEST, Remedy(folders["tree"] / MANIFEST)):
        folders |= _inputs(root, folders["tree"], grown)
    tree = ClusterTree.load(folders["tree"] / "tree", memory_map=True)
    ids, report = read_selection(folders["selection"], tree.n_samples)
    names = read_array(folders["tree"], "shards", grown, dtype="S20", shape=(None,))
    with reading(folders["tree"] / MANIFEST, Remedy(folders["tree"] / MANIFEST)):
        store = _store(folders["embeddings"], [name.decode() for name in names.tolist()])
        config = _config(grown["settings"], chosen["settings"])
    return Curation(ids, tree, store, report, config, folders)


def _inputs(root: Path, tree: Path, grown: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of what a tree was built from; of a re-curation, the embeddings of the first curation."""
    folders: dict[str, Path] = {}
    seen = {tree}
    while "share" in grown["inputs"]:
        fresh = named_folder(root, "embeddings", grown, "inputs", "embedder", of=tree)
        folders.setdefault("fresh_embeddings", fresh)
        tree = named_folder(root, "tree", grown, "inputs", "base", of=tree)
        if tree in seen:
            raise CacheError(f"{tree}: damaged (it is its own base); {Remedy(tree / MANIFEST)}")
        seen.add(tree)
        grown = read_manifest(tree, "clustering")
    for stage, key in (("embeddings", "embedder"), ("near_duplicates", "near_duplicates")):
        if stage == "embeddings" or key in grown["inputs"]:
            folders[stage] = named_folder(root, stage, grown, "inputs", key, of=tree)
    return folders


def _config(clustering: Mapping[str, Any], selection: Mapping[str, Any]) -> CurationConfig:
    fields = {item.name for item in dataclasses.fields(CurationConfig)}
    values = {name: value for name, value in {**clustering, **selection}.items() if name in fields}
    values["levels"] = [Level(**level) for level in clustering.get("levels") or []] or None
    return CurationConfig(**values)


def _store(folder: Path, shards: list[str]) -> EmbeddingStore:
    """The store of the shards; names that are none of ours are refused before they become paths."""
    if not shards or not all(map(is_fingerprint, shards)):
        raise ValueError("its shards are not named as ours are")
    for shard in shards:
        remedy = "run the curation again to embed its shard, after removing it where it is damaged"
        rows = load_npy(folder / f"{shard}.npy", remedy, map_mode="r")
        if rows.ndim != 2:
            raise CacheError(f"{folder / shard}.npy: damaged (its shape is {rows.shape}); {remedy}")
        if len(rows):
            break
    return EmbeddingStore(folder, shards, rows.shape[1], rows.dtype.name)
