"""The walk from pool to selection: what is redone when, who may run at once, and what stops it."""

import dataclasses
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from curated_data import ClusterTree, CurationConfig, Level, ShardPool, curate
from curated_data.clustering import choose_levels
from curated_data.embedding import ModuleEmbedder
from curated_data.errors import CacheError, ConfigError, PoolError
from curated_data.pipeline.reopen import reopen
from curated_data.report.explain import explain
from curated_data.selection.removed import Removed
from curated_data.selection.sampling import hierarchical_sample
from curated_data.selection.sparse import find_neighbours, sparse_sample
from tests.support.ranks import on_ranks

LEVELS = [{"n_clusters": 12, "n_resamples": 2, "sample_size": 3}, {"n_clusters": 4}]
CONFIG = {
    "target_size": 20,
    "levels": LEVELS,
    "embedding": {"num_workers": 0, "dtype": "float32", "batch_size": 16},
}


def run(pool, cache, **changes):
    return curate(pool, {**CONFIG, **changes}, embedder="pixels:4", cache_dir=cache)


def test_a_second_call_is_a_look_up_and_changes_redo_what_depends_on_them(write_pool, tmp_path):
    shards, cache = write_pool([30, 25]), tmp_path / "cache"
    first = run(shards, cache)
    assert first.report["cached"] == {"tree": False, "selection": False}
    assert len(first.ids) == len(set(first.ids)) == 20
    assert first.ids.dtype == np.int64

    again = run(shards, cache)
    assert again.report["cached"] == {"tree": True, "selection": True}
    np.testing.assert_array_equal(again.ids, first.ids)

    larger = run(shards, cache, target_size=40)
    assert larger.report["cached"] == {"tree": True, "selection": False}
    assert len(larger.ids) == 40

    coarser = run(shards, cache, levels=LEVELS[:1])
    assert coarser.report["cached"] == {"tree": False, "selection": False}
    assert coarser.folders["embeddings"] == first.folders["embeddings"]

    other_seed = run(shards, cache, seed=1)
    assert other_seed.report["cached"] == {"tree": False, "selection": False}
    assert not np.array_equal(other_seed.ids, first.ids)

    repeats = run(shards, cache, target_size=100, max_repeats=2)
    assert len(repeats.ids) == 100
    assert np.unique(repeats.ids, return_counts=True)[1].max() == 2


# What each setting determines: the first stage that is done again where it changes.
REDONE = {
    "target_size": (25, "selection"),
    "preset": ("paper", None),  # with levels that are given
    "levels": (LEVELS[:1], "tree"),
    "strategy": ("closest", "selection"),
    "sampling": ("flat", "selection"),
    "max_repeats": (2, "selection"),
    "nested_sizes": ([5], "selection"),
    "quotas.temperature": (0.5, "selection"),
    "quotas.cap": (9, "selection"),
    "quotas.weights": ({2: 0.5}, "selection"),
    "quotas.level": (2, "selection"),
    "retrieval.seeds": ({"mine": None}, "selection"),
    # These change nothing where there are no seeds.
    "retrieval.method": ("clusters", None),
    "retrieval.n": (3, None),
    "retrieval.least": (0.5, None),
    "retrieval.level": (2, None),
    "retrieval.least_seeds": (2, None),
    "retrieval.per_cluster": (7, None),
    "retrieval.limit": (5, None),
    "retrieval.weights": ({}, None),
    "retrieval.fill": (False, None),
    "resample": ("random", "tree"),
    "metric": ("cosine", "tree"),
    "init": ("random", "tree"),
    "n_init": (2, "tree"),
    "n_iter": (40, "tree"),
    "tol": (1e-3, "tree"),
    "seed": (1, "tree"),
    "max_memory_gb": (1.0, None),
    "where": ("id > 0", "near_duplicates"),
    "exclude": ([0], "near_duplicates"),
    "include": ([0], "selection"),
    "embedding.batch_size": (8, None),
    "embedding.num_workers": (1, None),
    "embedding.multiprocessing_context": ("fork", None),
    "embedding.dtype": ("float16", "embeddings"),
    "embedding.precision": ("32", "embeddings"),
    "near_duplicates.enabled": (False, "tree"),
    "near_duplicates.threshold": (0.98, "near_duplicates"),
    "near_duplicates.n_neighbours": (5, "near_duplicates"),
    "near_duplicates.prefer": ("largest", "near_duplicates"),
    "near_duplicates.held_out": (None, "near_duplicates"),
}
STAGES = ("embeddings", "near_duplicates", "tree", "selection")


def _all_settings():
    from curated_data.config import EmbeddingConfig, NearDuplicateConfig, QuotaConfig, RetrievalConfig

    sections = {
        "embedding": EmbeddingConfig,
        "near_duplicates": NearDuplicateConfig,
        "quotas": QuotaConfig,
        "retrieval": RetrievalConfig,
    }
    for item in dataclasses.fields(CurationConfig):
        inner = dataclasses.fields(sections[item.name]) if item.name in sections else ()
        yield from (f"{item.name}.{one.name}" for one in inner) if inner else (item.name,)


def test_each_setting_redoes_what_it_determines_and_nothing_else(write_pool, tmp_path):
    assert set(REDONE) == set(_all_settings()), "a new setting must say what it determines"
    shards, held_out = write_pool([30]), write_pool([3], name="held-out", seed=9)
    near_duplicates = {"enabled": True, "threshold": 0.99}
    base = {**CONFIG, "near_duplicates": near_duplicates, "max_memory_gb": 2.0, "target_size": 20}

    def stages(config, pool=shards):
        folders = curate(pool, config, embedder="pixels:4", cache_dir=tmp_path / "cache").folders
        return {name: folders[name] for name in STAGES if name in folders}

    before = stages(base)
    for setting, (value, first) in REDONE.items():
        section, _, field = setting.rpartition(".")
        value = {"held_out": held_out, "seeds": {"mine": held_out}}.get(field, value)
        whole = {**base.get(section, {}), field: value} if section else value
        changed = {**base, section or field: whole}
        after = stages(changed)
        redone = [name for name in STAGES if after.get(name) != before[name]]
        expected = list(STAGES[STAGES.index(first) :]) if first else []
        if setting == "near_duplicates.enabled":
            expected = ["near_duplicates", "tree", "selection"]
        assert redone == expected, setting


def test_the_same_settings_and_pool_in_other_words_are_the_same_run(write_pool, tmp_path, monkeypatch):
    """Whole numbers for real ones, numpy's, another order of fields, other spellings of the shards' paths."""
    shards, cache = write_pool([30, 25]), tmp_path / "cache"
    first = run(shards, cache)
    monkeypatch.chdir(tmp_path)
    forms = [
        (CONFIG, [os.path.basename(shard) for shard in shards]),
        (CONFIG, [tmp_path / ".." / tmp_path.name / os.path.basename(shard) for shard in shards]),
        (dict(reversed(CONFIG.items())), shards),
        ({**CONFIG, "target_size": np.int32(20), "tol": np.float64(1e-4), "max_memory_gb": 8}, shards),
        (CurationConfig(**{**CONFIG, "levels": [Level(**level) for level in LEVELS]}), shards),
    ]
    for config, pool in forms:
        found = curate(pool, config, embedder="pixels:4", cache_dir=cache)
        assert found.report["cached"] == {"tree": True, "selection": True}
        assert found.folders == first.folders


def test_shards_that_moved_or_were_touched_are_the_same_shards(write_pool, tmp_path):
    """A shard is told by what it contains."""
    shards, cache = write_pool([30, 25]), tmp_path / "cache"
    first = run(shards, cache)
    os.utime(shards[0], (1, 1))
    touched = run(shards, cache)
    (tmp_path / "moved").mkdir()
    moved = run([shutil.copy(shard, tmp_path / "moved") for shard in shards], cache)
    for found in (touched, moved):
        assert found.report["cached"] == {"tree": True, "selection": True}
        assert found.folders == first.folders
        np.testing.assert_array_equal(found.ids, first.ids)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_batches_and_workers_leave_the_embeddings_as_they_are(write_pool, tmp_path, dtype):
    """Workers: bit for bit. Batches: as close as the arithmetic of another batch size is."""
    shards = write_pool([30, 25])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 36, 64)
        )
    embedder = ModuleEmbedder(network, lambda image: image.float() / 255, dimension=64)

    def rows(batch_size, num_workers):
        settings = {"batch_size": batch_size, "num_workers": num_workers, "dtype": dtype}
        cache = tmp_path / f"cache-{batch_size}-{num_workers}"
        found = curate(shards, {**CONFIG, "embedding": settings}, embedder=embedder, cache_dir=cache)
        return np.asarray(found.embeddings)

    reference = rows(16, 0)
    np.testing.assert_array_equal(rows(16, 2), reference)
    np.testing.assert_allclose(rows(5, 0), reference, rtol=2e-3 if dtype == "float16" else 1e-4, atol=1e-4)


def test_a_grown_pool_embeds_only_its_new_shard(write_pool, tmp_path):
    shards, cache = write_pool([20, 20, 20]), tmp_path / "cache"
    first = run(shards[:2], cache)
    before = {path.name: path.stat().st_mtime_ns for path in first.folders["embeddings"].glob("*.npy")}
    grown = run(shards, cache)
    after = {path.name: path.stat().st_mtime_ns for path in grown.folders["embeddings"].glob("*.npy")}
    assert len(before) == 2
    assert len(after) == 3
    assert before.items() <= after.items()
    assert grown.report["samples"] == 60
    assert not grown.report["cached"]["tree"]


def test_the_artifacts_are_what_the_functions_give(write_pool, tmp_path):
    from curated_data import hierarchical_kmeans, hierarchical_sample

    found = run(write_pool([30, 25]), tmp_path / "cache")
    levels = [Level(**level) for level in LEVELS]
    tree = hierarchical_kmeans(np.asarray(found.embeddings), levels)
    for level in (1, 2):
        np.testing.assert_array_equal(tree.parent[level], found.tree.parent[level])
        np.testing.assert_allclose(tree.centroids[level], found.tree.centroids[level], rtol=1e-6)
    np.testing.assert_array_equal(hierarchical_sample(tree, 20), found.ids)
    loaded = ClusterTree.load(found.folders["tree"] / "tree")
    np.testing.assert_array_equal(loaded.parent[1], found.tree.parent[1])
    assert not found.tree.parent[1].flags.owndata  # on disk: the ranks of a machine share one


def test_undecodable_samples_and_copies_are_never_selected(write_pool, tmp_path):
    from tests.support.images import png

    same = png(np.full((8, 8, 3), (250, 3, 3), np.uint8))
    bad = {(0, 3): b"broken", (1, 4): b""} | {(1, place): same for place in (10, 11, 12)}
    found = run(
        write_pool([20, 20], bad=bad), tmp_path / "cache", target_size=40,
        near_duplicates={"enabled": True, "threshold": 0.999},
    )  # fmt: skip
    assert found.report["failed"] == 2
    assert {failure["id"] for failure in found.embeddings.failures} == {3, 24}
    assert found.report["near_duplicates"] == 2
    assert len(found.ids) == 36
    assert not {3, 24} & set(found.ids)
    assert len({30, 31, 32} & set(found.ids)) == 1
    assert found.report["cached"] == {"near_duplicates": False, "tree": False, "selection": False}


def above_the_mean(batch):
    """Zero for images that are darker than another everywhere."""
    return torch.relu(batch.flatten(1) - 200)


@pytest.mark.parametrize("duplicates", [False, True])
def test_embeddings_without_a_direction_are_counted_apart(write_pool, tmp_path, duplicates):
    """Under the cosine metric; they are no near-duplicates."""
    from tests.support.images import png

    dark = png(np.zeros((8, 8, 3), np.uint8))
    shards = write_pool([20, 20], bad={(0, 3): dark, (1, 5): dark, (1, 6): b"broken"})
    settings = {"metric": "cosine", "near_duplicates": {"enabled": duplicates, "threshold": 0.999}}
    embedder = ModuleEmbedder(above_the_mean, as_float, dimension=192)
    found = curate(shards, CONFIG | settings, embedder=embedder, cache_dir=tmp_path)
    counts = {"failed": 1, "near_duplicates": 0, "excluded": 2}
    assert {name: found.report[name] for name in counts} == counts
    stored = reopen(tmp_path, found.folders["selection"].name)
    assert {name: stored.report[name] for name in counts} == counts
    assert "zero" in explain(stored, 3)[0]
    assert not {3, 25, 26} & set(found.ids)


def as_float(image):
    return image.float()


def test_a_pool_of_copies_and_broken_samples_is_said_to_be_so(write_pool, tmp_path):
    shards, held_out = write_pool([20], bad={(0, 3): b"broken"}), write_pool([20], name="held-out", seed=0)
    settings = {"enabled": True, "threshold": 0.999, "held_out": held_out}
    with pytest.raises(PoolError, match=r"^near-duplicates: .* 19 samples"):
        run(shards, tmp_path / "cache", near_duplicates=settings)


def test_held_out_shards_that_are_missing_are_named_before_the_pool_is_embedded(write_pool, tmp_path):
    with pytest.raises(PoolError, match=r"'nowhere\.tar'"):
        run(
            write_pool([20]), tmp_path / "cache",
            near_duplicates={"enabled": True, "held_out": ["nowhere.tar"]},
        )  # fmt: skip
    assert not (tmp_path / "cache" / "embeddings").exists()


def test_held_out_images_leave_the_pool_and_the_largest_copy_stays(write_pool, tmp_path):
    from tests.support.images import png

    rng = np.random.default_rng(5)
    picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    copies = {(0, 4): png(picture), (1, 7): png(np.kron(picture, np.ones((2, 2, 1), np.uint8)))}
    shards, held_out = write_pool([20, 20], bad=copies), write_pool([3], name="held-out", seed=0)
    settings = {"enabled": True, "threshold": 0.999, "prefer": "largest", "held_out": held_out}
    found = run(shards, tmp_path / "cache", target_size=40, near_duplicates=settings)
    # The held-out shard begins with the very images that the pool begins with.
    assert set(range(40)) - set(found.ids) == {0, 1, 2, 4}
    assert found.report["near_duplicates"] == 4
    removed = Removed.load(found.folders["near_duplicates"])
    assert removed.held_out[:4].tolist() == [0, 1, 2, -1]
    assert removed.near[[0, 3, 4]].tolist() == [-1, -1, 27]
    assert removed.cosine[[0, 1, 2]] == pytest.approx(1, abs=1e-6)
    assert 0.999 <= removed.cosine[4] <= 1
    assert np.isnan(removed.cosine[3])


def test_derived_levels_and_every_form_of_pool(write_pool, tmp_path):
    shards = write_pool([90, 60])
    forms = [shards, str(tmp_path / "pool-{000..001}.tar"), str(tmp_path / "pool-*.tar"), ShardPool(shards)]
    config = CurationConfig(target_size=30, embedding={"num_workers": 0})
    found = [curate(form, config, embedder="pixels:4", cache_dir=tmp_path / "cache") for form in forms]
    assert all(np.array_equal(curation.ids, found[0].ids) for curation in found)
    assert found[0].config.levels
    assert found[0].tree.n_levels == len(found[0].config.levels)
    assert found[-1].report["cached"] == {"tree": True, "selection": True}


def test_what_cannot_be_curated(write_pool, tmp_path):
    shards, cache = write_pool([6, 5]), tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"levels\[0\].n_clusters: 12 .* 11 "):
        run(shards, cache)
    assert not (cache / "embeddings").exists()  # found out before anything long started
    with pytest.raises(PoolError, match="empty-000"):
        run(write_pool([0], name="empty"), cache)
    with pytest.raises(PoolError, match="nothing-"):
        run(str(tmp_path / "nothing-*.tar"), cache)
    broken = write_pool([3], name="broken", bad={(0, place): b"?" for place in range(3)})
    with pytest.raises(PoolError, match=r"3 samples .*broken"):
        run(broken, cache, levels=[{"n_clusters": 1}])
    few = write_pool([14], name="few", bad={(0, place): b"?" for place in range(4)})
    with pytest.raises(ConfigError, match=r"levels\[0\].n_clusters: 12 .* 10 "):
        run(few, cache)
    all_of_them = run(shards, cache, levels=[{"n_clusters": 3}], target_size=1000)
    np.testing.assert_array_equal(all_of_them.ids, np.arange(11))


def test_a_cache_of_another_version_is_refused(write_pool, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text('{"format": 0}')
    with pytest.raises(CacheError, match=f"{tmp_path}/cache: .*format 0"):
        run(write_pool([30]), tmp_path / "cache")


def _curate_on_a_small_disk(shards, cache, n_bytes):
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    try:
        run(shards, cache)
    except CacheError as error:
        is_clear = re.search("no space left .*free some, or give another cache_dir", str(error))
        os._exit(3 if is_clear else 4)


def test_no_space_at_any_stage_is_one_error_and_the_next_run_goes_on(write_pool, tmp_path):
    shards, cache = write_pool([60, 50]), tmp_path / "cache"
    expected = run(shards, tmp_path / "alone").ids
    codes = []
    for n_bytes in (500, 2_500, 6_000, 14_000):
        process = multiprocessing.get_context("fork").Process(
            target=_curate_on_a_small_disk, args=(shards, cache, n_bytes)
        )
        process.start()
        process.join()
        codes.append(process.exitcode)
        assert not list(cache.rglob(".tmp-*"))
    assert codes[0] == 3
    assert set(codes) <= {0, 3}
    np.testing.assert_array_equal(run(shards, cache).ids, expected)


def _curate_and_save(shards, cache, out, barrier=None):
    torch.set_num_threads(1)
    if barrier:
        barrier.wait()
    np.save(out, run(shards, cache).ids)


def test_killed_and_simultaneous_runs_end_in_the_same_selection(write_pool, tmp_path):
    shards = write_pool([30, 30, 30])
    alone = run(shards, tmp_path / "alone").ids
    context = multiprocessing.get_context("fork")
    cache = tmp_path / "shared"
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = context.Process(target=_curate_and_save, args=(shards, cache, tmp_path / "killed.npy"))
        process.start()
        time.sleep(rng.uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    barrier = context.Barrier(2)
    outs = [tmp_path / "0.npy", tmp_path / "1.npy"]
    processes = [context.Process(target=_curate_and_save, args=(shards, cache, out, barrier)) for out in outs]
    for process in processes:
        process.start()
    for process, out in zip(processes, outs, strict=True):
        process.join()
        assert process.exitcode == 0
        np.testing.assert_array_equal(np.load(out), alone)


def _curate_on_ranks(rank, shards, folder):
    found = run(shards, folder / "cache")
    np.savez(
        folder / f"rank-{rank}.npz",
        ids=found.ids,
        parent=found.tree.parent[1],
        rows=np.asarray(found.embeddings),
    )


def test_two_ranks_find_what_one_process_finds(write_pool, tmp_path):
    shards = write_pool([40, 30, 20])
    alone = run(shards, tmp_path / "alone")
    on_ranks(2, _curate_on_ranks, shards, tmp_path)
    for rank in (0, 1):
        with np.load(tmp_path / f"rank-{rank}.npz") as saved:
            np.testing.assert_array_equal(saved["rows"], np.asarray(alone.embeddings))
            np.testing.assert_array_equal(saved["parent"], alone.tree.parent[1])
            np.testing.assert_array_equal(saved["ids"], alone.ids)


def test_the_default_is_sparse_and_levels_or_the_paper_are_not(write_pool, tmp_path):
    shards, place = write_pool([400, 300]), {"embedder": "pixels:4", "cache_dir": tmp_path / "cache"}
    found = curate(shards, {"target_size": 70}, **place)
    assert (found.config.sampling, found.config.metric) == ("sparse", "cosine")
    assert [level.n_clusters for level in found.config.levels] == [2]
    neighbours = find_neighbours(found.embeddings, found.tree)
    np.testing.assert_array_equal(found.ids, sparse_sample(found.tree, neighbours, 70, seed=0))
    again = curate(shards, found.config, **place)  # with the levels filled in
    assert again.folders == found.folders

    paper = curate(shards, {"target_size": 70, "preset": "paper"}, **place)
    assert (paper.config.sampling, paper.config.metric) == ("hierarchical", "l2")
    assert paper.config.levels == choose_levels(700)
    np.testing.assert_array_equal(paper.ids, hierarchical_sample(paper.tree, 70, seed=0))
    own = curate(shards, {"target_size": 70, "levels": [{"n_clusters": 9}]}, **place)
    assert (own.config.sampling, own.config.metric) == ("hierarchical", "l2")
    with pytest.raises(ConfigError, match="strategy"):
        curate(shards, {"target_size": 70, "sampling": "sparse", "strategy": "closest"}, **place)
