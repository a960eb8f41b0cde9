"""A grown pool on an existing tree: old samples keep their clusters, new ones get the nearest, drift is
told.
"""

import io
import shutil
import tarfile

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from curated_data import curate
from curated_data.cli import main
from curated_data.embedding import extract
from curated_data.errors import CacheError, ConfigError, EmbedderError, PoolError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.plan import plan
from curated_data.pipeline.recurate import recurate
from curated_data.pool import ShardPool
from tests.support.ranks import on_ranks

CONFIG = {
    "target_size": 24,
    "levels": [{"n_clusters": 10}, {"n_clusters": 3}],
    "embedding": {"num_workers": 0, "dtype": "float32"},
}


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_old_samples_stay_and_new_ones_go_to_the_nearest(write_pool, tmp_path, metric):
    shards = write_pool([30, 20, 25, 15], bad={(2, 3): b"broken"})
    config = CONFIG | {"metric": metric}
    old = curate(shards[1:3], config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "cache", "tree": old.folders["tree"]}
    grown = extend(shards, config, **place)  # new shards before and after the old ones
    np.testing.assert_array_equal(grown.tree.parent[1][30:75], old.tree.parent[1])
    np.testing.assert_array_equal(grown.tree.parent[2], old.tree.parent[2])
    new = np.r_[:30, 75:90]
    rows = np.asarray(grown.embeddings, np.float64)[new]
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances = cdist(rows, old.tree.centroids[1])
    np.testing.assert_array_equal(grown.tree.parent[1][new], distances.argmin(1))
    np.testing.assert_allclose(grown.tree.distance[new], distances.min(1), rtol=1e-4)
    assert grown.tree.parent[1][53] == -1
    assert len(grown.ids) == 24
    assert 53 not in grown.ids
    assert grown.report["drift"]["n_new"] == 45
    assert grown.report["drift"]["n_old"] == 44
    assert extend(shards, config, **place).report["cached"] == {"tree": True, "selection": True}
    np.testing.assert_array_equal(extend(shards, config, **place).ids, grown.ids)


def extend_by_rank(rank, shards, folder, config, tree):
    grown = extend(shards, config, tree=tree, embedder="pixels:4", cache_dir=folder / "cache")
    np.savez(folder / f"{rank}.npz", ids=grown.ids, parent=grown.tree.parent[1], distance=grown.tree.distance)


@pytest.mark.long
@pytest.mark.parametrize("near_duplicates", [False, True])
def test_two_ranks_extend_together(write_pool, tmp_path, near_duplicates):
    *shards, held_out = write_pool([30, 3000, 20])
    settings = {"enabled": near_duplicates, "threshold": 0.5, "held_out": [held_out]}
    config = CONFIG | {"near_duplicates": settings}
    old = curate(shards[:1], config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    tree = old.folders["tree"]
    shutil.copytree(tmp_path / "cache", tmp_path / "alone")
    on_ranks(2, extend_by_rank, shards, tmp_path, config, tree)
    alone = extend(
        shards,
        config,
        tree=tmp_path / "alone" / "tree" / tree.name,
        embedder="pixels:4",
        cache_dir=tmp_path / "alone",
    )
    assert ("removed_new" in alone.report) == near_duplicates
    if near_duplicates:
        assert 0 < alone.report["removed_new"] < 3000
    for rank in (0, 1):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_array_equal(found["parent"], alone.tree.parent[1])
        np.testing.assert_array_equal(found["distance"], alone.tree.distance)
        np.testing.assert_array_equal(found["ids"], alone.ids)


def test_drift_tells_a_new_domain_from_more_of_the_same(tmp_path, write_pool):
    from curated_data import ShardWriter
    from tests.support.images import png

    def shard(name, seed, invert):
        rng = np.random.default_rng(seed)
        with ShardWriter(str(tmp_path / f"{name}-%03d.tar")) as writer:
            for number in range(400):
                image = (rng.integers(0, 3) * 60 + rng.normal(0, 12, (8, 8, 3))).clip(0, 255).astype(np.uint8)
                image[:, :4] = 255 - image[:, :4] if invert else image[:, :4]
                writer.write({"__key__": f"{name}-{number}", "png": png(image)})
        return str(tmp_path / f"{name}-000.tar")

    base, same, other = shard("base", 0, False), shard("same", 1, False), shard("other", 2, True)
    config = CONFIG | {"levels": [{"n_clusters": 6}, {"n_clusters": 2}]}
    old = curate([base], config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "cache", "tree": old.folders["tree"]}
    more = extend([base, same], config, **place).report["drift"]
    new_domain = extend([base, other], config, **place).report["drift"]
    assert not more["rebuild_due"]
    assert more["outlying"] < 0.05
    assert 0.8 < more["distance_ratio"] < 1.3
    assert new_domain["rebuild_due"]
    assert new_domain["outlying"] > 0.5
    arguments = ["extend", base, other, "--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4"]
    settings = ["--target-size", "24", "--set", "embedding.dtype=float32", "--tree", str(old.folders["tree"])]
    assert main([*arguments, *settings]) == 0


def test_what_cannot_be_extended(write_pool, tmp_path):
    shards, cache = write_pool([30, 20]), tmp_path / "cache"
    old = curate(shards[:1], CONFIG, embedder="pixels:4", cache_dir=cache)
    place = {"cache_dir": cache, "tree": old.folders["tree"]}
    with pytest.raises(CacheError, match=old.folders["embeddings"].name):
        extend(shards, CONFIG, embedder="pixels:5", **place)
    with pytest.raises(PoolError, match=old.folders["tree"].name):
        extend(shards[1:], CONFIG, embedder="pixels:4", **place)
    with pytest.raises(CacheError, match=f"{tmp_path}: "):
        extend(shards, CONFIG, embedder="pixels:4", cache_dir=cache, tree=tmp_path)
    for folder in (old.folders["tree"] / "tree", old.folders["selection"]):  # both are sound
        with pytest.raises(CacheError, match=f"{folder}: "):
            extend(shards, CONFIG, embedder="pixels:4", cache_dir=cache, tree=folder)


def test_what_needs_no_embedding_is_checked_first(write_pool, tmp_path, monkeypatch):
    """By every command that embeds: what is wrong is said before the first sample is embedded."""
    shards, cache = write_pool([30, 20, 5]), tmp_path / "cache"
    old = curate(shards[:1], CONFIG, embedder="pixels:4", cache_dir=cache)
    other = tmp_path / "arrays.tar"
    with tarfile.open(other, "w") as archive:
        for number in range(30):
            member = tarfile.TarInfo(f"{number}.npy")
            member.size = 9
            archive.addfile(member, io.BytesIO(b"any bytes"))
    monkeypatch.setattr(extract, "_embed_shards", None)  # nothing is embedded
    largest = CONFIG | {"near_duplicates": {"enabled": True, "prefer": "largest"}}
    held_out = CONFIG | {"near_duplicates": {"enabled": True, "held_out": ["nowhere.tar"]}}
    pool = ShardPool(shards[:2])
    place = {"cache_dir": cache, "embedder": "pixels:4"}
    tree = place | {"tree": old.folders["tree"]}
    other_dtype = CONFIG | {"embedding": {"dtype": "float16"}}
    many = CONFIG | {"levels": [{"n_clusters": 100}]}
    cases = [
        (CacheError, lambda: extend(shards, CONFIG, **tree | {"embedder": "pixels:5"})),
        (CacheError, lambda: extend(shards, other_dtype, **tree)),
        (CacheError, lambda: extend(shards, CONFIG, **tree, decoders={"png": bytes})),
        (CacheError, lambda: extend(shards, CONFIG, **tree | {"tree": old.folders["selection"]})),
        (PoolError, lambda: extend(shards[1:], CONFIG, **tree)),
        (PoolError, lambda: extend(shards, held_out, **tree)),
        (ConfigError, lambda: extend(shards, CONFIG | {"target_size": 0}, **tree)),
        (ConfigError, lambda: extend(shards, CONFIG, **tree, rebuild_above="much")),
        (EmbedderError, lambda: extend(shards, CONFIG, **tree | {"embedder": "pixel"})),
        (PoolError, lambda: recurate(pool, old.config, base=old, share=0.5, **place)),
        (ConfigError, lambda: curate([other], largest, **place)),
        (ConfigError, lambda: plan([other], largest, **place)),
        (PoolError, lambda: curate(shards, held_out, **place)),
        (EmbedderError, lambda: curate(shards, CONFIG, **place | {"embedder": "pixel"})),
        (ConfigError, lambda: curate(shards[1:], many, **place)),
    ]
    for number, (error, run) in enumerate(cases):
        with pytest.raises(error) as caught:
            run()
        assert type(caught.value) is error, (number, caught.value)


def test_the_wrong_pool_is_found_even_where_the_cache_has_forgotten_its_shards(write_pool, tmp_path):
    shards, cache = write_pool([30, 20]), tmp_path / "cache"
    old = curate(shards[:1], CONFIG, embedder="pixels:4", cache_dir=cache)
    shutil.rmtree(cache / ".shards")
    place = {"embedder": "pixels:4", "cache_dir": cache, "tree": old.folders["tree"]}
    assert extend(shards, CONFIG, **place).report["drift"]["n_old"] == 30
    with pytest.raises(PoolError, match=old.folders["tree"].name):
        extend(shards[1:], CONFIG, **place)


def test_a_shard_that_is_in_the_pool_twice_keeps_both_places(write_pool, tmp_path):
    first, second = write_pool([30, 20])
    twin = shutil.copyfile(first, tmp_path / "twin.tar")
    near = CONFIG | {"near_duplicates": {"enabled": True, "threshold": 0.9999}}
    old = curate([first, twin], near, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert old.report["near_duplicates"] == 30
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "cache", "tree": old.folders["tree"]}
    grown = extend([second, first, twin], near, **place)
    np.testing.assert_array_equal(grown.tree.parent[1][20:], old.tree.parent[1])


def test_new_copies_stay_out_and_what_the_tree_holds_stays_in(write_pool, tmp_path, caplog):
    from curated_data.pipeline.reopen import reopen
    from curated_data.report.explain import explain
    from tests.support.images import png

    cache, rng = tmp_path / "cache", np.random.default_rng(7)
    first = write_pool([40], name="first")
    held_out = write_pool([3], name="held-out", seed=8)
    pictures = [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    copies = {(0, 2 + i): pictures[0] for i in range(5)} | {(0, 7): pictures[1]}
    # Of the new shard, 0 to 2 are held out, 2 to 6 then are copies of one image, 7 is one in the tree.
    second = write_pool([20], name="second", seed=8, bad=copies)
    first += write_pool([1], name="one", bad={(0, 0): pictures[1]})
    near = {"enabled": True, "threshold": 0.999}
    config = CONFIG | {"target_size": 1000, "near_duplicates": near | {"held_out": held_out}}
    old = curate(first, config, embedder="pixels:4", cache_dir=cache)
    place = {"embedder": "pixels:4", "cache_dir": cache, "tree": old.folders["tree"]}
    grown = extend(first + second, config, **place)
    assert grown.ids.tolist() == [*range(41), 43, *range(49, 61)]
    assert grown.report["near_duplicates"] == grown.report["removed_new"] == 7
    assert grown.report["excluded"] == grown.report["held_out_in_tree"] == 0
    assert extend(first + second, config, **place).report["cached"] == {
        "near_duplicates": True,
        "tree": True,
        "selection": True,
    }
    again = reopen(cache, grown.folders["selection"].name)
    assert {name: again.report[name] for name in ("near_duplicates", "excluded")} == {
        "near_duplicates": 7,
        "excluded": 0,
    }
    why = {sample: explain(again, sample)[0] for sample in (41, 44, 48)}
    assert "sample 0 of the held-out pool" in why[41]
    assert "near-duplicate of sample 43, which stayed" in why[44]
    assert "near-duplicate of sample 40, which stayed" in why[48]

    # The largest copy would stay of the whole pool: that in the tree does, though the new one is larger.
    larger = write_pool([2], name="larger", bad={(0, 0): _enlarged(pictures[1])}, seed=3)
    largest = config | {"near_duplicates": near | {"prefer": "largest"}}
    assert extend(first + larger, largest, **place).ids.tolist() == [*range(41), 42]

    # Images that were held out later cannot leave the tree, which is told.
    caplog.clear()
    later = config | {"near_duplicates": near | {"held_out": first[1:]}}
    grown = extend(first + second, later, **place)
    assert grown.report["held_out_in_tree"] == 1
    assert 40 in grown.ids
    assert 48 not in grown.ids
    assert "1 samples of the tree are copies of held-out ones, and stay in it" in caplog.text
    # And a tree without near-duplicates, extended without looking for them, is told of.
    assert len(extend(first + second, CONFIG | {"target_size": 1000}, **place).ids) == 61
    assert "near_duplicates is not enabled, though the tree was built without" in caplog.text


def test_what_was_removed_comes_back_if_nothing_that_it_copies_is_left(write_pool, tmp_path):
    """The originals' shard has left the pool: one copy of each stays, the others are near a kept one."""
    from curated_data.selection.removed import Removed
    from tests.support.images import png

    cache, rng = tmp_path / "cache", np.random.default_rng(77)
    pictures = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
    first = write_pool([12], name="first", bad={(0, i): png(p) for i, p in enumerate(pictures)}, seed=1)
    # Each picture twice more, slightly changed, and the last copy of the fourth in a third shard.
    changed = [png(p ^ (rng.random(p.shape) < 0.5)) for p in pictures]
    second = write_pool([20], name="second", bad={(0, i): changed[i // 2] for i in range(8)}, seed=2)
    third = write_pool([6], name="third", bad={(0, 0): changed[3]}, seed=3)
    config = CONFIG | {"target_size": 1000, "near_duplicates": {"enabled": True, "threshold": 0.999}}
    old = curate(first + second, config, embedder="pixels:4", cache_dir=cache)
    assert old.report["near_duplicates"] == 8
    place = {"embedder": "pixels:4", "cache_dir": cache, "tree": old.folders["tree"]}
    grown = extend(second + third, config, **place)
    assert grown.report["readmitted"] == 4
    assert grown.report["removed_new"] == 1
    removed = Removed.load(grown.folders["near_duplicates"])
    x = grown.embeddings.as_array(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    out = np.flatnonzero(~removed.keep)
    assert len(out) == 5
    assert removed.keep[removed.near[out]].all()
    assert ((unit[out] * unit[removed.near[out]]).sum(axis=1) >= 0.999).all()
    cosine = unit[removed.keep] @ unit[removed.keep].T
    assert (cosine >= 0.999).sum() == len(cosine)
    assert set(grown.ids) == set(np.flatnonzero(removed.keep))
    # With the originals still there, all of them stay out.
    assert extend(first + second + third, config, **place).report["readmitted"] == 0


def _enlarged(content):
    import io

    from PIL import Image

    from tests.support.images import png

    return png(np.kron(np.asarray(Image.open(io.BytesIO(content))), np.ones((2, 2, 1), np.uint8)))


def test_another_limit_is_heeded_where_the_tree_is_cached(write_pool, tmp_path):
    shards, cache = write_pool([30, 20]), tmp_path / "cache"
    old = curate(shards[:1], CONFIG, embedder="pixels:4", cache_dir=cache)
    place = {"embedder": "pixels:4", "cache_dir": cache, "tree": old.folders["tree"]}
    first = extend(shards, CONFIG, **place, rebuild_above=1.0).report["drift"]
    assert first["outlying"] > 0
    assert not first["rebuild_due"]
    second = extend(shards, CONFIG, **place, rebuild_above=first["outlying"] / 2).report
    assert second["cached"]["tree"]
    assert second["drift"] == first | {"rebuild_due": True}
