"""What a filter drops before the embedding is not embedded, and all else is as if it had been."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from curated_data import ShardPool, ShardWriter, curate
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import ModuleEmbedder, embed_pool
from curated_data.errors import CacheError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.inspect import inspect_cache, verify_cache
from curated_data.pipeline.plan import plan
from curated_data.pipeline.reopen import reopen
from tests.support.counting import Counting, as_float
from tests.support.ranks import on_two_ranks

SHARDS = [7, 0, 5, 9]
BAD = {(0, 2): b"?", (3, 1): b"?", (3, 8): b"?"}
N = sum(SHARDS)


@pytest.fixture
def network():
    return Counting()


def named(network):
    return ModuleEmbedder(network, as_float, dimension=3, name="mean colours")


def embedded(pool, network, root, keep=None, **how):
    """The store, and how many images the network saw."""
    before = network.seen
    how = {"batch_size": 2, "num_workers": 0, "dtype": "float32"} | how
    store = embed_pool(pool, named(network), root, keep=keep, **how)
    return store, network.seen - before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=1, max_size=4),
    batch_size=st.integers(1, 9),
    moves=st.booleans(),
)
def test_filters_share_their_rows_and_give_those_of_the_whole_pool(
    masks, batch_size, moves, write_pool, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("pool")
    shards = write_pool(SHARDS, bad=BAD)
    network = Counting()
    whole, _ = embedded(ShardPool(shards), network, open_cache(folder / "whole"))
    root, known = open_cache(folder / "cache"), ~whole.valid  # a bad image never gets to the network
    for turn, mask in enumerate([*masks, [True] * N]):
        keep = np.array(mask)
        if moves and turn:
            shards = [shutil.copy(path, folder / f"{turn}-{place}.tar") for place, path in enumerate(shards)]
        store, seen = embedded(ShardPool(shards, cache_dir=root), network, root, keep, batch_size=batch_size)
        assert seen == (keep & ~known).sum()
        known |= keep
        np.testing.assert_array_equal(store.valid, whole.valid & keep)
        np.testing.assert_array_equal(store.as_array()[store.valid], whole.as_array()[store.valid])
        expected = [failure for failure in whole.iterate_failures() if keep[failure["id"]]]
        assert [f["id"] for f in store.iterate_failures()] == [f["id"] for f in expected]
        assert [f["reason"].partition("sample")[2] for f in store.iterate_failures()] == [
            f["reason"].partition("sample")[2] for f in expected
        ]
        assert store.n_failures == len(expected)
        assert store.shard_fingerprints == whole.shard_fingerprints
        store.verify()
        again, seen = embedded(ShardPool(shards, cache_dir=root), network, root, keep)
        assert seen == 0
        assert again.files == store.files
    plain, seen = embedded(ShardPool(shards, cache_dir=root), network, root)
    assert seen == 0
    np.testing.assert_array_equal(plain.as_array(), whole.as_array())
    assert verify_cache(root) == []


def test_in_workers(write_pool, tmp_path, network):
    pool = ShardPool(write_pool(SHARDS, bad=BAD))
    keep = np.arange(N) % 3 == 0
    whole, _ = embedded(pool, network, open_cache(tmp_path / "whole"))
    store, seen = embedded(pool, network, open_cache(tmp_path / "part"), keep, num_workers=2)
    assert seen == (whole.valid & keep).sum()
    np.testing.assert_array_equal(store.as_array()[store.valid], whole.as_array()[whole.valid & keep])


@pytest.fixture
def scored(tmp_path):
    """120 images of noise in three shards, with a score in their JSON."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "pool" / "%06d.tar", max_samples=40) as writer:
        for i in range(120):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8)
            writer.write({"__key__": f"{i:04d}", "png": Image.fromarray(image), "json": {"score": i % 10}})
    return sorted(map(str, (tmp_path / "pool").glob("*.tar")))


CONFIG = {"target_size": 20, "levels": [{"n_clusters": 6}], "where": "json.score >= 6"}
KEPT = np.arange(120) % 10 >= 6


def test_a_curation_embeds_what_its_filter_keeps(scored, network, tmp_path, caplog):
    where = {"cache_dir": tmp_path / "cache", "embedder": named(network)}
    with caplog.at_level("INFO"):
        found = curate(scored, CONFIG, **where)
    assert network.seen == 48
    assert "48 of 120 samples" in caplog.text
    assert found.report["filters"]["dropped"] == 72

    curate(scored, CONFIG | {"where": None}, cache_dir=tmp_path / "whole", embedder=where["embedder"])
    seen = network.seen
    after = curate(scored, CONFIG, cache_dir=tmp_path / "whole", embedder=where["embedder"])
    assert network.seen == seen
    np.testing.assert_array_equal(after.ids, found.ids)
    np.testing.assert_array_equal(after.tree.parent[1], found.tree.parent[1])
    timeless = {"seconds": 0, "cached": 0}
    assert after.report | timeless == found.report | timeless
    assert {stage: folder.name for stage, folder in after.folders.items()} == {
        stage: folder.name for stage, folder in found.folders.items()
    }

    again = reopen(tmp_path / "cache", found.folders["selection"].name)
    np.testing.assert_array_equal(again.embeddings.valid, KEPT)
    np.testing.assert_array_equal(again.embeddings[found.ids], after.embeddings[found.ids])


def test_a_plan_counts_what_is_left_to_embed(scored, network, tmp_path):
    where = {"cache_dir": tmp_path / "cache", "embedder": named(network)}
    assert "48 samples to embed" in plan(scored, CONFIG, **where, n_probe=8).stages[0].note
    curate(scored, CONFIG, **where)
    assert plan(scored, CONFIG, **where, n_probe=8).stages[0].cached
    looser = plan(scored, CONFIG | {"where": "json.score >= 5"}, **where, n_probe=8)
    assert "12 samples to embed" in looser.stages[0].note
    assert looser.filters["dropped"] == 60


def test_a_grown_pool_embeds_what_its_filter_keeps(scored, network, tmp_path):
    where = {"cache_dir": tmp_path / "cache", "embedder": named(network)}
    first = curate(scored[:2], CONFIG, **where)
    assert network.seen == 32
    tree = first.folders["tree"]
    grown = extend(scored, CONFIG | {"where": "json.score >= 5"}, tree=tree, **where)
    assert network.seen == 60
    assert (grown.tree.parent[1] >= 0).tolist() == (np.arange(120) % 10 >= 5).tolist()


def test_a_cache_says_what_it_holds(scored, network, tmp_path):
    where = {"cache_dir": tmp_path / "cache", "embedder": named(network)}
    for least in (6, 5, 4):
        curate(scored, CONFIG | {"where": f"json.score >= {least}"}, **where)
    found = next(item for item in inspect_cache(tmp_path / "cache") if item.stage == "embeddings")
    assert (found.details["shards"], found.details["samples"]) == (3, 120)


@pytest.mark.parametrize("bits", ["", "zz" * 5, "ff" * 4, 7])
def test_damaged_details_are_named(bits, write_pool, network, tmp_path):
    pool, root = ShardPool(write_pool([40])), open_cache(tmp_path / "cache")
    keep = np.arange(40) < 20
    store, _ = embedded(pool, network, root, keep)
    path = store.folder / f"{store.files[0]}.json"
    details = json.loads(path.read_text())
    path.write_text(json.dumps({key: details[key] for key in details if key != "crc32"} | {"embedded": bits}))
    with pytest.raises(CacheError, match=str(path)):
        embedded(pool, network, root, ~keep)


def test_held_out_sets_are_embedded_whole(scored, network, tmp_path):
    with ShardWriter(tmp_path / "out" / "%06d.tar") as writer:
        for i in range(5):
            writer.write({"__key__": f"{i}", "png": Image.new("RGB", (8, 8), (40 * i + 9, 0, 0))})
    held_out = {"enabled": True, "threshold": 0.999999, "held_out": [str(tmp_path / "out" / "*.tar")]}
    config = CONFIG | {"near_duplicates": held_out}
    curate(scored, config, embedder=named(network), cache_dir=tmp_path / "cache")
    assert network.seen == 53


def _on_rank(rank, shards, folder):
    network = Counting()
    config = CONFIG | {"embedding": {"num_workers": 0}}  # in these processes
    found = curate(shards, config, embedder=named(network), cache_dir=folder)
    return network.seen, found.ids, found.tree.parent[1], found.report["filters"]


@pytest.mark.long
def test_two_ranks_embed_what_is_kept_once(scored, network, tmp_path):
    results = on_two_ranks(_on_rank, scored, tmp_path / "two")
    alone = curate(scored, CONFIG, embedder=named(network), cache_dir=tmp_path / "one")
    assert sum(result[0] for result in results) == network.seen == 48
    for _, ids, parent, filters in results:
        np.testing.assert_array_equal(ids, alone.ids)
        np.testing.assert_array_equal(parent, alone.tree.parent[1])
        assert filters == alone.report["filters"]


@pytest.mark.parametrize("kept", [[], [0, 1, 2], [5], list(range(12))])
def test_a_shard_twice_in_a_pool_is_filtered_twice(kept, write_pool, network, tmp_path):
    (path,) = write_pool([12])
    other = shutil.copy(path, tmp_path / "copy.tar")
    pool, root = ShardPool([path, other]), open_cache(tmp_path / "cache")
    keep = np.zeros(24, bool)
    keep[kept] = keep[20:] = True
    store, _ = embedded(pool, network, root, keep)
    np.testing.assert_array_equal(store.valid, keep)
    whole, _ = embedded(pool, network, open_cache(tmp_path / "whole"))
    np.testing.assert_array_equal(store.as_array()[keep], whole.as_array()[keep])
