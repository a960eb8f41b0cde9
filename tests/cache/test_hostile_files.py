"""No name in a file of the cache leads out of it."""

import contextlib
import json
import re

import numpy as np
import pytest
import torch

from curated_data import ShardPool, curate
from curated_data.cache.artifacts import MANIFEST, read_manifest, with_checksum
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import CacheError, CuratedDataError
from curated_data.pipeline.inspect import inspect_cache, verify_cache
from curated_data.pipeline.reopen import reopen, selections
from tests.support.forging import forge
from tests.support.guard import Guard


def everything(shards, cache, config, selection, name) -> None:
    """Everything that reads the cache; an error is one of ours."""
    reads = [
        lambda: curate(shards, config, embedder="pixels:2", cache_dir=cache),
        lambda: reopen(cache, selection),
        lambda: reopen(cache, name),
        lambda: selections(cache),
        lambda: inspect_cache(cache),
        lambda: verify_cache(cache),
        lambda: len(ShardPool(shards, cache_dir=cache)),
    ]
    for read in reads:
        with contextlib.suppress(CuratedDataError):
            read()


FIELDS = {
    "tree/*/manifest.json": [
        ("inputs", "embedder"),
        ("inputs", "near_duplicates"),
        ("inputs",),
        ("settings",),
    ],
    "tree/*/tree/manifest.json": [("n_levels",), ("distance",), ("files",)],
    "selection/*/manifest.json": [("inputs", "tree"), ("inputs",), ("report",), ("settings",), ("files",)],
    "near_duplicates/*/manifest.json": [("files",), ("inputs",)],
    "pool/*/manifest.json": [("files",), ("shards",), ("extensions",)],
    "index/*/manifest.json": [("files",), ("extensions",)],
    "embeddings/*/*.json": [("file",), ("failures",), ("samples",)],
    "cache.json": [("format",)],
}
PLACES = [(pattern, keys) for pattern, fields in FIELDS.items() for keys in fields]


@pytest.mark.long
@pytest.mark.parametrize(("pattern", "keys"), PLACES)
def test_no_name_in_a_file_leads_out_of_the_cache(place, pattern, keys, monkeypatch):
    shards, cache, config, selection = place
    (path, *_) = sorted(cache.glob(pattern))
    content = path.read_text()
    guard = Guard(cache, monkeypatch)
    for name in [
        "/",
        "..",
        "../../victim",
        str(cache.parent / "victim"),
        "",
        "\0",
        3,
        None,
        ["/"],
        {"..": 1},
    ]:
        is_of_files = keys == ("files",)

        def change(found, name=name, is_of_files=is_of_files):
            inner = found
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = {str(name): {"bytes": 13, "crc32": 0}} if is_of_files else name
            return found

        forge(path, change)
        everything(shards, cache, config, selection, name)
        assert guard.outside == []
        if not path.exists():
            break
        path.write_text(content)


def test_a_manifest_whose_names_climb_is_damaged(tmp_path):
    for name in ("..", ".", "", "/etc/passwd", "../x", "a/b", "\0"):
        content = {"stage": "tree", "format": 1, "files": {name: {"bytes": 3, "crc32": 0}}}
        (tmp_path / MANIFEST).write_text(json.dumps(with_checksum(content)))
        with pytest.raises(CacheError, match=rf"manifest\.json: .*{re.escape(repr(name))}"):
            read_manifest(tmp_path, "tree")
    for seal in (None, 3, "x", {}, {"bytes": "3", "crc32": 0}, {"bytes": 3}, {"bytes": True, "crc32": 0}, []):
        content = {"stage": "tree", "format": 1, "files": {"a.npy": seal}}
        (tmp_path / MANIFEST).write_text(json.dumps(with_checksum(content)))
        with pytest.raises(CacheError, match=rf"manifest\.json: .*'a\.npy': {re.escape(repr(seal))}"):
            read_manifest(tmp_path, "tree")


def test_a_store_of_odd_shards_is_damaged(place):
    _, cache, _, selection = place
    (tree,) = (cache / "tree").glob("[!.]*")
    for name in (b"../../victim", b"/etc/passwd", b"..", b"", b"\xff"):
        forge(tree / "shards.npy", lambda _, name=name: np.array([name, b"x"], "S20"))
        with pytest.raises(CacheError, match=f"{tree.name}/manifest.json: .*shards"):
            reopen(cache, selection)


def test_a_loaded_store_names_its_shards_files(place):
    _, cache, _, _ = place
    (folder,) = (cache / "embeddings").glob("[!.]*")
    shards = sorted(path.stem for path in folder.glob("*.json"))
    store = EmbeddingStore(folder, shards, 12, "float16")
    assert torch.isfinite(torch.from_numpy(store.as_array())).all()
    forge(folder / f"{shards[0]}.json", lambda found: found | {"failures": [{"place": 99}]})
    for table in (folder / ".pools").glob("*"):
        table.unlink()
    with pytest.raises(CacheError, match=rf"{shards[0]}\.json: .*failures"):
        EmbeddingStore(folder, shards, 12, "float16")
