"""A cache with every kind of artifact beside what must not change."""

import shutil

import pytest

from curated_data import curate
from tests.support.images import noise, write_samples


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pool, and a cache with every kind of artifact."""
    folder = tmp_path_factory.mktemp("original")
    shards = write_samples(folder / "pool-%06d.tar", ({"png": image} for image in noise(20)), max_samples=10)
    config = {
        "target_size": 6,
        "levels": [{"n_clusters": 4}, {"n_clusters": 2}],
        "embedding": {"num_workers": 0},
        "near_duplicates": {"enabled": True, "threshold": 0.99},
    }
    curation = curate(shards, config, embedder="pixels:2", cache_dir=folder / "cache")
    return shards, folder / "cache", config, curation.folders["selection"].name


@pytest.fixture
def place(original, tmp_path):
    """A copy of the cache, around a file and beside a folder of the user's that must not change."""
    shards, cache, config, selection = original
    shutil.copytree(cache, tmp_path / "home" / "cache")
    victims = tmp_path / "home" / "victim" / "precious", tmp_path / "home" / "cache" / "victim"
    victims[0].parent.mkdir()
    victims[0].write_text("years of work")
    victims[1].write_text("of the user, in the cache")
    yield shards, tmp_path / "home" / "cache", config, selection
    assert [path.read_text() for path in victims] == ["years of work", "of the user, in the cache"]
