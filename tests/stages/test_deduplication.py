"""The near-duplicate stage: held-out shards that cannot hold anything out are an error, gaps are told."""

import pytest

from curated_data import curate
from curated_data.config import NearDuplicateConfig
from curated_data.errors import ConfigError, PoolError
from curated_data.selection.near_duplicates import THRESHOLD

CONFIG = {"target_size": 5, "levels": [{"n_clusters": 2}], "embedding": {"num_workers": 0}}


def run(shards, held_out, cache):
    settings = {"enabled": True, "threshold": 0.999, "held_out": held_out}
    return curate(shards, CONFIG | {"near_duplicates": settings}, embedder="pixels:4", cache_dir=cache)


def test_held_out_shards_of_which_nothing_can_be_embedded(write_pool, tmp_path):
    shards, cache = write_pool([10]), tmp_path / "cache"
    broken = write_pool([3], name="test", bad={(0, place): b"?" for place in range(3)})
    with pytest.raises(
        ConfigError, match=r"^near_duplicates\.held_out: .* 3 .*test-000\.tar, key '000/0000'"
    ):
        run(shards, broken, cache)
    with pytest.raises(PoolError, match=r"^near_duplicates\.held_out: .*none-000\.tar"):
        run(shards, write_pool([0], name="none"), cache)


def test_the_setting_and_the_function_have_one_default():
    assert NearDuplicateConfig().threshold == THRESHOLD


def test_held_out_samples_that_cannot_be_embedded_are_counted(write_pool, tmp_path, caplog):
    run(write_pool([10]), write_pool([3], name="test", seed=1, bad={(0, 1): b"?"}), tmp_path / "cache")
    assert "near_duplicates.held_out: 1 of 3 held-out samples could not be embedded" in caplog.text
