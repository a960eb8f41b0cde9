"""Derived levels shrink to what the rows allow; those of the user are an error that says so."""

import numpy as np
import pytest
import torch

from curated_data import CurationConfig, Level, ShardPool, curate
from curated_data.config import EmbeddingConfig
from curated_data.errors import ConfigError, PoolError
from tests.support.images import png


def copies(write_pool, n, distinct):
    """A pool of n samples with few distinct images."""
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(distinct)]
    return write_pool([n], bad={(0, i): images[i % distinct] for i in range(n)})


def settings(target, **changes):
    return CurationConfig(target_size=target, embedding=EmbeddingConfig(num_workers=0), **changes)


@pytest.mark.parametrize(("n", "distinct"), [(1, 1), (2, 1), (3, 2), (450, 3), (450, 1)])
def test_few_distinct_samples_can_be_curated(n, distinct, write_pool, tmp_path):
    pool = ShardPool(copies(write_pool, n, distinct))
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "c"}
    curation = curate(pool, settings(min(n, 20)), **place)
    assert len(curation.ids) == min(n, 20)
    assert curation.tree.sizes(curation.tree.n_levels).sum() == n


def test_the_users_levels_are_not_shrunk(write_pool, tmp_path):
    pool = ShardPool(copies(write_pool, 450, 3))
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "c"}
    derived = curate(pool, settings(20, levels=None), **place)
    asked = [Level(22, 10, 10), Level(11, 10, 2)]
    with pytest.raises(ConfigError, match=r"levels.*3"):
        curate(pool, settings(20, levels=asked), **place)
    assert derived.tree.n_levels == 1
    # Those that were derived before they shrank, written out: a tree of them is in the cache.
    if derived.config.levels is not None and len(derived.config.levels) > 1:
        with pytest.raises(ConfigError, match="levels"):
            curate(pool, settings(20, levels=derived.config.levels), **place)


def nothing(batch):
    return torch.zeros(len(batch), 4)


def test_samples_without_a_direction_are_one_clear_error(write_pool, tmp_path):
    pool = ShardPool(write_pool([3]))
    with pytest.raises(PoolError, match="no usable row") as raised:
        curate(pool, settings(2, metric="cosine"), embedder=nothing, cache_dir=tmp_path / "c")
    assert "levels" not in str(raised.value)
