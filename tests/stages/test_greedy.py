"""Greedy selection through the whole of a curation: ranks, plan, explanations and bad settings."""

import numpy as np
import pytest

from curated_data import CurationConfig, ShardPool, curate
from curated_data.config import EmbeddingConfig
from curated_data.errors import ConfigError
from curated_data.pipeline.plan import plan
from curated_data.report.explain import explain
from curated_data.selection.greedy import greedy_order
from tests.support.ranks import on_two_ranks

CONFIG = CurationConfig(target_size=20, sampling="greedy", embedding=EmbeddingConfig(num_workers=0))


def run(shards, cache, config=CONFIG):
    return curate(ShardPool(shards, cache_dir=cache), config, embedder="pixels:4", cache_dir=cache)


def ids_on_rank(rank, shards, cache):
    return run(shards, cache).ids.tolist()


def test_two_ranks_select_what_one_process_does(write_pool, tmp_path):
    shards = write_pool([40, 30, 20])
    alone = run(shards, tmp_path / "alone")
    assert alone.ids.tolist() == sorted(greedy_order(alone.embeddings, alone.tree, 20))
    assert on_two_ranks(ids_on_rank, shards, tmp_path / "both") == [alone.ids.tolist()] * 2


def test_a_plan_counts_it_and_a_sample_is_explained_by_it(write_pool, tmp_path):
    shards, cache = write_pool([50]), tmp_path / "cache"
    pool = ShardPool(shards, cache_dir=cache)
    before = plan(pool, CONFIG, embedder="pixels:4", cache_dir=cache)
    assert [(stage.name, stage.cached) for stage in before.stages] == [
        ("embed", False),
        ("cluster", False),
        ("sample", False),
    ]
    curation = run(shards, cache)
    after = plan(pool, CONFIG, embedder="pixels:4", cache_dir=cache)
    assert all(stage.cached for stage in after.stages)
    selected = int(curation.ids[0])
    other = int(np.setdiff1d(np.arange(50), curation.ids)[0])
    assert "nearer" in explain(curation, selected)[-1]
    assert explain(curation, selected)[-1] != explain(curation, other)[-1]


@pytest.mark.parametrize("changes", [{"max_repeats": 2}, {"quotas": {"cap": 5}}, {"strategy": "closest"}])
def test_settings_that_do_not_go_with_it_are_named(write_pool, tmp_path, changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}.*greedy"):
        run(write_pool([10]), tmp_path, {"target_size": 3, "sampling": "greedy", **changes})
