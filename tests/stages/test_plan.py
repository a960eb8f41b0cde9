"""Plans: what is cached costs nothing, more samples never cost less, and the sizes are those on disk."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import CurationConfig, Level, ShardPool, curate
from curated_data.config import EmbeddingConfig
from curated_data.levels import choose_levels
from curated_data.pipeline.plan import plan, plan_tables, planned_stages
from curated_data.stages.cost import Rates
from curated_data.stages.embeddings import Embeddings
from curated_data.stages.tree import Tree, clustering_work
from recipes import pretrain

NOWHERE = Path("no cache")
ROOT = Path(__file__).parents[2]


def config(**changes):
    levels = [Level(8, n_resamples=2, sample_size=3), Level(3)]
    embedding = EmbeddingConfig(num_workers=0, dtype="float32")
    return CurationConfig(**{"target_size": 15, "levels": levels, "embedding": embedding} | changes)


def test_before_and_after_a_curation(write_pool, tmp_path):
    pool = ShardPool(write_pool([40, 25]), cache_dir=tmp_path / "c")
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "c"}
    settings = config()
    settings.near_duplicates.enabled = True
    before = plan(pool, settings, **place)
    assert [stage.name for stage in before.stages] == ["embed", "near_duplicates", "cluster", "sample"]
    assert not any(stage.cached for stage in before.stages)
    seconds = {stage.name: stage.seconds for stage in before.stages}
    assert seconds["near_duplicates"] is None
    assert seconds["sample"] is None
    assert before.seconds == seconds["embed"] + seconds["cluster"] > 0
    (*_, total), (*_, said) = (list(column.cells) for column in plan_tables(before)[1].columns[1:])
    assert list(plan_tables(before)[1].columns[1].cells).count("not measured") == 2
    assert "2 stages" in said
    assert total != "not measured"
    assert not list((tmp_path / "c").glob("embeddings/*"))  # the probe leaves nothing
    curation = curate(pool, settings, **place)
    rows = sum(path.stat().st_size for path in curation.folders["embeddings"].glob("*.npy"))
    assert before.embedding_bytes == rows - 2 * 128  # two headers
    tree = sum(path.stat().st_size for path in curation.folders["tree"].glob("tree/*.npy"))
    assert before.tree_bytes == pytest.approx(tree, rel=0.01, abs=6 * 128)
    assert before.pool_bytes == pool.sizes(range(65)).sum()
    after = plan(pool, settings, **place)
    assert all(stage.cached and stage.seconds == 0 for stage in after.stages)
    assert after.seconds == 0
    changed = plan(pool, dataclasses.replace(settings, target_size=9), **place)
    assert [stage.cached for stage in changed.stages] == [True, True, True, False]
    titles = [table.title for table in plan_tables(after)]
    assert titles == ["Plan", "Expected, by a probe on this machine"]


def test_what_lies_beside_the_pool_is_embedded_too(write_pool, tmp_path):
    """Held-out samples and seeds count in the plan of the embedding; retrieval is a stage of its own."""
    pool, seeds, held_out = write_pool([40]), write_pool([9], name="seeds", seed=1), write_pool([7], name="h")
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "c"}
    settings = config()
    settings.near_duplicates.enabled = True
    settings.near_duplicates.held_out = held_out
    settings.retrieval.seeds = {"mine": seeds}
    before = plan(pool, settings, **place)
    names = [stage.name for stage in before.stages]
    assert names == ["embed", "near_duplicates", "cluster", "retrieve", "sample"]
    assert "40 samples" in before.stages[0].note
    assert "16 held-out samples or seeds" in before.stages[0].note
    assert "9 seeds of 1 sets" in before.stages[3].note
    curate(pool, settings, **place)
    after = plan(pool, settings, **place)
    assert [stage.name for stage in after.stages if not stage.cached] == []


def expected(n, dimension, config, rates, ranks):
    """The costs of all stages of n samples, none of which is cached."""
    stages, _ = planned_stages(NOWHERE, config, None, n)
    embed = Embeddings(NOWHERE, None, None, config.embedding).cost(n, dimension, rates, ranks)
    return [embed, *stages.costs(n, dimension, rates, ranks)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(100, 10**9), st.integers(0, 10**9), st.integers(1, 2048), st.booleans(), st.integers(1, 64)
)
def test_more_samples_never_cost_less(n, more, dimension, auto, ranks):
    rates = Rates(100.0, 1e9)
    small, large = (
        config(levels=choose_levels(size) if auto else [Level(50, n_resamples=3), Level(5)])
        for size in (n, n + more)
    )
    first = expected(n, dimension, small, rates, ranks)
    second = expected(n + more, dimension, large, rates, ranks)
    for a, b in zip(first, second, strict=True):
        if a.name == "embed" or (a.name == "cluster" and not auto):
            assert a.seconds <= b.seconds
    of_more = expected(n + more, dimension, small, rates, ranks)
    assert all(a.memory <= b.memory for a, b in zip(first, of_more, strict=True))
    tree = Tree(NOWHERE, small, None)
    assert tree.disk_bytes(n, dimension) <= tree.disk_bytes(n + more, dimension)


def test_work_of_the_published_setting():
    """ViT-L features of 743M images, 4 levels: rows times the root of clusters, counted by hand."""
    levels = [Level(100_000, n_splits=100), Level(500_000, 9, 10), Level(50_000, 9, 5), Level(10_000, 9, 3)]
    whole = 743e6 * 1e5**0.5 + 743e6 * 100**0.5 + 1e7 * 5e5**0.5 + 5e5 * 5e4**0.5 + 5e4 * 1e4**0.5
    resampled = 5e6 * 5e5**0.5 + 2.5e5 * 5e4**0.5 + 3e4 * 1e4**0.5
    assigned = 1e7 * 5e5**0.5 + 5e5 * 5e4**0.5 + 5e4 * 1e4**0.5
    expected = 1024 * (whole + 9 * (0.6 * resampled + 0.125 * assigned))
    assert clustering_work(743_000_000, 1024, config(levels=levels)) == pytest.approx(expected)


def test_ranks_share_clustering_and_nothing_is_said_of_what_is_not_measured():
    settings = config()
    settings.near_duplicates.enabled = True
    one, four = (
        {stage.name: stage.seconds for stage in expected(10**7, 8, settings, Rates(100.0, 1e9), ranks)}
        for ranks in (1, 4)
    )
    assert four["cluster"] == pytest.approx(one["cluster"] / 4)
    assert four["embed"] == pytest.approx(one["embed"] / 4)
    assert one["near_duplicates"] is one["sample"] is four["near_duplicates"] is None


def test_dry_run_of_the_recipe(write_pool, tmp_path, monkeypatch, capsys):
    """The plan of a whole training, its steps timed, and nothing of the run itself begun."""
    write_pool([40, 24])
    monkeypatch.chdir(tmp_path)
    values = {
        "data.pool": str(tmp_path / "pool-*.tar"), "data.curation.target_size": 32,
        "data.embedder": "pixels:4", "data.batch_size": 8, "data.loader.num_workers": 0,
        "data.cache_dir": str(tmp_path / "c"),
        "trainer.max_epochs": 3, "trainer.accelerator": "cpu",
        "trainer.default_root_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    overrides = [item for name, value in values.items() for item in (f"--{name}", str(value))]
    configs = [
        "--config",
        f"{ROOT}/configs/base.yaml",
        "--config",
        f"{ROOT}/configs/pretrain/simclr_fashion.yaml",
    ]
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["fit", *configs, *overrides, "--dry-run"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "12 steps of 8 x 1 samples" in shown
    for stage in ("embed", "cluster", "train", "in all"):
        assert re.search(rf"│ {stage} +│ +[\d,.]+ (s|min|h)", shown), shown
    assert re.search(r"│ sample +│ +not measured", shown), shown
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "c").glob("embeddings/*"))


def test_dry_run_of_a_method_with_a_buffer(write_pool, tmp_path, monkeypatch, capsys):
    write_pool([60, 52])
    monkeypatch.chdir(tmp_path)
    values = {
        "data.pool": str(tmp_path / "pool-*.tar"), "data.batch_size": 8, "data.loader.num_workers": 0,
        "model.init_args.buffer_size": 100, "model.init_args.backbone_options": "{width: 4}",
        "trainer.max_epochs": 3, "trainer.accelerator": "cpu",
    }  # fmt: skip
    overrides = [item for name, value in values.items() for item in (f"--{name}", str(value))]
    configs = [f"{ROOT}/configs/base.yaml", f"{ROOT}/configs/pretrain/sp2ot_fashion.yaml"]
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["fit", *(part for path in configs for part in ("--config", path)), *overrides,
                       "--dry-run"])  # fmt: skip
    assert ended.value.code == 0
    assert "no curation; 42 steps of 8 x 1 samples: " in capsys.readouterr().out
