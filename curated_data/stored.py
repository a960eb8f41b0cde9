"""Reopen an earlier curation from the cache, by the name of its selection."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache import MANIFEST, absolute, read_array, read_manifest
from curated_data.clustering.levels import Level
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig
from curated_data.deduplication import read_keep
from curated_data.embedding import EmbeddingStore
from curated_data.errors import CacheError
from curated_data.inspect import check_is_cache
from curated_data.pipeline import Curation
from curated_data.report.metrics import cluster_balance
from curated_data.seals import load_npy


def selections(cache_dir: str | Path) -> list[str]:
    """The names of the selections in a cache, newest first."""
    found = [path.parent for path in (absolute(cache_dir) / "selection").glob(f"*/{MANIFEST}")]
    return [path.name for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))]


def open_curation(cache_dir: str | Path, selection: str) -> Curation:
    """The curation that a selection belongs to: ids, tree and embeddings, without the pool or the embedder.

    Args:
        cache_dir: of the curation.
        selection: its name, the last part of `curation.folders["selection"]`.

    Returns:
        A curation with the settings that its artifacts record; all others have their defaults.

    Raises:
        CacheError: no such selection, or its tree or embeddings are no longer in the cache.
    """
    root = absolute(cache_dir)  # only read, so it may belong to another user
    check_is_cache(root)
    folders = {"selection": root / "selection" / selection}
    if not (folders["selection"] / MANIFEST).exists():
        known = ", ".join(selections(root)[:5]) or "none"
        raise CacheError(f"{root}: no selection {selection!r}; there are, newest first: {known}")
    chosen = read_manifest(folders["selection"], "selection")
    folders["tree"] = root / "tree" / chosen["inputs"]["tree"]
    grown = read_manifest(folders["tree"], "clustering")
    inputs, settings = grown["inputs"], grown["settings"]
    tree = ClusterTree.load(folders["tree"] / "tree", memory_map=True)
    shards = [name.decode() for name in read_array(folders["tree"], "shards", grown)]
    source = inputs
    if "share" in inputs:  # a re-curation: the first curation has the embeddings of the whole pool
        folders["fresh_embeddings"] = root / "embeddings" / inputs["embedder"]
        source = read_manifest(root / "tree" / inputs["base"], "clustering")["inputs"]
    folders["embeddings"] = root / "embeddings" / source["embedder"]
    if "near_duplicates" in source:
        folders["near_duplicates"] = root / "near_duplicates" / source["near_duplicates"]
    store = _store(folders["embeddings"], shards)
    fields = {item.name for item in dataclasses.fields(CurationConfig)}
    values = {name: value for name, value in (settings | chosen["settings"]).items() if name in fields}
    values["levels"] = [Level(**level) for level in settings.get("levels") or []] or None
    ids = read_array(folders["selection"], "ids", chosen)
    valid = store.valid
    if "near_duplicates" in folders:
        valid &= read_keep(folders["near_duplicates"])
    report = _report(tree, store, valid, ids, values)
    return Curation(ids, tree, store, report, CurationConfig(**values), folders)


def _store(folder: Path, shards: list[str]) -> EmbeddingStore:
    for shard in shards:
        remedy = "run the curation again to embed its shard, after removing it where it is damaged"
        rows = load_npy(folder / f"{shard}.npy", remedy, map_mode="r")
        if len(rows):
            break
    return EmbeddingStore(folder, shards, rows.shape[1], rows.dtype.name)


def _report(
    tree: ClusterTree, store: EmbeddingStore, valid: np.ndarray, ids: np.ndarray, values: dict[str, Any]
) -> dict[str, Any]:
    failed = store.n_failures
    return {
        "shards": len(store.shard_fingerprints),
        "samples": tree.n_samples,
        "failed": failed,
        "near_duplicates": int(tree.n_samples - failed - valid.sum()),
        "excluded": int((valid & (tree.parent[1] == EXCLUDED)).sum()),
        "target_size": values["target_size"],
        "selected": len(ids),
        "distinct": len(np.unique(ids)),
        "levels": [dataclasses.asdict(level) for level in cluster_balance(tree, ids)],
    }
