"""Artifacts whose checksums were made to fit: arrays and values that no run writes are one error, too."""

import json
import shutil

import numpy as np
import pytest
import torch

from curated_data import curate
from curated_data.cache.artifacts import MANIFEST, with_checksum
from curated_data.cache.removal import shown
from curated_data.errors import CacheError, PoolError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.inspect import verify_cache
from curated_data.pipeline.reopen import reopen
from curated_data.pool import ShardPool
from curated_data.selection.removed import Removed
from curated_data.training.recuration_state import checked_state
from tests.support.forging import forge

CONFIG = {
    "target_size": 12,
    "levels": [{"n_clusters": 6}, {"n_clusters": 2}],
    "embedding": {"num_workers": 0, "dtype": "float32"},
    "near_duplicates": {"enabled": True, "threshold": 0.99},
}


@pytest.fixture
def whole(write_pool, tmp_path):
    shards = write_pool([15, 15])
    curation = curate(shards[:2], CONFIG, embedder="pixels:4", cache_dir=tmp_path / "cache")
    return shards, tmp_path / "cache", curation.folders


ARRAYS = {
    "empty": lambda array: array[:0],
    "deeper": lambda array: array[None],
    "a number": lambda array: array.reshape(-1)[0],
    "of text": lambda array: np.array(["a", "b"]),
    "longer": lambda array: np.concatenate([array, array]),
    "of another type": lambda array: array.astype("S9" if array.dtype.kind == "S" else np.int16),
}


@pytest.mark.long
@pytest.mark.parametrize("change", ARRAYS)
@pytest.mark.parametrize(
    ("stage", "name"),
    [("selection", "ids.npy"), ("near_duplicates", "keep.npy"), ("tree", "shard_ranges.npy")],
)
def test_an_array_of_another_form_is_one_error(whole, stage, name, change):
    shards, cache, folders = whole
    forge(folders[stage] / name, ARRAYS[change])
    if stage == "near_duplicates":
        shutil.rmtree(cache / "tree")
    run, options = (extend, {"tree": folders["tree"]}) if stage == "tree" else (curate, {})
    with pytest.raises(CacheError, match=name):
        run(shards, CONFIG, embedder="pixels:4", cache_dir=cache, **options)


@pytest.mark.parametrize("name", ["near.npy", "cosine.npy", "keep.npy"])
def test_why_a_sample_was_left_out_is_read_from_arrays_that_fit(whole, name):
    folder = whole[2]["near_duplicates"]
    forge(folder / name, lambda array: array[:3])
    with pytest.raises(CacheError, match=f"{folder.name}/.*npy: "):
        Removed.load(folder)


@pytest.mark.parametrize("ranges", [[0, 15, 29], [1, 15, 30], [0, 40, 30], [0, 14, 30], [-5, 15, 30]])
def test_ranges_of_shards_fit_the_tree_and_the_pool(whole, ranges):
    shards, cache, folders = whole
    forge(folders["tree"] / "shard_ranges.npy", lambda _: np.array(ranges))
    with pytest.raises(CacheError, match="shard_ranges"):
        extend(shards, CONFIG, tree=folders["tree"], embedder="pixels:4", cache_dir=cache)


VALUES = [None, -1, "3", 1.5, True, [], 10**30, "\0"]


@pytest.mark.parametrize("field", ["n_samples", "n_members", "n_key_bytes", "n_bytes", "url", "extensions"])
def test_the_index_of_a_shard_has_fields_of_the_right_kind(whole, field):
    shards, cache, _ = whole
    shutil.rmtree(cache / "pool")
    (folder, *_) = sorted(path for path in (cache / "index").iterdir() if path.name[0] != ".")
    before = json.loads((folder / "manifest.json").read_text())
    for value in [*VALUES, "missing"]:
        content = {name: item for name, item in before.items() if name not in ("seal", field)}
        if value != "missing":
            content[field] = value
        elif field in ("url", "extensions"):
            continue
        if field == "url" and isinstance(value, str):
            continue
        if field == "extensions" and value == []:
            content[field] = ["png", "png"]
        (folder / "manifest.json").write_text(json.dumps(with_checksum(content)))
        with pytest.raises(CacheError, match=f"{folder.name}/.*{field}"):
            len(ShardPool(shards, cache_dir=cache))


@pytest.mark.parametrize("extension", ["/", "a/b", "PNG", "__key__", "\ud800"])
@pytest.mark.parametrize("stage", ["index", "pool"])
def test_an_index_has_extensions_that_members_can_have(whole, stage, extension):
    shards, cache, _ = whole
    if stage == "index":
        shutil.rmtree(cache / "pool")
    (folder, *_) = sorted(path for path in (cache / stage).iterdir() if path.name[0] != ".")
    forge(folder / MANIFEST, lambda found: found | {"extensions": [extension, *found["extensions"][1:]]})
    with pytest.raises(CacheError, match=f"{folder.name}/manifest.json: "):
        len(ShardPool(shards, cache_dir=cache))


@pytest.mark.parametrize("field", ["n_samples", "n_members", "n_key_bytes"])
def test_no_room_is_made_for_more_than_the_arrays_of_a_shard_can_hold(whole, field):
    """A length of a manifest is not trusted: 17 GB would be written for it."""
    shards, cache, _ = whole
    shutil.rmtree(cache / "pool")
    (folder, *_) = sorted(path for path in (cache / "index").iterdir() if path.name[0] != ".")
    forge(folder / MANIFEST, lambda manifest: manifest | {field: 1 << 31})
    with pytest.raises(CacheError, match=f"{folder.name}/.*{field}"):
        len(ShardPool(shards, cache_dir=cache))


def test_a_link_that_leads_nowhere_is_no_shard_to_pass_over(write_pool, tmp_path):
    shards = write_pool([3, 3])
    (tmp_path / "pool-001.tar").rename(tmp_path / "moved")
    (tmp_path / "pool-001.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PoolError, match=r"pool-001\.tar"):
        ShardPool(str(tmp_path / "pool-*.tar"))
    (tmp_path / "pool-001.tar").unlink()
    (tmp_path / "pool-001.tar").symlink_to(tmp_path / "moved")
    (tmp_path / "pool-002.tar").mkdir()  # folders match patterns by chance
    assert ShardPool(str(tmp_path / "pool-*.tar")).urls == shards


def test_a_value_is_shown_on_one_line():
    for value in (torch.ones(3, 2), np.ones((3, 2)), "a\nb", {"a": torch.ones(40, 2)}):
        assert "\n" not in shown(value)
    state = {"n_recurations": 1, "last_step": 0, "epochs_without_gain": 0, "best": None, "unfinished": None}
    with pytest.raises(CacheError) as caught:
        checked_state(state | {"artifacts": [], "selection": torch.ones(2, 2)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", [{}, None, [], {"embedder": [1]}, {"embedder": "../x"}])
def test_what_a_tree_was_built_over_is_checked_before_it_is_extended(whole, inputs):
    shards, cache, folders = whole
    forge(folders["tree"] / MANIFEST, lambda manifest: manifest | {"inputs": inputs})
    with pytest.raises(CacheError, match=folders["tree"].name):
        extend(shards, CONFIG, tree=folders["tree"], embedder="pixels:4", cache_dir=cache)


@pytest.mark.parametrize("drift", [None, {}, {"n_new": 1}, {"a": 1}, "x"])
def test_the_drift_of_an_extension_is_checked(whole, drift):
    shards, cache, folders = whole
    run = {"tree": folders["tree"], "embedder": "pixels:4", "cache_dir": cache}
    grown = extend(shards, CONFIG, **run).folders["tree"]
    forge(grown / MANIFEST, lambda manifest: manifest | {"drift": drift})
    with pytest.raises(CacheError, match=grown.name):
        extend(shards, CONFIG, **run)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["index", "pool", "near_duplicates", "tree", "tree/*/tree", "selection"])
@pytest.mark.parametrize("damage", ["gone", "loop", "unsealed", "another format", "no files"])
def test_verification_names_an_artifact_without_its_manifest(whole, stage, damage):
    _, cache, _ = whole
    pattern = "tree/[!.]*/tree" if "*" in stage else f"{stage}/[!.]*"
    path = sorted(cache.glob(pattern))[0] / "manifest.json"
    assert verify_cache(cache) == []
    content = json.loads(path.read_text())
    path.unlink()
    if damage == "loop":
        path.symlink_to(path)
    elif damage == "unsealed":
        path.write_text('{"format": 1}')
    elif damage == "another format":
        path.write_text(json.dumps(content | {"format": ".."}))
    elif damage == "no files":
        path.write_text(
            json.dumps(with_checksum({k: v for k, v in content.items() if k not in ("files", "seal")}))
        )
    assert any(path.parent.name in problem for problem in verify_cache(cache))


@pytest.mark.parametrize("value", [-1, 30, 1 << 40])
def test_a_selection_holds_ids_of_the_pool(whole, value):
    shards, cache, folders = whole
    forge(folders["selection"] / "ids.npy", lambda ids: np.where(np.arange(len(ids)) == 3, value, ids))
    with pytest.raises(CacheError, match=r"ids\.npy"):
        curate(shards, CONFIG, embedder="pixels:4", cache_dir=cache)
    with pytest.raises(CacheError, match=r"ids\.npy"):
        reopen(cache, folders["selection"].name)


def test_embeddings_that_are_one_number_are_named_when_reopened(whole):
    _, cache, folders = whole
    for path in folders["embeddings"].glob("*.npy"):
        np.save(path, np.float32(1))
    with pytest.raises(CacheError, match=path.parent.name):
        reopen(cache, folders["selection"].name)
