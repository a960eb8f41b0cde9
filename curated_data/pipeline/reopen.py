"""Reopen an earlier curation from the cache, by the name of its selection."""

from pathlib import Path

from curated_data.cache.artifacts import MANIFEST, absolute, named_folder, read_manifest
from curated_data.cache.checksums import reading
from curated_data.cache.layout import EMBEDDINGS, NEAR_DUPLICATES, RETRIEVAL, SELECTION, TREE
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import is_fingerprint, shown
from curated_data.clustering.tree import EXCLUDED
from curated_data.errors import CacheError
from curated_data.pipeline.inspect import check_is_cache
from curated_data.stages.curation import Curation
from curated_data.stages.embeddings import open_embeddings
from curated_data.stages.selection import Selection, open_selection
from curated_data.stages.tree import BuiltTree


def selections(cache_dir: str | Path) -> list[str]:
    """The names of the selections in a cache, newest first."""
    found = [path.parent for path in (absolute(cache_dir) / SELECTION).glob(f"*/{MANIFEST}")]
    found = [path for path in found if is_fingerprint(path.name)]
    return [path.name for path in sorted(found, key=lambda path: (-path.lstat().st_mtime, path.name))]


def reopen(cache_dir: str | Path, selection: str) -> Curation:
    """The curation that a selection belongs to: ids, tree and embeddings, without the pool or the embedder.

    Args:
        cache_dir: of the curation.
        selection: its name, the last part of `curation.folders["selection"]`.

    Returns:
        A curation with the settings and the report of the run that drew the selection, but for what only
        that run knows, `cached` and `seconds`.

    Raises:
        CacheError: no such selection, one of an earlier version, or its tree or embeddings are no longer in
            the cache.
    """
    root = absolute(cache_dir)  # only read, so it may belong to another user
    check_is_cache(root)
    folders = {SELECTION: root / SELECTION / str(selection)}
    if not is_fingerprint(selection) or not (folders[SELECTION] / MANIFEST).exists():
        known = ", ".join(selections(root)[:5]) or "none"
        raise CacheError(f"{root}: no selection {shown(selection)}; there are, newest first: {known}")
    built = BuiltTree(tree_of(root, selection))
    folders[TREE] = built.folder
    folders |= _inputs(root, built)
    content = read_manifest(folders[SELECTION], Selection.kind)
    if RETRIEVAL in content.get("inputs", {}):
        folders[RETRIEVAL] = named_folder(
            root, RETRIEVAL, content, "inputs", RETRIEVAL, of=folders[SELECTION]
        )
    tree = built.tree
    drawn = open_selection(folders[SELECTION], tree.n_samples)
    with reading(built.folder / MANIFEST, Remedy(built.folder / MANIFEST)):
        needed = tree.parent[1] != EXCLUDED
        store = open_embeddings(folders[EMBEDDINGS], built.shards, built.shard_ranges(), needed)
    return Curation(drawn.ids, tree, store, drawn.report, drawn.config, folders, drawn.nested)


def tree_of(root: Path, selection: str) -> Path:
    """The folder of the tree that a selection was drawn from, which may have been removed since.

    Raises:
        CacheError: the selection is missing or damaged.
    """
    folder = root / SELECTION / selection
    return named_folder(root, TREE, read_manifest(folder, Selection.kind), "inputs", "tree", of=folder)


def _inputs(root: Path, tree: BuiltTree) -> dict[str, Path]:
    """The folders of what a tree was built from; of a re-curation, the embeddings of the first curation."""

    def named(place: str, key: str) -> Path:
        return named_folder(root, place, tree.manifest, "inputs", key, of=tree.folder)

    folders: dict[str, Path] = {}
    seen = {tree.folder}
    while "share" in tree.inputs:
        folders.setdefault("fresh_embeddings", named(EMBEDDINGS, "embedder"))
        base = named(TREE, "base")
        if base in seen:
            raise CacheError(f"{base}: damaged (it is its own base); {Remedy(base / MANIFEST)}")
        seen.add(base)
        tree = BuiltTree(base)
    folders[EMBEDDINGS] = named(EMBEDDINGS, "embedder")
    if NEAR_DUPLICATES in tree.inputs:
        folders[NEAR_DUPLICATES] = named(NEAR_DUPLICATES, NEAR_DUPLICATES)
    return folders
